"""What the benchmarks share: train.py's step to be timed, the table, and the line that says where it was."""

from __future__ import annotations

import datetime
import itertools
import json
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import jax

# The configurations, which import each other, are not installed with the package.
sys.path.insert(0, str(Path(__file__).parents[1]))

from cuttlefish_jax.training.epoch import train_epoch
from cuttlefish_jax.training.experiment import Experiment, Phase


class Runner:
    """The train step of one phase of an experiment, compiled, with its state and its input."""

    def __init__(self, experiment: Experiment, phase: Phase):
        self.data, self.step = experiment.train, phase.train_step
        self.state = experiment.create_state(phase)
        self.batches, self.epochs = self._endless(), 0
        self.batch = next(self.batches)
        self.run(itertools.repeat(self.batch), 2)  # compiles, and warms up

    def _endless(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(self.data.epoch(epoch) for epoch in itertools.count())

    def run(self, batches: Iterator[Any], steps: int) -> tuple[float, float]:
        """Seconds that so many steps take, and how many of them are spent in the call for a batch."""
        blocked, metrics, start = 0.0, None, time.perf_counter()
        for _ in range(steps):
            asked = time.perf_counter()
            batch = next(batches)
            blocked += time.perf_counter() - asked
            self.state, metrics = self.step(self.state, self.data.resident, batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - start, blocked

    def repeat(self, steps: int) -> float:
        """Seconds that so many steps on one and the same batch take."""
        return self.run(itertools.repeat(self.batch), steps)[0]

    def epoch(self) -> float:
        """Seconds that the next epoch of the training loop takes."""
        start = time.perf_counter()
        self.state, _ = train_epoch(self.step, self.state, self.data, self.epochs)
        self.epochs += 1
        return time.perf_counter() - start


def environment() -> dict[str, Any]:
    """Device, versions and date of this measurement."""
    devices = jax.devices()
    return {
        "device": f"{len(devices)} x {devices[0].device_kind} on {platform.machine()}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "date": datetime.date.today().isoformat(),
    }


def report(
    rows: Sequence[Mapping[str, Any]], json_file: str | None = None, *, notes: Sequence[str] = ()
) -> None:
    """Prints the rows as a table, the environment above and the notes below it; the same to a JSON file."""
    where = environment()
    print(", ".join(f"{name} {value}" for name, value in where.items()), end="\n\n")
    header = list(dict.fromkeys(key for row in rows for key in row))
    cells = [header, *([_show(row.get(key)) for key in header] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    cells.insert(1, ["-" * width for width in widths])
    for line in cells:
        shown = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        print("  ".join(shown).rstrip())
    for note in notes:
        print(f"\n{note}")
    if json_file:
        contents = {"command": _command(), "environment": where, "rows": list(rows), "notes": list(notes)}
        Path(json_file).write_text(json.dumps(contents, indent=1) + "\n")


def _command() -> str:
    """How to run this again: the command line, but for where it writes."""
    script, *arguments = sys.argv
    words = ["python", str(Path(script).resolve().relative_to(Path(__file__).resolve().parents[1]))]
    kept = iter(arguments)
    for word in kept:
        name, is_joined, _ = word.partition("=")
        if name not in ("--json", "--out", "--picture"):
            words.append(word)
        elif not is_joined:
            next(kept, None)
    return shlex.join(words)


def _show(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
