"""Step time, full-rank against factorized: how much of the saved FLOPs arrives as saved time.

    python benchmarks/step_time.py [--width 64] [--ratio 0.25] [--batch 64] [--json FILE]

Takes the train step of ResNet-18 that train.py runs, full-rank and with stages 2 to 4 factorized at a fixed
ratio, and runs the two alternately in one process. FLOPs are XLA's count of the compiled step. A third figure
is what the training loop adds: an epoch of train.py's loop against its compiled steps alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import jax
from common import report

import cuttlefish_jax as cf
from cuttlefish_jax.training.config import default_config
from cuttlefish_jax.training.epoch import train_epoch
from cuttlefish_jax.training.experiment import Experiment, Phase


class Runner:
    """One network's compiled step and its state."""

    def __init__(self, experiment: Experiment, phase: Phase):
        self.data, self.step = experiment.train, phase.train_step
        self.state = experiment.create_state(phase)
        self.batch = next(iter(self.data.epoch(0)))
        self.run(2)  # compiles, and warms up

    def run(self, steps: int) -> float:
        """Seconds that so many steps on one batch take."""
        start, metrics = time.perf_counter(), None
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.data.resident, self.batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - start

    def epoch(self) -> float:
        """Seconds that one epoch of the training loop takes."""
        start = time.perf_counter()
        self.state, _ = train_epoch(self.step, self.state, self.data, 0)
        return time.perf_counter() - start


def measure(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    config = default_config()
    config.epochs = 2
    config.batch_size = options.batch
    config.model.width = options.width
    config.data.name = "digits"
    config.data.train_examples = 10 * options.batch
    experiment = Experiment.from_config(config)
    ranks = {
        path: max(1, int(kernel.max_rank * options.ratio))
        for path, kernel in experiment.kernels.items()
        if path.startswith(("stage2", "stage3", "stage4")) and not kernel.is_pointwise
    }
    plan = cf.FactorizationPlan.from_ranks(experiment.kernels, ranks)
    runners = {
        "full": Runner(experiment, experiment.phase()),
        "factorized": Runner(experiment, experiment.phase(plan)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    overheads = []
    for _ in range(options.repeats):
        for name, runner in runners.items():
            seconds[name].append(runner.run(2) / 2)
        steps = runners["factorized"].data.steps_per_epoch
        alone, looped = runners["factorized"].run(steps), runners["factorized"].epoch()
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
    notes = [
        f"{100 * share:.0f} % of the FLOP saving arrives as time",
        f"the training loop adds {100 * statistics.median(overheads):.1f} % to its compiled steps",
    ]
    return rows, notes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage")
    parser.add_argument("--ratio", type=float, default=0.25, help="rank as a share of min(m, n)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write the table to this file too")
    arguments = parser.parse_args()
    table, remarks = measure(arguments)
    report(table, arguments.json, notes=remarks)
