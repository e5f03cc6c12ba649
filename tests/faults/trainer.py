"""Real processes of train.py, which can be watched and stopped, and what they leave."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "model.width": 8,
    "model.stage_sizes": "(1,1)",
    "epochs": 7,
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

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.workdir / "checkpoints"

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.workdir / "summary.json").exists()

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

    def start(self, *more: str) -> subprocess.Popen[str]:
        """A process whose output, errors included, can be read line by line."""
        # A shell's background jobs ignore Ctrl-C, and their children with them; but a child does not inherit
        # a handler. (A function for the child to call would make Python fork, of which JAX's threads warn.)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return subprocess.Popen(
                self.command(*more),
                cwd=ROOT,
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        finally:
            signal.signal(signal.SIGINT, before)

    def stop_at(
        self, line: str, number: int = signal.SIGKILL, *, after: float = 0.0
    ) -> tuple[int | None, str]:
        """Sends a signal so many seconds after a line of the output began like that.

        Returns:
          The exit status, None if the run ended before the line came; and the rest of the output.
        """
        with self.start() as process:
            assert process.stdout is not None
            for said in process.stdout:
                if said.startswith(line):
                    time.sleep(after)
                    process.send_signal(number)
                    rest = process.stdout.read()
                    return process.wait(), rest
        assert process.returncode == 0, process.returncode
        return None, ""

    def kill_when(self, is_time: Callable[[], bool]) -> bool:
        """Kills a process as soon as that is true; False if the run ends before."""
        with self.start() as process:
            while process.poll() is None:
                if is_time():
                    process.kill()
                    process.communicate()
                    return True
                time.sleep(0.0002)
        assert process.returncode == 0, process.returncode
        return False

    def numbers(self) -> dict[str, Any]:
        """Everything that the run wrote, but for times."""
        written: dict[str, Any] = {
            name: [
                {key: value for key, value in json.loads(line).items() if key not in _TIMED}
                for line in (self.workdir / name).read_text().splitlines()
            ]
            for name in ("metrics.jsonl", "ranks.jsonl")
        }
        summary = json.loads((self.workdir / "summary.json").read_text())
        written["summary"] = {key: value for key, value in summary.items() if "second" not in key}
        written["plan"] = (self.workdir / "plan.json").read_text()
        return written


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
