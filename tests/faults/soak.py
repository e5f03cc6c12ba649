"""Watches one long run of train.py: does it grow?

    python tests/faults/soak.py [--epochs 300] [--json FILE] [-- --config.key=value ...]

Trains the quickstart, made smaller, for so many epochs, through the switch, and looks at the process after
every epoch: resident memory, open files, threads, and the bytes in the workdir. Prints a row for some of the
epochs. For Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from trainer import ROOT, Trainer, environment

SETTINGS = {
    "model.width": 8,
    "model.stage_sizes": "(1,1)",
    "data.train_examples": 320,
    "data.validation_examples": 64,
    "plan.keep": "()",
    "optimizer.ema": 0.9,
}
# What a phase needs is there after its first epochs; growth is counted from then on.
SETTLED = 20


def sample(process: subprocess.Popen[str], workdir: Path) -> dict[str, Any]:
    """How large a process and its workdir are."""
    proc = Path("/proc") / str(process.pid)
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    logs = {name: (workdir / f"{name}.jsonl").stat().st_size for name in ("metrics", "ranks")}
    return {
        "RSS MiB": round(int(status["VmRSS"].split()[0]) / 1024, 1),
        "open files": len(os.listdir(proc / "fd")),
        "threads": int(status["Threads"]),
        "workdir KiB": round(_size(workdir) / 1024, 1),
        "metrics.jsonl B": logs["metrics"],
        "ranks.jsonl B": logs["ranks"],
        "checkpoint record B": _size(workdir / "checkpoints", "record/metadata"),
    }


def _size(folder: Path, suffix: str = "") -> int:
    """Bytes in a folder, or of the largest file of such a name; what is just being replaced counts 0."""
    sizes = [0]
    for parent, _, names in os.walk(folder):  # which passes over folders that have gone
        for path in (os.path.join(parent, name) for name in names):
            with contextlib.suppress(FileNotFoundError):
                sizes.append(os.stat(path).st_size if path.endswith(suffix) else 0)
    return max(sizes) if suffix else sum(sizes)


def _main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--json", help="write the outcome to this file too")
    parser.add_argument("more", nargs="*", help="of train.py")
    arguments = parser.parse_args()
    epochs = arguments.epochs
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = {**SETTINGS, "epochs": epochs, "switch.criterion": "at_epoch", "switch.epoch": epochs // 3}
        run = Trainer(Path(folder) / "run", environment(Path(folder) / "cache", devices=1), settings)
        with run.start(*arguments.more) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("epoch ") and len(samples) < epochs - 1:  # after the last one it ends
                    phase = "low rank" if "low rank" in line else "full rank"
                    samples.append(
                        {"epoch": len(samples) + 1, "phase": phase, **sample(process, run.workdir)}
                    )
        assert process.returncode == 0, process.returncode
    marks = {1, 2, 5, SETTLED, *range(epochs // 6, epochs, epochs // 6), epochs // 3 + SETTLED, epochs - 1}
    notes = []
    for phase in ("full rank", "low rank"):
        settled = [row for row in samples if row["phase"] == phase][SETTLED:]
        if len(settled) > 1:
            grown = {key: settled[-1][key] - settled[0][key] for key in ("RSS MiB", "open files", "threads")}
            where = f"from epoch {settled[0]['epoch']} to {settled[-1]['epoch']} ({phase})"
            notes.append(f"{where}: " + ", ".join(f"{key} {value:+.4g}" for key, value in grown.items()))
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from common import report

    report([row for row in samples if row["epoch"] in marks], arguments.json, notes=notes)


if __name__ == "__main__":
    _main()
