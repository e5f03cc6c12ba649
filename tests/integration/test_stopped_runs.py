"""A run that is told to stop does so between two steps, and goes on with the numbers of an unbroken one."""

import itertools
import json
import signal
from pathlib import Path

import pytest

from cuttlefish_jax.training import loop
from cuttlefish_jax.training.checkpoint import Checkpointer
from cuttlefish_jax.training.preemption import Notice, Preempted

pytestmark = pytest.mark.slow
TIMES = {"seconds", "examples_per_second", "rank_seconds"}
# An epoch of these runs looks for a notice before it, after the switch, after each step but the last, and
# before each batch of the evaluations of 120 and of 360 examples.
STEPS, BATCHES = 8, 8 + 23


@pytest.fixture
def config(tiny_config):
    """Checkpoints are rare, so that they do not hide what a stop forgets."""
    data = {"train_examples": 128, "validation_examples": 120}
    return tiny_config(
        **{f"data.{key}": value for key, value in data.items()},
        **{"optimizer.ema": 0.9, "switch.recalibration_batches": 2, "checkpoint.every_epochs": 3},
    )


def numbers(workdir: Path):
    summary = json.loads((workdir / "summary.json").read_text())
    return [
        {key: value for key, value in json.loads(line).items() if key not in TIMES}
        for name in ("metrics.jsonl", "ranks.jsonl")
        for line in (workdir / name).read_text().splitlines()
    ] + [{key: value for key, value in summary.items() if "second" not in key}]


@pytest.fixture
def stop_at(monkeypatch):
    """A function that sets at which look for a notice there is one."""

    def set_look(look):
        looks = itertools.count()

        def is_here(self):
            if next(looks) >= look:
                self._number = signal.SIGTERM
            return self._number is not None

        monkeypatch.setattr(Notice, "is_here", is_here)

    yield set_look


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("unbroken")


@pytest.fixture
def unbroken(shared, config):
    """The workdir of a run that nothing happened to, the same for all tests."""
    loop.run(config, shared)
    return shared


def test_stopped_anywhere_it_goes_on_from_that_very_step(config, unbroken, tmp_path, stop_at, capsys):
    def stopped(look):
        stop_at(look)
        with pytest.raises(Preempted) as caught:
            loop.run(config, tmp_path / "broken")
        assert caught.value.status == 143
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "stopped by" in line]
        return line.removeprefix("stopped by SIGTERM after ").partition(":")[0]

    # Before the first step; within an epoch; in that one again, while it is evaluated.
    assert stopped(0) == "epoch 0 of 4"
    assert stopped(3) == f"epoch 0 of 4, 3 of {STEPS} steps of the next"
    assert stopped(1 + 4 + 3) == f"epoch 0 of 4, {STEPS} of {STEPS} steps of the next"
    # The same in the second epoch, the last full-rank one: the process that goes on makes no such step.
    assert stopped(1 + BATCHES + STEPS + 3) == f"epoch 1 of 4, {STEPS} of {STEPS} steps of the next"
    # Over its end, which has no checkpoint, to the switch and past it.
    assert stopped(1 + BATCHES + 1) == "epoch 2 of 4"
    assert stopped(1 + 5) == f"epoch 2 of 4, 6 of {STEPS} steps of the next"

    stop_at(10**9)
    summary = loop.run(config, tmp_path / "broken")
    assert (
        f"going on after epoch 2 of 4, 6 of {STEPS} steps of the next (low_rank)" in capsys.readouterr().out
    )
    assert numbers(tmp_path / "broken") == numbers(unbroken)
    assert summary["steps"] == 4 * STEPS
    # Every second of a step is in its epoch's line, however often that was stopped.
    lines = [json.loads(line) for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()]
    assert summary["train_seconds"] == pytest.approx(sum(line["seconds"] for line in lines))
    assert summary["rank_seconds"] >= sum(line["rank_seconds"] for line in lines)
    assert summary["examples_per_second_full"] * sum(
        line["seconds"] for line in lines if line["phase"] == "full_rank"
    ) == pytest.approx(2 * STEPS * config.batch_size)


def test_checkpoints_within_an_epoch_change_no_number(config, unbroken, tmp_path, monkeypatch):
    config.checkpoint.every_steps = 3
    saved = []
    save = Checkpointer.save

    def killed_after_the_save_in_epoch_2(self, step, arrays, record):
        save(self, step, arrays, record)
        if self.directory.name == "checkpoints":
            saved.append((step, record["totals"]["steps"]))
            if saved[-1] == (1, 6):
                raise KeyboardInterrupt

    monkeypatch.setattr(Checkpointer, "save", killed_after_the_save_in_epoch_2)
    with pytest.raises(KeyboardInterrupt):
        loop.run(config, tmp_path / "broken")
    assert saved == [(0, 3), (0, 6), (1, 3), (1, 6)]
    loop.run(config, tmp_path / "broken")
    assert saved[4:] == [(2, 3), (2, 6), (3, 0), (3, 3), (3, 6), (4, 0)]
    assert numbers(tmp_path / "broken") == numbers(unbroken)
