"""Real processes of train.py, killed (-9) at any point, end with the very numbers of an unbroken run."""

import random
import time

import pytest
from harness import Trainer, environment, kill_at_random, numbers


@pytest.fixture
def trainers(tmp_path):
    """An unbroken run, finished, and one that is to be broken."""
    cache = tmp_path / "cache"
    env = environment(cache)
    unbroken, broken = Trainer(tmp_path / "unbroken", env), Trainer(tmp_path / "broken", env)
    done = unbroken.finish()
    assert done.returncode == 0, done.stderr
    assert any(cache.iterdir()), "the cache of the environment was not used"
    return unbroken, broken


@pytest.mark.slow
def test_killed_before_during_and_after_the_switch(trainers):
    unbroken, broken = trainers
    for line in ("epoch 2/6", "Switching to low rank", "epoch 5/6"):
        assert broken.signal_when(lambda said, line=line: said.startswith(line)) == -9
    done = broken.finish()
    assert done.returncode == 0, done.stderr
    assert "going on after epoch" in done.stdout
    assert numbers(broken.workdir) == numbers(unbroken.workdir)


@pytest.mark.slow
def test_killed_at_an_arbitrary_moment_and_damaged(trainers):
    """A kill between the lines, and the last checkpoint damaged: the one before it is gone on with."""
    unbroken, broken = trainers

    def soon_after_epoch_4(line):
        if line.startswith("epoch 4/6"):
            time.sleep(0.3)
            return True
        return False

    assert broken.signal_when(soon_after_epoch_4) == -9
    checkpoints = broken.workdir / "checkpoints"
    latest = max(
        (path for path in checkpoints.iterdir() if path.name.isdigit()), key=lambda path: int(path.name)
    )
    data = max((path for path in latest.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    contents = bytearray(data.read_bytes())
    contents[len(contents) // 2] ^= 0xFF
    data.write_bytes(contents)

    done = broken.finish()
    assert done.returncode == 0, done.stderr
    assert f"passing over a damaged checkpoint, {checkpoints}/{latest.name}" in done.stderr
    assert numbers(broken.workdir) == numbers(unbroken.workdir)


@pytest.mark.large
def test_killed_at_random_moments(trainers):
    unbroken, broken = trainers
    start = time.perf_counter()
    assert Trainer(broken.workdir.with_name("timed"), broken.environment).finish().returncode == 0
    assert kill_at_random(broken, time.perf_counter() - start, 5, random.Random(0))
    assert numbers(broken.workdir) == numbers(unbroken.workdir)


@pytest.mark.slow
def test_the_command_line_refuses_in_one_line(tmp_path):
    trainer = Trainer(tmp_path / "run", environment(tmp_path / "cache"))

    def refused(*more):
        done = trainer.finish(*more)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        return line

    assert 'Did you mean "width"' in refused("--config.model.widht=3")
    assert "digitz" in refused("--config.data.name=digitz")
    assert "batch_size 63 cannot be shared evenly by 2 devices" in refused("--config.batch_size=63")
    assert "unexpected arguments again" in refused("again")
    assert "No such file or directory: 'configs/quickstat.py'" in refused("--config=configs/quickstat.py")
