"""How much of a training step is spent waiting for input, on device and from the host.

For each way, the same compiled steps run twice: on batches as they come, and on one batch over and over. What
the first takes longer is lost to the input. The four loops alternate, so that they share what else the
machine does; each round's loss is of its own pair, and the median of the rounds is reported. On a machine
that others use as well the rounds differ by more than the loss: there, look at "blocked", the share of the
loop that was spent inside the call for the next batch.

    python benchmarks/input_pipeline.py
    python benchmarks/input_pipeline.py --dataset fashion_mnist --data-dir DIR --image-size 32 --width 64 \\
        --stage-sizes --batch-size 1024 --json loss.json
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax
import grain
import jax
import jax.numpy as jnp
import optax

from cuttlefish_jax.models import create_model
from cuttlefish_jax.training.config import default_config
from cuttlefish_jax.training.data import Dataset, TrainInput, load_dataset, make_preprocess, materialize

# More steps than the pipeline reads ahead: what it read while another loop ran is used up before timing.
WARM_UP_STEPS = 16


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data-dir", default="", help="where prepared TFDS data sets are")
    parser.add_argument("--image-size", type=int, default=16)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument(
        "--stage-sizes", type=int, nargs="*", default=[1, 1, 1], help="none: the network's own"
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0, help="reader processes; 0 is threads")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of one loop")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", metavar="FILE", help="write the same as JSON")
    return parser.parse_args()


def make_step(arguments: argparse.Namespace, dataset: Dataset, data: Any) -> tuple[Callable[..., Any], Any]:
    """A training step as in a run, and its first state."""
    model = create_model(
        arguments.model,
        num_classes=dataset.num_classes,
        width=arguments.width,
        stage_sizes=arguments.stage_sizes,
        dtype=arguments.dtype,
    )
    train_fn, _ = make_preprocess(data, dataset.mean, dataset.std)
    optimizer = optax.sgd(0.01, momentum=0.9)

    def init() -> Any:
        images = jnp.zeros((1, data.image_size, data.image_size, data.channels))
        variables = model.init(jax.random.key(0), images)
        return variables, optimizer.init(variables["params"]), jnp.int32(0)

    def step(state: Any, resident: Any, batch: Any) -> Any:
        variables, momentum, count = state
        examples = materialize(resident, batch)
        key = jax.random.fold_in(jax.random.key(1), count)
        images = train_fn(key, examples["image"], examples["index"])

        def loss_fn(params: Any) -> Any:
            logits, updated = model.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, examples["label"]).mean()
            return loss, updated

        gradients, updated = jax.grad(loss_fn, has_aux=True)(variables["params"])
        gradients, updated = jax.lax.pmean((gradients, updated), "batch")
        changes, momentum = optimizer.update(gradients, momentum)
        params = optax.apply_updates(variables["params"], changes)
        return {"params": params, **updated}, momentum, count + 1

    compiled = jax.pmap(step, axis_name="batch", in_axes=(None, None, 0), out_axes=None)
    return compiled, jax.jit(init)()


def endless(pipeline: TrainInput) -> Iterator[Any]:
    """The batches of all epochs."""
    return itertools.chain.from_iterable(pipeline.epoch(epoch) for epoch in itertools.count())


def seconds(
    step: Callable[..., Any], state: Any, pipeline: TrainInput, batches: Iterator[Any], steps: int
) -> tuple[float, float]:
    """Time of the steps after the warm-up, and the part of it spent in the call for the next batch."""
    for _ in range(WARM_UP_STEPS):
        state = step(state, pipeline.resident, next(batches))
    jax.block_until_ready(state)
    blocked = 0.0
    start = time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(batches)
        blocked += time.perf_counter() - asked
        state = step(state, pipeline.resident, batch)
    jax.block_until_ready(state)
    return time.perf_counter() - start, blocked


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each way."""
    data = default_config().data
    data.update(name=arguments.dataset, data_dir=arguments.data_dir, image_size=arguments.image_size)
    dataset = load_dataset(data)
    step, state = make_step(arguments, dataset, data)
    ways = {
        name: TrainInput(
            dataset.train,
            batch_size=arguments.batch_size,
            seed=0,
            on_device=on_device,
            workers=arguments.workers,
        )
        for name, on_device in [("on device", True), ("from host", False)]
    }
    real = {name: endless(pipeline) for name, pipeline in ways.items()}
    repeated = {name: next(batches) for name, batches in real.items()}
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for name, pipeline in ways.items():
        jax.block_until_ready(step(state, pipeline.resident, repeated[name]))  # compiles
    for round_ in range(arguments.rounds):
        for name, pipeline in ways.items():
            loops = [real[name], itertools.repeat(repeated[name])]
            order = [0, 1] if round_ % 2 == 0 else [1, 0]
            pair = {i: seconds(step, state, pipeline, loops[i], arguments.steps) for i in order}
            times[name].append((*pair[0], pair[1][0]))
    for pipeline in ways.values():
        pipeline.close()
    rows = []
    for name, rounds in times.items():
        lost = [(loop - steps) / loop for loop, _, steps in rounds]
        loop, blocked, steps = (
            statistics.median(column) / arguments.steps for column in zip(*rounds, strict=True)
        )
        rows.append(
            {
                "input": name,
                "loop_ms_per_step": 1e3 * loop,
                "compute_ms_per_step": 1e3 * steps,
                "examples_per_second": arguments.batch_size / loop,
                "lost": statistics.median(lost),
                "lost_least": min(lost),
                "lost_most": max(lost),
                "blocked": blocked / loop,
            }
        )
    return rows


def main() -> None:
    arguments = parse_arguments()
    rows = measure(arguments)
    devices = jax.local_devices()
    result = {
        "date": datetime.date.today().isoformat(),
        "device": f"{len(devices)} x {devices[0].device_kind} ({platform.machine()})",
        "versions": {m.__name__: m.__version__ for m in (jax, flax, grain)},
        "python": platform.python_version(),
        **{k: v for k, v in vars(arguments).items() if k not in ("json", "data_dir")},
        "rows": rows,
    }
    print(f"{result['date']}, {result['device']}, python {result['python']}, ", end="")
    print(", ".join(f"{name} {version}" for name, version in result["versions"].items()))
    print(f"{arguments.model} {arguments.stage_sizes}, width {arguments.width}, {arguments.dtype}; ", end="")
    print(f"{arguments.dataset} {arguments.image_size}x{arguments.image_size}, ", end="")
    print(f"batch {arguments.batch_size}, {arguments.rounds} rounds of {arguments.steps} steps")
    print(f"{'input':10} {'loop':>10} {'compute':>10} {'examples/s':>11} {'lost':>7} {'blocked':>8}", end="")
    print("   lost, least ... most")
    for row in rows:
        print(
            f"{row['input']:10} {row['loop_ms_per_step']:7.2f} ms {row['compute_ms_per_step']:7.2f} ms "
            f"{row['examples_per_second']:11.0f} {row['lost']:7.1%} {row['blocked']:8.2%}   "
            f"{row['lost_least']:.1%} ... {row['lost_most']:.1%}"
        )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(result, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
