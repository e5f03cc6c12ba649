"""Injects faults into real processes of train.py, and says what became of the runs.

    python tests/faults/harness.py [--kills 30] [--seed 0] [--json FILE]

Trains one small network without a fault, then with kills at random moments until it is finished, and compares
every number that the two runs left. The tests of this folder are made of the same parts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "model.width": 8,
    "model.stage_sizes": "(1,1)",
    "epochs": 6,
    "data.train_examples": 640,
    "schedule.warmup_epochs": 1.0,
    "switch.criterion": "at_epoch",
    "switch.epoch": 3,
    "plan.keep": "()",
    "optimizer.ema": 0.9,
}
# What differs between two runs of the same numbers.
_TIMED = {"seconds", "examples_per_second", "rank_seconds"}


def environment(cache: Path, *, devices: int = 2) -> dict[str, str]:
    """Of a process with so many devices; the programs are compiled once for all that share ``cache``."""
    return os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONUNBUFFERED": "1",
    }


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Starts processes of train.py in one workdir.

    Attributes:
      workdir: the run's.
      environment: of the processes.
      settings: of the run, ``{"model.width": 8}``.
    """

    workdir: Path
    environment: Mapping[str, str]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=lambda: SETTINGS)

    def command(self, *more: str) -> list[str]:
        """The command line."""
        settings = [f"--config.{key}={value}" for key, value in self.settings.items()]
        config = "--config=configs/quickstart.py"
        return [sys.executable, "train.py", config, *settings, f"--workdir={self.workdir}", *more]

    def finish(self, *more: str) -> subprocess.CompletedProcess[str]:
        """Runs to the end of the process, whatever that is."""
        return subprocess.run(
            self.command(*more), cwd=ROOT, env=self.environment, capture_output=True, text=True
        )

    def start(self) -> subprocess.Popen[str]:
        """A process whose output, errors included, can be read line by line."""
        return subprocess.Popen(
            self.command(),
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def signal_when(self, is_time: Callable[[str], bool], number: int = signal.SIGKILL) -> int:
        """Sends a signal once a line of the output says so; the exit status.

        Raises:
          AssertionError: if the run ends before.
        """
        with self.start() as process:
            assert process.stdout is not None
            for line in process.stdout:
                if is_time(line):
                    process.send_signal(number)
                    break
            else:
                raise AssertionError("the run ended before it was to be stopped")
            process.stdout.read()
        return process.returncode

    def kill_after(self, seconds: float) -> bool:
        """Kills a process so many seconds after its start; whether it was still running then."""
        with self.start() as process:
            try:
                process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                return True
        assert process.returncode == 0
        return False


def numbers(workdir: Path) -> dict[str, Any]:
    """Everything that a run wrote, but for times."""
    written: dict[str, Any] = {
        name: [
            {key: value for key, value in json.loads(line).items() if key not in _TIMED}
            for line in (workdir / name).read_text().splitlines()
        ]
        for name in ("metrics.jsonl", "ranks.jsonl")
    }
    summary = json.loads((workdir / "summary.json").read_text())
    written["summary"] = {key: value for key, value in summary.items() if "second" not in key}
    written["plan"] = (workdir / "plan.json").read_text()
    return written


def kill_at_random(broken: Trainer, seconds: float, kills: int, rng: random.Random) -> list[float]:
    """Kills a run at random moments, then lets it come to its end.

    Args:
      broken: the run.
      seconds: what an unbroken process takes; a process is killed within that time.
      kills: how many; fewer if the run comes to its end before.
      rng: chooses the moments.

    Returns:
      Seconds after the start of a process, for every kill.
    """
    moments = []
    while len(moments) < kills:
        moment = rng.uniform(0, seconds)
        if not broken.kill_after(moment):
            break
        moments.append(moment)
    done = broken.finish()
    assert done.returncode == 0, done.stderr
    return moments


def _main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", help="write the outcome to this file too")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    left, rows = arguments.kills, []
    with tempfile.TemporaryDirectory() as folder:
        env = environment(Path(folder) / "cache")
        unbroken = Trainer(Path(folder) / "unbroken", env)
        assert unbroken.finish().returncode == 0
        # Once more, with everything compiled: that is how long the others take.
        start = time.perf_counter()
        assert Trainer(Path(folder) / "again", env).finish().returncode == 0
        seconds = time.perf_counter() - start
        while left > 0:
            broken = Trainer(Path(folder) / f"broken{len(rows)}", env)
            moments = kill_at_random(broken, seconds, min(left, 5), rng)
            left -= len(moments)
            same = numbers(broken.workdir) == numbers(unbroken.workdir)
            outcome = "the numbers of an unbroken run" if same else "OTHER NUMBERS"
            rows.append({"kills after, s": " ".join(f"{m:.1f}" for m in moments), "outcome": outcome})
            print(f"run {len(rows)}: {rows[-1]}", flush=True)
    same = sum(row["outcome"].startswith("the") for row in rows)
    print(
        f"{arguments.kills - left} kills of {len(rows)} runs; {same} of these ended with the numbers "
        "of an unbroken one"
    )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(same != len(rows))


if __name__ == "__main__":
    _main()
