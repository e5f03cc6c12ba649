"""A run on a disk that is full, then read-only: refused in a line each time, and nothing saved is lost."""

import os
import re
import signal
import subprocess

import pytest
from trainer import Trainer, contents

SMALL_DISK = "3m"  # the size of the fixture of that name


@pytest.mark.slow
def test_a_disk_that_is_full_and_then_read_only(unbroken, small_disk):
    run = Trainer(small_disk / "run", unbroken.environment)
    ballast = small_disk / "ballast"
    with run.start() as process:
        assert any(line.startswith("epoch 2/7") for line in process.stdout)
        process.send_signal(signal.SIGSTOP)
        space = os.statvfs(small_disk)
        ballast.write_bytes(bytes(space.f_bavail * space.f_bsize))
        before = contents(run.workdir)
        process.send_signal(signal.SIGCONT)
        said = process.stdout.read()
    assert process.returncode == 2, said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "no space left on the disk" in line and "the same command goes on from there" in line
    assert_nothing_lost(run, before)

    ballast.unlink()
    before = contents(run.workdir)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    refused = run.finish()
    assert refused.returncode == 2
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert str(run.workdir) in line and "permission denied" in line
    assert contents(run.workdir) == before

    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    done = run.finish()
    assert done.returncode == 0, done.stderr
    assert "going on after epoch" in done.stdout
    assert run.numbers() == unbroken.numbers()


def assert_nothing_lost(run, before):
    """Logs may have grown; the last checkpoint is as it was, and no other was begun over it."""
    after = contents(run.workdir)
    last = max(int(name.split("/")[1]) for name in before if re.match(r"checkpoints/\d+/", name))
    saved = [name for name in before if name.startswith(f"checkpoints/{last}/")]
    logs = ["metrics.jsonl", "ranks.jsonl"]
    assert len(saved) > 5
    for name in [*saved, *logs, "config.json"]:
        assert after[name].startswith(before[name]), name
        assert name in logs or after[name] == before[name]
