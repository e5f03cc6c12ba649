"""Time and memory of a train step, full-rank against factorized: how much of the saved FLOPs becomes time.

    python benchmarks/step_time.py --config.batch_size=64 [--config configs/resnet18.py:digits] [--ratio 0.25]
        [--plain] [--products] [--trace FOLDER] [--json FILE]
    python benchmarks/step_time.py --config configs/deit_base.py:digits --config.model.depth=2

Takes the train step that train.py runs for a configuration, on random data, full-rank and with the layers
that the configuration leaves to be factorized at a fixed ratio, and runs the two alternately in one process.
The median of the rounds' ratios is reported. FLOPs are those of matrix products and convolutions, three times
the forward ones. Memory is what XLA's plan of the compiled step says: its arguments (the state, whose buffers
are used again for the new one, and the data), and what it needs beside them, in MB of one device.

Another figure is what the training loop adds: an epoch of train.py's loop against its compiled steps alone.
A third is the time of the input alone: taking a batch's examples on the device, and their augmentation.

With --trace FOLDER a few steps of each network are recorded there, for Perfetto and TensorBoard.
With --plain another network's factors take plain steps, not those of their product, and with --products
another's factors of one pixel are products of matrices and not convolutions.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from absl import app, flags
from common import Runner, report
from layer_time import share
from ml_collections import config_flags
from products import products
from synthetic import synthetic_experiment

import cuttlefish_jax as cf
from cuttlefish_jax.training.data import materialize
from cuttlefish_jax.training.experiment import Experiment, Phase
from cuttlefish_jax.training.method import plan_from_config
from cuttlefish_jax.training.parallelism import AXIS

_CONFIG = config_flags.DEFINE_config_file("config", "configs/resnet18.py:digits")
_RATIO = flags.DEFINE_float("ratio", 0.25, "rank as a share of min(m, n)", 0, 1)
_CLASSES = flags.DEFINE_integer("classes", 10, "length of the network's output", 1)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "rounds; the medians are reported", 1)
_STEPS = flags.DEFINE_integer("steps", 2, "steps of one network in a round", 1)
_PLAIN = flags.DEFINE_bool("plain", False, "also with plain steps of the factors")
_PRODUCTS = flags.DEFINE_bool("products", False, "also with convolutions of one pixel as products")
_TRACE = flags.DEFINE_string("trace", None, "folder for a recording of some steps")
_JSON = flags.DEFINE_string("json", None, "write the table to this file too")


def make_plan(experiment: Experiment, ratio: float) -> cf.FactorizationPlan:
    """The plan that the configuration's rules make when every rank is this share of the full one."""
    config = experiment.config.copy_and_resolve_references()
    config.method, config.plan.rank_rule, config.plan.rank_ratio = "cuttlefish", "rank_ratio", ratio
    config.plan.budget, config.plan.min_rank_ratio = "", 0.0
    return plan_from_config(config, experiment.kernels, {}, {})


def make_runners(experiment: Experiment, plan: cf.FactorizationPlan) -> dict[str, tuple[Phase, Runner]]:
    """The networks to be compared, compiled."""

    def made(phase: Phase) -> tuple[Phase, Runner]:
        return phase, Runner(experiment, phase)

    with ThreadPoolExecutor() as pool:  # compiles both at once
        both = list(pool.map(made, (experiment.phase(), experiment.phase(plan))))
    networks: dict[str, tuple[Phase, Runner]] = {"full": both[0], "factorized": both[1]}
    if _PLAIN.value:
        config = experiment.config.copy_and_resolve_references()
        config.optimizer.precondition = False
        networks["plain"] = made(dataclasses.replace(experiment, config=config).phase(plan))
    if _PRODUCTS.value:
        with products():
            networks["products"] = made(experiment.phase(plan))
    return networks


def measure(
    experiment: Experiment, plan: cf.FactorizationPlan, networks: Mapping[str, tuple[Phase, Runner]]
) -> tuple[list[dict[str, Any]], list[str]]:
    runners = {name: runner for name, (_, runner) in networks.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    overheads = []
    runners["factorized"].epoch()  # opens the input, which the next epochs find open
    for _ in range(_ROUNDS.value):
        for name, runner in runners.items():
            seconds[name].append(runner.repeat(_STEPS.value) / _STEPS.value)
        steps = experiment.train.steps_per_epoch
        alone, looped = runners["factorized"].repeat(steps), runners["factorized"].epoch()
        overheads.append(looped / alone - 1)
    full_flops = experiment.count_flops(networks["full"][0])
    rows = []
    for name, runner in runners.items():
        flops = experiment.count_flops(networks[name][0])
        ratios = [a / b for a, b in zip(seconds["full"], seconds[name], strict=True)]
        row = {
            "network": name,
            "params": plan.num_params_full if name == "full" else plan.num_params,
            "GFLOP/step": 3 * flops * experiment.config.batch_size / 1e9,
            "ms/step": 1e3 * statistics.median(seconds[name]),
            **memory(runner),
        }
        if name != "full":
            faster = statistics.median(ratios)
            row |= {
                "FLOPs x fewer": full_flops / flops,
                "x faster": faster,
                "lowest-highest": f"{min(ratios):.2f}-{max(ratios):.2f}",
                "share": share(faster, full_flops / flops),
            }
        rows.append(row)
    spread = ", ".join(f"{100 * overhead:.1f}" for overhead in sorted(overheads))
    augmented = 1e3 * input_seconds(experiment, runners["full"].batch)
    notes = [
        f"{100 * rows[1]['share']:.0f} % of the FLOP saving arrives as time",
        f"{len(plan.ranks)} of {len(plan.kernels)} layers are factorized",
        f"XLA counts {runners['full'].step.flops / runners['factorized'].step.flops:.2f}x fewer operations",
        f"{augmented:.3g} ms of a step are the input's",
        f"the training loop adds {100 * statistics.median(overheads):.1f} % to its steps (of {spread})",
    ]
    return rows, notes


def input_seconds(experiment: Experiment, batch: Any) -> float:
    """Seconds that a train step spends on what the network is given."""

    def inputs(key: jax.Array, resident: Any, batch: Any) -> Any:
        return experiment.task.train_inputs(key, materialize(resident, batch))

    mapped = jax.pmap(inputs, AXIS, in_axes=(None, None, 0))
    arguments = jax.random.key(0), experiment.train.resident, batch
    seconds = []
    for _ in range(_ROUNDS.value + 1):
        start = time.perf_counter()
        jax.block_until_ready([mapped(*arguments) for _ in range(_STEPS.value)])
        seconds.append((time.perf_counter() - start) / _STEPS.value)
    return statistics.median(seconds[1:])  # the first compiles


def memory(runner: Runner) -> dict[str, float]:
    """Of the compiled step, in MB: what it is given, how much of that it writes its results to, and more."""
    sizes = runner.step.memory
    return {
        "arguments MB": sizes.argument_size_in_bytes / 1e6,
        "reused MB": sizes.alias_size_in_bytes / 1e6,
        "beside them MB": sizes.temp_size_in_bytes / 1e6,
    }


def main(_: list[str]) -> None:
    config = _CONFIG.value
    experiment = synthetic_experiment(config, num_classes=_CLASSES.value)
    plan = make_plan(experiment, _RATIO.value)
    networks = make_runners(experiment, plan)
    rows, notes = measure(experiment, plan, networks)
    sizes = {name: config.model[name] for name in ("width", "depth", "dtype") if config.model[name]}
    data = dict(batch=config.batch_size, image_size=config.data.image_size)
    about = ", ".join(f"{name} {value}" for name, value in {**sizes, **data, "ratio": _RATIO.value}.items())
    report(rows, _JSON.value, notes=[f"{config.name}, {config.model.name}, {about}", *notes])
    for name in networks if _TRACE.value else ():
        with jax.profiler.trace(f"{_TRACE.value}/{name}", create_perfetto_trace=True):
            networks[name][1].repeat(_STEPS.value)


if __name__ == "__main__":
    app.run(main)
