"""Where a run goes on: with the best parameters that it knows of, and from no record that is another's."""

from types import SimpleNamespace

import pytest
from checkpoint_tools import assert_same_bits, damage, make_state, names, restore, rewrite_record

from configs import quickstart
from cuttlefish_jax.errors import CheckpointError
from cuttlefish_jax.training import resuming
from cuttlefish_jax.training.checkpoint import Checkpointer
from cuttlefish_jax.training.epoch import EpochTotals
from cuttlefish_jax.training.method import make_tracker
from cuttlefish_jax.training.progress import Progress

CONFIG = quickstart.get_config()
EXPERIMENT = SimpleNamespace(config=CONFIG, train=SimpleNamespace(steps_per_epoch=20))


def progress(epoch, *, best=None, steps=0):
    found = Progress(make_tracker(CONFIG), epoch=epoch, totals=EpochTotals(steps=steps))
    found.best = None if best is None else {"epoch": best, "validation_loss": 0.5}
    return found


def mend_best(directory, found):
    state = SimpleNamespace(eval_variables=make_state(9))
    with Checkpointer(directory, keep=1) as best:
        resuming.mend_best(best, found, state)


def save_best(directory, *epochs):
    with Checkpointer(directory, keep=len(epochs)) as best:
        for epoch in epochs:
            best.save(epoch, make_state(epoch), {})


def test_the_best_parameters_stay_and_those_of_a_trajectory_that_was_given_up_go(tmp_path):
    save_best(tmp_path, 1, 2, 5)
    mend_best(tmp_path, progress(4, best=2))
    assert names(tmp_path) == ["2"]
    assert_same_bits(restore(tmp_path).into(make_state(2)), make_state(2))


@pytest.mark.parametrize("is_damaged", [True, False])
def test_best_parameters_that_a_kill_cut_off_are_saved_again(tmp_path, is_damaged):
    save_best(tmp_path, 1, *([3] if is_damaged else []))
    if is_damaged:
        damage(tmp_path / "3")
    mend_best(tmp_path, progress(4, best=3))
    assert names(tmp_path) == ["3"]
    assert_same_bits(restore(tmp_path).into(make_state(9)), make_state(9))


@pytest.mark.parametrize("found", [progress(4, best=2), progress(3, best=2, steps=7)])
def test_best_parameters_that_are_gone_are_named(tmp_path, found, caplog):
    save_best(tmp_path, 1)
    mend_best(tmp_path, found)
    assert f"the best parameters so far, of epoch 3, are no longer in {tmp_path}" in caplog.text
    assert names(tmp_path) == ["1"]


def test_without_a_best_score_there_is_nothing_to_mend(tmp_path):
    save_best(tmp_path, 1)
    mend_best(tmp_path, progress(2))
    assert names(tmp_path) == ["1"]


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(epoch="3"),
        lambda record: record.update(epoch=-1),
        lambda record: record.update(epoch=CONFIG.epochs + 1),
        lambda record: record.update(unknown=1),
        lambda record: record.update(seconds=None),
        lambda record: record.update(plan="[]"),
        lambda record: record.update(tracker={"criterion": "none"}),
        lambda record: record.update(tracker=[]),
        lambda record: record["totals"].update(steps=21),
        lambda record: record["totals"].update(steps=None),
    ],
)
def test_the_record_of_another_run_is_refused_in_a_line(tmp_path, change):
    record = progress(2).to_record()
    change(record)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, make_state(2), record)
        checkpointer.wait()
        with pytest.raises(
            CheckpointError, match=rf"^the checkpoint {tmp_path}/2 is none of this run \(.*\)"
        ):
            resuming.start(EXPERIMENT, checkpointer, SimpleNamespace(), epochs_logged=2)


def test_a_record_that_is_no_object(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, make_state(2), {})
        checkpointer.wait()
        rewrite_record(tmp_path / "2", lambda payload: payload.update(record=[1]))
        with pytest.raises(CheckpointError, match="is none of this run"):
            resuming.start(EXPERIMENT, checkpointer, SimpleNamespace(), epochs_logged=2)


def test_checkpoints_that_are_gone_are_no_reason_to_start_anew(tmp_path):
    with (
        Checkpointer(tmp_path / "checkpoints") as checkpointer,
        pytest.raises(
            CheckpointError, match=r"numbers of 3 epochs, but there is no checkpoint in .*--workdir"
        ),
    ):
        resuming.start(EXPERIMENT, checkpointer, SimpleNamespace(), epochs_logged=3)
    assert not names(tmp_path)
