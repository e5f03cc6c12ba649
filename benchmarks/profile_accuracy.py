"""Does a factorized network get faster by as much as the profile of its layers says, and what does that cost?

    python benchmarks/profile_accuracy.py --config.model.width=32 --config.batch_size=64
        [--config configs/resnet18.py:digits] [--ratio 0.25] [--min_speedup 1.5] [--json FILE]

In every round, all in one process, the layers of a network are profiled at the batch of one device, as
train.py does it, and then its full-rank train step and its factorized ones are run alternately. The
prediction is the full-rank step less what the profile says that the factorized layers save. It is made
twice: for all layers that may be factorized, and for those in stacks that get at least --min_speedup times
faster by the first profile, which train.py factorizes. The table has the medians of the rounds.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import jax
from absl import app, flags
from common import Runner, report
from ml_collections import config_flags

import cuttlefish_jax as cf
from cuttlefish_jax.training.experiment import Experiment

_CONFIG = config_flags.DEFINE_config_file("config", "configs/resnet18.py:digits")
_RATIO = flags.DEFINE_float("ratio", 0.25, "rank as a share of min(m, n)", 0, 1)
_MIN_SPEEDUP = flags.DEFINE_float("min_speedup", 1.5, "that a stack must reach to be factorized", 0)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "profiles, each with timings of the train steps beside it", 1)
_STEPS = flags.DEFINE_integer("steps", 5, "timings of each network's train step in a round", 1)
_JSON = flags.DEFINE_string("json", None, "write the table to this file too")


def profile(experiment: Experiment, paths: list[str], ratio: float) -> tuple[cf.KernelProfile, float]:
    """The profile of these layers at the batch of one device, and the seconds that it took."""
    accumulated = experiment.config.optimizer.accumulation_steps
    batch = experiment.config.batch_size // (jax.device_count() * accumulated)
    inputs = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in experiment.task.inputs]
    start = time.perf_counter()
    measured = cf.profile_kernels(experiment.model, *inputs, ratio=ratio, paths=paths, train=False)
    return measured, time.perf_counter() - start


def measure(
    experiment: Experiment, ratio: float, min_speedup: float, rounds: int, steps: int
) -> tuple[list[dict[str, Any]], list[str]]:
    kernels, rule = experiment.kernels, cf.RankRatio(ratio)
    everything = cf.make_plan(kernels, rank_rule=rule)
    layers, seconds = profile(experiment, list(everything.ranks), ratio)
    keep = [cf.Rule(path, keep=True) for path in everything.kept if path in kernels]
    fast = cf.make_plan(kernels, rank_rule=rule, rules=keep, profile=layers, min_speedup=min_speedup)
    plans = {"every layer": everything}
    if fast.ranks and fast.ranks != everything.ranks:
        plans[f"stacks >= {min_speedup:g}x"] = fast
    runners = {name: Runner(experiment, experiment.phase(plan)) for name, plan in plans.items()}
    runners["nothing"] = Runner(experiment, experiment.phase())
    # One number of each round.
    step_times: dict[str, list[float]] = {name: [] for name in runners}
    predictions: dict[str, list[float]] = {name: [] for name in plans}
    for number in range(rounds):
        if number:
            layers, _ = profile(experiment, list(everything.ranks), ratio)
        times = [[runner.repeat(1) for runner in runners.values()] for _ in range(steps)]
        for name, column in zip(runners, zip(*times, strict=True), strict=True):
            step_times[name].append(statistics.median(column))
        for name, plan in plans.items():
            saved = (
                layers.seconds(path)[0] - layers.predicted_seconds(path, rank)
                for path, rank in plan.ranks.items()
            )
            full = step_times["nothing"][-1]
            predictions[name].append(full / (full - sum(saved)))
    full = statistics.median(step_times["nothing"])
    rows: list[dict[str, Any]] = [{"factorized": "nothing", "layers": 0, "ms/step": 1e3 * full}]
    epoch = full * experiment.train.steps_per_epoch
    notes = [layers.report(), f"profiling took {seconds:.1f} s, a full-rank epoch takes {epoch:.1f} s"]
    for name, plan in plans.items():
        speedups = [a / b for a, b in zip(step_times["nothing"], step_times[name], strict=True)]
        errors = [100 * (a / b - 1) for a, b in zip(speedups, predictions[name], strict=True)]
        rows.append(
            {
                "factorized": name,
                "layers": len(plan.ranks),
                "ms/step": 1e3 * statistics.median(step_times[name]),
                "speed-up": statistics.median(speedups),
                "predicted": statistics.median(predictions[name]),
                "measured - predicted, %": statistics.median(errors),
            }
        )
        spread = ", ".join(f"{error:.1f}" for error in sorted(errors))
        notes.append(f"{name}: differences of the rounds, %: {spread}")
    return rows, notes


def main(_: list[str]) -> None:
    config = _CONFIG.value
    rows, notes = measure(
        Experiment.from_config(config), _RATIO.value, _MIN_SPEEDUP.value, _ROUNDS.value, _STEPS.value
    )
    about = f"{config.name}, width {config.model.width}, batch {config.batch_size}, ratio {_RATIO.value}"
    report(rows, _JSON.value, notes=[about, *notes])


if __name__ == "__main__":
    app.run(main)
