"""Things that happen to runs. Each is a function of a trainer and a random generator: was there a fault?"""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from trainer import Trainer

Fault = Callable[[Trainer, random.Random], bool]


def killed_anywhere(run: Trainer, rng: random.Random) -> bool:
    """SIGKILL at a random moment, from the start of the process on."""
    end = time.monotonic() + rng.uniform(0, 6)
    return run.kill_when(lambda: time.monotonic() >= end)


def killed_in_training(run: Trainer, rng: random.Random) -> bool:
    """SIGKILL at a random step, behind the first epoch of the process."""
    return run.stop_at("epoch ", after=rng.uniform(0, 0.2))[0] is not None


def killed_while_saving(run: Trainer, rng: random.Random) -> bool:
    """SIGKILL while the next checkpoint is being written."""
    before = _unfinished(run.checkpoints)
    time.sleep(0.01 * rng.random())
    return run.kill_when(lambda: bool(_unfinished(run.checkpoints) - before))


def killed_in_the_switch(run: Trainer, rng: random.Random) -> bool:
    """SIGKILL between the plan and the first step of the low-rank phase."""
    return run.stop_at("Switching to low rank", after=rng.uniform(0, 0.1))[0] is not None


def preempted(run: Trainer, rng: random.Random) -> bool:
    """SIGTERM at a random step."""
    status, said = run.stop_at("epoch ", signal.SIGTERM, after=rng.uniform(0, 0.2))
    if status in (None, 0):
        return False  # it came after the last step
    assert status == 143 and "stopped by SIGTERM after epoch" in said, (status, said)
    return True


def interrupted(run: Trainer, rng: random.Random) -> bool:
    """Ctrl-C at a random step."""
    status, said = run.stop_at("epoch ", signal.SIGINT, after=rng.uniform(0, 0.2))
    if status in (None, 0):
        return False
    assert status == 130 and "stopped by SIGINT after epoch" in said, (status, said)
    return True


def flipped(run: Trainer, rng: random.Random) -> bool:
    """SIGKILL, then one bit of an array of the last checkpoint flipped."""
    if (latest := _latest_of_killed(run, rng)) is None:
        return False
    file = rng.choice(sorted(latest.glob("arrays/*/[0-9]*")))
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return True


def truncated(run: Trainer, rng: random.Random) -> bool:
    """SIGKILL, then a file of the last checkpoint cut off."""
    if (latest := _latest_of_killed(run, rng)) is None:
        return False
    file = rng.choice([path for path in _files(latest) if path.stat().st_size])
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])
    return True


def half_deleted(run: Trainer, rng: random.Random) -> bool:
    """SIGKILL, then a random half of the last checkpoint's files deleted."""
    if (latest := _latest_of_killed(run, rng)) is None:
        return False
    files = _files(latest)
    for file in rng.sample(files, len(files) // 2):
        file.unlink()
    return True


def deleted(run: Trainer, rng: random.Random) -> bool:
    """SIGKILL, then the last checkpoint deleted."""
    if (latest := _latest_of_killed(run, rng)) is None:
        return False
    shutil.rmtree(latest)
    return True


STOPS: tuple[Fault, ...] = (
    killed_anywhere,
    killed_in_training,
    killed_while_saving,
    killed_in_the_switch,
    preempted,
    interrupted,
)
DAMAGES: tuple[Fault, ...] = (flipped, truncated, half_deleted, deleted)


def _latest_of_killed(run: Trainer, rng: random.Random) -> Path | None:
    """The last checkpoint of the run, killed when there is another to go on from; None if it ended before."""
    was_killed = killed_in_training(run, rng)
    if was_killed and len(_checkpoints(run)) < 2:
        was_killed = run.kill_when(lambda: len(_checkpoints(run)) >= 2)
    return _checkpoints(run)[-1] if was_killed else None


def _checkpoints(run: Trainer) -> list[Path]:
    """Those that were finished, the last one last."""
    found = run.checkpoints.iterdir() if run.checkpoints.exists() else ()
    return sorted((path for path in found if path.name.isdigit()), key=lambda path: int(path.name))


def _files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def _unfinished(checkpoints: Path) -> set[int]:
    """Inodes of the directories of saves under way: names come again."""
    try:
        return {path.stat().st_ino for path in checkpoints.iterdir() if "tmp" in path.name}
    except FileNotFoundError:  # no folder yet, or the save was just finished
        return set()
