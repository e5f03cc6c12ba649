"""Methods side by side: the same configuration under each, several seeds, every run a process of train.py.

    python benchmarks/methods.py --config configs/quickstart.py --seeds 3 [--out runs/methods]
        [--json FILE] [-- --config.epochs=20 ...]

Runs that are finished in --out are not run again. What follows ``--`` goes to every run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import report

ROOT = Path(__file__).parents[1]


def run(options: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    workdir = Path(options.out).absolute() / f"{method}-{seed}"
    settings = [f"--config={options.config}", f"--config.method={method}", f"--config.seed={seed}"]
    subprocess.run(
        [sys.executable, "train.py", *settings, f"--workdir={workdir}", *options.settings],
        cwd=ROOT,
        check=True,
        stdout=sys.stderr,
    )
    return json.loads((workdir / "summary.json").read_text())


def row(method: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    accuracies = [100 * summary["test_accuracy"] for summary in runs]
    mean = {
        key: statistics.mean(summary[key] for summary in runs)
        for key in ("params_final", "flops_final", "train_seconds", "rank_seconds")
    }
    switches = [summary["switch_epoch"] for summary in runs]
    return {
        "method": method,
        "test accuracy %": f"{statistics.mean(accuracies):.2f}",
        "lowest-highest": f"{min(accuracies):.2f}-{max(accuracies):.2f}",
        "params": round(mean["params_final"]),
        "params x fewer": f"{runs[0]['params_full'] / mean['params_final']:.2f}",
        "FLOPs x fewer": f"{runs[0]['flops_full'] / mean['flops_final']:.2f}",
        "switch epochs": "-" if None in switches else " ".join(map(str, switches)),
        "train s": f"{mean['train_seconds']:.1f}",
        "measuring ranks %": f"{100 * mean['rank_seconds'] / mean['train_seconds']:.2f}",
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--methods", nargs="+", default=["full_rank", "cuttlefish"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", default="runs/methods")
    parser.add_argument("--json", help="write the table to this file too")
    parser.add_argument("settings", nargs="*", help="for train.py, after --")
    arguments = parser.parse_args()
    summaries: dict[str, list[dict[str, Any]]] = {method: [] for method in arguments.methods}
    for seed in range(arguments.seeds):
        for method, runs in summaries.items():  # alternating, so that a slow hour falls on all of them
            runs.append(run(arguments, method, seed))
    report([row(method, runs) for method, runs in summaries.items()], arguments.json)
