"""The end of a run: its results come first, and need the whole of its log."""

from types import SimpleNamespace

import pytest

import cuttlefish_jax as cf
from cuttlefish_jax.errors import WorkdirError
from cuttlefish_jax.training.progress import Progress
from cuttlefish_jax.training.summary import draw_ranks, read_metrics, summarize
from cuttlefish_jax.training.workdir import Workdir

SUMMARY = {"switch_epoch": 1, "ranks": {"dense": 2}}


@pytest.fixture
def workdir(tmp_path):
    with Workdir(tmp_path) as workdir:
        yield workdir


@pytest.mark.parametrize(
    "lines", [[], [{"epoch": 0, "test_accuracy": 0.5}], [{"epoch": 0, "test_accuracy": 0.5}, {"epoch": 1}]]
)
def test_a_last_epoch_that_is_not_in_the_log_is_the_users_to_mend(workdir, lines):
    for line in lines:
        workdir.append("metrics.jsonl", line)
    run = SimpleNamespace(config=SimpleNamespace(epochs=2), task=SimpleNamespace(score="accuracy"))
    with pytest.raises(
        WorkdirError, match=r"^metrics\.jsonl has lost the line of the last epoch, 1, and"
    ) as e:
        summarize(run, None, Progress(cf.RankTracker()), read_metrics(workdir))
    assert "\n" not in str(e.value)


def test_the_picture_is_of_the_log(workdir):
    for epoch in range(3):
        workdir.append("ranks.jsonl", {"epoch": epoch, "dense": 3.0 - epoch / 2})
    draw_ranks(workdir, SUMMARY, title="Ranks")
    assert (workdir.path / "ranks.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"epoch": 0, "dense": 3.0}', r"cannot write .*ranks\.png: Is a directory"),
        ('{"epoch": 0, "dense": {}}', "float"),
        ('{"epoch": 0, "dense": "x"}', "could not convert"),
        ("5", r"ranks\.jsonl is damaged, in line 1"),
    ],
)
def test_a_picture_that_cannot_be_drawn_is_a_warning(workdir, line, reason):
    (workdir.path / "ranks.png").mkdir()
    (workdir.path / "ranks.jsonl").write_text(line + "\n")
    with pytest.warns(UserWarning, match=f"^there is no picture of the stable ranks: .*{reason}") as said:
        draw_ranks(workdir, SUMMARY, title="Ranks")
    assert "\n" not in str(said[0].message)
