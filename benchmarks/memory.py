"""The memory of a device by the number of devices, with the state whole on each (pmap) and split (fsdp).

Of a network of a few million parameters, before and after a switch to a quarter of the ranks, nothing is
trained: the train step is compiled for 1, 2, 4 and 8 devices, each with as many examples, and XLA says what
it takes. ``state`` is what lies on a device between two steps, ``step`` the most that a step takes, with that
state::

    python benchmarks/memory.py [--model deit_small] [--depth 4] [--json FILE]

Two minutes on two CPU cores. Without accelerators the devices are simulated ones on the CPU, for which XLA is
told to order operations by memory, as it does on accelerators.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

DEVICES = (1, 2, 4, 8)
# Before JAX starts its backend; of no account where there are accelerators.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        f"--xla_force_host_platform_device_count={DEVICES[-1]}",
        "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    ]
)

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from common import report  # noqa: E402

import cuttlefish_jax as cf  # noqa: E402
from cuttlefish_jax.models import create_model  # noqa: E402
from cuttlefish_jax.training.data import ArraySource, TrainInput  # noqa: E402
from cuttlefish_jax.training.losses import cross_entropy  # noqa: E402
from cuttlefish_jax.training.parallelism import (  # noqa: E402
    PARALLELISMS,
    DataParallel,
    FullySharded,
    bytes_per_device,
)
from cuttlefish_jax.training.state import create_state  # noqa: E402
from cuttlefish_jax.training.step import make_train_step  # noqa: E402
from cuttlefish_jax.training.tasks import Task  # noqa: E402

SIZE = 32


def make_task(examples: int) -> Task:
    images = np.zeros((examples, SIZE, SIZE, 3), np.uint8)
    source = ArraySource({"image": images, "label": np.zeros(examples, np.int32)})

    def inputs(examples: Any) -> tuple[jax.Array]:
        return (examples["image"].astype(jnp.float32) / 255,)

    return Task(
        num_outputs=10,
        inputs=(jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32),),
        train=source,
        evaluation={},
        train_inputs=lambda key, examples: (inputs(examples), examples["label"]),
        eval_inputs=inputs,
        train_loss=cross_entropy,
        eval_loss=cross_entropy,
        predict=lambda logits: jnp.argmax(logits, axis=-1),
        metrics=("accuracy",),
    )


def measure(model: nn.Module, kernels: cf.Kernels, plan: Any, options: Any, number: int) -> dict[str, Any]:
    """Megabytes on one of so many devices."""
    devices, row = jax.devices()[:number], {}
    task = make_task(options.examples * number)
    low = model if plan is None else cf.factorize(model, plan)
    tx = optax.adamw(1e-3)
    state = jax.eval_shape(lambda: create_state(low, tx, task.inputs, seed=0, ema=True))
    data = TrainInput(
        task.train, batch_size=options.examples * number, seed=0, on_device=False, devices=devices
    )
    batch = next(data.epoch(0))
    data.close()
    for kind in PARALLELISMS:
        layout = (
            DataParallel(devices)
            if kind == "pmap"
            else FullySharded.of(state.params, kernels, plan, devices=devices)
        )
        step = make_train_step(task, layout, ema=0.999)
        step.compile_for(layout.abstract(state), data.resident, batch)
        row[f"{kind} state MB"] = bytes_per_device(state, layout.shardings(state)) / 1e6
        row[f"{kind} step MB"] = (step.peak_bytes or float("nan")) / 1e6
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="deit_small", help="default deit_small")
    parser.add_argument("--depth", type=int, default=4, help="blocks of a DeiT (default 4)")
    parser.add_argument("--examples", type=int, default=4, help="on each device (default 4)")
    parser.add_argument("--json", metavar="FILE", help="write the table there, too")
    options = parser.parse_args()
    sizes = {"patch": 8, "depth": options.depth} if "deit" in options.model else {}
    model = create_model(options.model, num_classes=10, **sizes)
    x = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    kernels = cf.find_kernels(model, x, train=False)
    ranks = {path: kernel.max_rank // 4 for path, kernel in list(kernels.items())[1:-1]}
    plan = cf.FactorizationPlan.from_ranks(kernels, ranks)
    rows = []
    for phase, of_phase in (("full rank", None), ("low rank", plan)):
        count = kernels.num_params if of_phase is None else plan.num_params
        for number in DEVICES:
            start: dict[str, Any] = {"phase": phase, "parameters": count, "devices": number}
            rows.append(start | measure(model, kernels, of_phase, options, number))
            print(rows[-1], file=sys.stderr, flush=True)
    report(rows, options.json, notes=["AdamW and a moving average: the state is four times the parameters."])


if __name__ == "__main__":
    main()
