"""How long training stands still at the switch: programs compiled there, compiled ahead, or cached.

    python benchmarks/switch_stall.py [--config configs/resnet18.py:digits] [--rounds 3] [--json FILE]
        [-- --config.model.width=16 ...]

Runs train.py a few epochs through the switch, every run a process of its own: ``there`` with
``switch.compile_ahead=False`` and no compilation cache, ``ahead`` as is, without a cache, and ``cached``
with a cache that another run has filled and nothing compiled ahead. The stall is from the decision to switch
to the first low-rank step: the plan, the factorization, carrying the optimizer, and whatever has to be
compiled or waited for. Ranks are at a quarter.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import report

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "epochs": 5,
    "schedule.warmup_epochs": 1.0,
    "switch.criterion": "at_epoch",
    "switch.epoch": 3,
    "plan.rank_rule": "rank_ratio",
    "profile.enabled": False,
    "evaluation.every_epochs": 2,
    "checkpoint.every_epochs": 5,
}
WAYS = {
    "there": ({"switch.compile_ahead": False}, False),
    "ahead": ({}, False),
    "cached": ({"switch.compile_ahead": False}, True),
}


def train(config: str, way: str, more: list[str], cache: Path, workdir: Path) -> dict[str, Any]:
    """The summary of a run, and the seconds of its full-rank steps."""
    changes, is_cached = WAYS[way]
    settings = [f"--config.{key}={value}" for key, value in (SETTINGS | changes).items()]
    command = [sys.executable, "train.py", f"--config={config}", *settings, *more, f"--workdir={workdir}"]
    command.append(f"--compilation_cache={cache if is_cached else ''}")
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    summary = json.loads((workdir / "summary.json").read_text())
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    batch = json.loads((workdir / "config.json").read_text())["batch_size"]
    # The first epoch warms up.
    full = [batch / line["examples_per_second"] for line in lines[1:] if line["phase"] == "full_rank"]
    return summary | {"step": statistics.median(full)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/resnet18.py:digits")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write the table to this file too")
    parser.add_argument("settings", nargs="*", help="settings of the configuration, after --")
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        places = Path(folder)
        train(arguments.config, "cached", arguments.settings, places / "cache", places / "fills")
        for number in range(arguments.rounds):
            for way, found in runs.items():
                workdir = places / f"{way}{number}"
                found.append(train(arguments.config, way, arguments.settings, places / "cache", workdir))
    rows = []
    for way, found in runs.items():
        stalls = [run["switch_stall_seconds"] for run in found]
        steps = [run["switch_stall_seconds"] / run["step"] for run in found]
        rows.append(
            {
                "compiled": way,
                "ms/step": 1e3 * statistics.median(run["step"] for run in found),
                "stall s": statistics.median(stalls),
                "stall in steps": statistics.median(steps),
                "least-most": f"{min(steps):.1f}-{max(steps):.1f}",
                "compiled there s": statistics.median(
                    run["switch_stall_seconds"] - run["switch_seconds"] for run in found
                ),
                "in the background s": statistics.median(run["compile_seconds_background"] for run in found),
                "ranks % of training": 100
                * statistics.median(run["rank_seconds"] / run["train_seconds"] for run in found),
            }
        )
    report(rows, arguments.json)
