"""Real processes of train.py, stopped at any point, end with the very numbers of an unbroken run."""

import random
import signal

import pytest
from faults import (
    DAMAGES,
    STOPS,
    flipped,
    killed_anywhere,
    killed_in_the_switch,
    killed_in_training,
    killed_while_saving,
)
from harness import inject, shuffled
from trainer import Trainer, environment


@pytest.mark.slow
def test_a_run_that_much_happens_to(unbroken, broken):
    rng = random.Random(0)
    assert killed_in_training(broken, rng)

    # A second run in the workdir is refused; the lock goes with the first one, even if that is killed.
    with broken.start() as process:
        assert any(line.startswith("epoch ") for line in process.stdout)
        process.send_signal(signal.SIGSTOP)
        second = broken.finish()
        process.kill()
    assert second.returncode == 2
    (line,) = [line for line in second.stderr.splitlines() if line.startswith("error: ")]
    assert f"another run is working in {broken.workdir} (process {process.pid} on " in line

    assert killed_while_saving(broken, rng)
    assert killed_in_the_switch(broken, rng)
    status, said = broken.stop_at("epoch 4/7", signal.SIGTERM)
    assert status == 143
    (line,) = [line for line in said.splitlines() if "SIGTERM" in line]
    assert line.startswith("stopped by SIGTERM after epoch ")
    assert line.endswith(": saved, and the same command goes on from there")

    assert flipped(broken, rng)
    done = broken.finish()
    assert done.returncode == 0, done.stderr
    assert "passing over a damaged checkpoint" in done.stderr
    assert "going on after epoch" in done.stdout
    assert broken.numbers() == unbroken.numbers()


@pytest.mark.large
def test_killed_at_30_random_moments(unbroken, tmp_path):
    rng, kills = random.Random(0), 0
    while kills < 30:
        broken = Trainer(tmp_path / f"broken {kills}", unbroken.environment)
        kills += len(inject(broken, shuffled([killed_anywhere], rng), 5, rng))
        assert broken.numbers() == unbroken.numbers()


@pytest.mark.large
def test_faults_of_every_kind(unbroken, tmp_path):
    rng, done = random.Random(1), set()
    kinds = shuffled([*STOPS, *DAMAGES], rng)
    for run in range(100):
        broken = Trainer(tmp_path / f"broken {run}", unbroken.environment)
        done.update(inject(broken, kinds, 5, rng))
        assert broken.numbers() == unbroken.numbers()
        if done == {*STOPS, *DAMAGES}:
            return
    raise AssertionError(f"only {done} in 100 runs")


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
