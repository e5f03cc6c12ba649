"""Step time, full-rank against factorized: how much of the saved FLOPs arrives as saved time.

    python benchmarks/step_time.py [--width 64] [--ratio 0.25] [--batch 64] [--json FILE]

Compiles the train step of ResNet-18 (the one that train.py runs) full-rank and factorized at a fixed ratio, and
runs the two alternately in one process. FLOPs are XLA's own count of the compiled step.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import numpy as np

import cuttlefish_jax as cf
from benchmarks.common import environment, print_table, write_json
from configs.resnet18 import get_config
from cuttlefish_jax.training.experiment import Experiment


def measure(width: int, ratio: float, batch: int, repeats: int) -> list[dict[str, object]]:
    config = get_config("digits")
    config.model.width = width
    config.batch_size = batch
    config.epochs = 10
    experiment = Experiment.from_config(config)
    ranks = {
        path: max(1, int(kernel.max_rank * ratio))
        for path, kernel in experiment.kernels.items()
        if path.startswith(("stage2", "stage3", "stage4")) and not kernel.is_pointwise
    }
    plan = cf.FactorizationPlan.from_ranks(experiment.kernels, ranks)
    runs = {}
    for name, phase in (("full", experiment.phase()), ("factorized", experiment.phase(plan))):
        state = experiment.create_state(phase)
        first = next(iter(experiment.train.epoch(0)))
        runs[name] = [phase, state, first, []]
    for name, (phase, state, first, _) in runs.items():  # compile, and warm up
        runs[name][1], _ = phase.train_step(state, experiment.train.resident, first)
    for _ in range(repeats):
        for run in runs.values():
            phase, state, first, seconds = run
            start = time.perf_counter()
            run[1], metrics = phase.train_step(state, experiment.train.resident, first)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - start)
    rows = []
    for name, (phase, _, _, seconds) in runs.items():
        rows.append(
            {
                "network": name,
                "params": plan.num_params if phase.plan else plan.num_params_full,
                "GFLOP per step": phase.train_step.flops / 1e9,
                "ms per step": 1e3 * statistics.median(seconds),
            }
        )
    flops = rows[0]["GFLOP per step"] / rows[1]["GFLOP per step"]
    speedup = rows[0]["ms per step"] / rows[1]["ms per step"]
    share = (1 - 1 / speedup) / (1 - 1 / flops)
    rows.append({"network": "ratio", "params": rows[0]["params"] / rows[1]["params"], "GFLOP per step": flops, "ms per step": speedup})
    rows.append({"network": "share of the FLOP saving that arrives as time", "ms per step": share})
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage")
    parser.add_argument("--ratio", type=float, default=0.25, help="rank as a share of min(m, n)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", help="write the table to this file too")
    options = parser.parse_args()
    table = measure(options.width, options.ratio, options.batch, options.repeats)
    print(environment())
    print_table(table)
    write_json(options.json, table)
