"""Step time, full-rank against factorized: how much of the saved FLOPs arrives as saved time.

    python benchmarks/step_time.py --config.batch_size=64 [--config configs/resnet18.py:digits] [--ratio 0.25]
        [--json FILE]

Takes the train step that train.py runs, full-rank and with all layers but those of stage 1 factorized at a
fixed ratio, and runs the two alternately in one process. FLOPs are XLA's count of the compiled step. A third
figure is what the training loop adds: an epoch of train.py's loop against its compiled steps alone.
"""

from __future__ import annotations

import statistics
from typing import Any

from absl import app, flags
from common import Runner, report
from ml_collections import config_flags

import cuttlefish_jax as cf
from cuttlefish_jax.training.experiment import Experiment

_CONFIG = config_flags.DEFINE_config_file("config", "configs/resnet18.py:digits")
_RATIO = flags.DEFINE_float("ratio", 0.25, "rank as a share of min(m, n)", 0, 1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "rounds; the medians are reported", 1)
_JSON = flags.DEFINE_string("json", None, "write the table to this file too")


def measure(experiment: Experiment, ratio: float, repeats: int) -> tuple[list[dict[str, Any]], list[str]]:
    ranks = {
        path: max(1, int(kernel.max_rank * ratio))
        for path, kernel in experiment.kernels.items()
        if path.startswith("stage") and not path.startswith("stage1") and not kernel.is_pointwise
    }
    plan = cf.FactorizationPlan.from_ranks(experiment.kernels, ranks)
    runners = {
        "full": Runner(experiment, experiment.phase()),
        "factorized": Runner(experiment, experiment.phase(plan)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    overheads = []
    runners["factorized"].epoch()  # opens the input, which the next epochs find open
    for _ in range(repeats):
        for name, runner in runners.items():
            seconds[name].append(runner.repeat(2) / 2)
        steps = experiment.train.steps_per_epoch
        alone, looped = runners["factorized"].repeat(steps), runners["factorized"].epoch()
        overheads.append(looped / alone - 1)
    params = {"full": plan.num_params_full, "factorized": plan.num_params}
    rows: list[dict[str, Any]] = [
        {
            "network": name,
            "params": params[name],
            "GFLOP/step": runner.step.flops / 1e9,
            "ms/step": 1e3 * statistics.median(seconds[name]),
        }
        for name, runner in runners.items()
    ]
    ratios = {key: rows[0][key] / rows[1][key] for key in rows[0] if key != "network"}
    rows.append({"network": "ratio", **ratios})
    share = (1 - 1 / ratios["ms/step"]) / (1 - 1 / ratios["GFLOP/step"])
    spread = ", ".join(f"{100 * overhead:.1f}" for overhead in sorted(overheads))
    notes = [
        f"{100 * share:.0f} % of the FLOP saving arrives as time",
        f"the training loop adds {100 * statistics.median(overheads):.1f} % to its steps (of {spread})",
    ]
    return rows, notes


def main(_: list[str]) -> None:
    config = _CONFIG.value
    config.data.train_examples = 20 * config.batch_size
    rows, notes = measure(Experiment.from_config(config), _RATIO.value, _REPEATS.value)
    about = f"{config.name}, width {config.model.width}, batch {config.batch_size}, ratio {_RATIO.value}"
    report(rows, _JSON.value, notes=[about, *notes])


if __name__ == "__main__":
    app.run(main)
