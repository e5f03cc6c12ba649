"""The record of a checkpoint: all of a run's progress, also that of a version before."""

import json

import cuttlefish_jax as cf
from cuttlefish_jax.training.epoch import EpochTotals
from cuttlefish_jax.training.progress import Progress


def make_tracker():
    return cf.RankTracker(cf.AtEpoch(3))


def make_progress():
    progress = Progress(make_tracker(), epoch=2, best={"epoch": 1, "validation_loss": 0.1})
    progress.tracker.update({"dense": 3.5})
    progress.totals = EpochTotals(steps=2, seconds=0.25, sums={"loss": 0.1 + 0.2})
    progress.seconds["compile"] = 1.5
    return progress


def test_a_record_survives_json():
    progress = make_progress()
    found = Progress.from_record(json.loads(json.dumps(progress.to_record())), make_tracker())
    assert found.to_record() == progress.to_record()
    assert found.totals == progress.totals


def test_what_an_older_version_did_not_write_is_as_at_the_start():
    record = json.loads(json.dumps(make_progress().to_record()))
    del record["totals"], record["foreseen"], record["seconds"]["stall"]
    found = Progress.from_record(record, make_tracker())
    assert found.totals == EpochTotals()
    assert found.foreseen is None
    assert (found.seconds["stall"], found.seconds["compile"]) == (0.0, 1.5)
    assert found.epoch == 2
