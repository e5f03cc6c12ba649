"""What people see of a run."""

import io
import struct

import numpy as np
import pytest

from cuttlefish_jax.errors import StorageError
from cuttlefish_jax.training.report import duration, epoch_bar, plot_ranks, progress_line, summary_table


def test_a_line_has_what_was_measured():
    line = progress_line(
        epoch=4, epochs=100, phase="full_rank", train_loss=1.25, learning_rate=0.66,
        examples_per_second=1234.5, seconds_left=59.0, test_loss=1.5, test_score=0.5,
    )  # fmt: skip
    assert line == (
        "epoch   5/100  full rank  loss 1.2500  test loss 1.5000  accuracy 50.00 %  lr 0.66  "
        "1,234 examples/s  59.0 s left"
    )


def test_a_line_leaves_out_what_was_not_measured():
    line = progress_line(
        epoch=1, epochs=2, phase="low_rank", train_loss=float("nan"), learning_rate=1e-5,
        examples_per_second=10, seconds_left=0,
    )  # fmt: skip
    assert line == "epoch 2/2  low rank   loss nan  lr 1e-05  10 examples/s"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0.0 s"),
        (60, "1 min 00 s"),
        (119.7, "2 min 00 s"),
        (3600, "1 h 00 min"),
        (float("inf"), "?"),
    ],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def test_the_bar_is_for_terminals_only(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    screen, file = Terminal(), io.StringIO()
    for stream in (screen, file):
        with epoch_bar(10, description="epoch 3", stream=stream) as advance:
            advance(4)
            advance(6)
    assert "epoch 3" in screen.getvalue()
    assert "10/10" in screen.getvalue()
    assert file.getvalue() == ""


@pytest.fixture
def summary():
    return dict(
        method="cuttlefish", model="resnet18", dataset="cifar10", seed=0, epochs=300, switch_epoch=80,
        ranks={}, params_full=11_173_962, params_final=2_234_792, flops_full=1_110_845_440,
        flops_final=555_422_720, params_trained=2_234_792, metric="accuracy", test_score=0.9466,
        best_test_score=0.95, train_seconds=2513.8, rank_seconds=2.0, profile_seconds=0.0,
        switch_seconds=1.0, compile_seconds=61.0, examples_per_second_full=5000.0,
        examples_per_second_low=7500.0, device="cpu", parallelism="fsdp", state_bytes_full=134_087_544,
        state_bytes_low=26_817_504, step_bytes_full=1_250_000_000, step_bytes_low=1_100_000_000,
    )  # fmt: skip


def test_the_summary_says_what_was_saved(summary):
    text = summary_table(summary)
    assert "resnet18 on cifar10, cuttlefish, seed 0" in text
    assert "11,173,962 -> 2,234,792 (5.00x fewer)" in text
    assert "300, switched before epoch 81" in text
    assert "test accuracy      94.66 % (best 95.00 %)" in text
    assert "5,000 full rank, 7,500 low rank (1.50x)" in text
    assert (
        "memory per device  state 134.1 MB -> 26.8 MB, a step at most 1,250.0 MB -> 1,100.0 MB (fsdp)" in text
    )
    assert "training 41 min 54 s, stable ranks 2.0 s, switch 1.0 s, compilation 1 min 01 s" in text


def test_the_summary_names_the_metric_and_what_is_frozen(summary):
    summary |= dict(metric="matthews", params_trained=1_000_000, profile_seconds=3.0)
    text = summary_table(summary)
    assert "test matthews      94.66 %" in text
    assert "(5.00x fewer), 1,000,000 of them trained\n" in text
    assert "stable ranks 2.0 s, profile 3.0 s, switch" in text


def test_the_summary_of_a_run_that_never_switched(summary):
    summary |= dict(
        switch_epoch=None, params_final=11_173_962, params_trained=11_173_962, flops_final=1_110_845_440,
        examples_per_second_low=None, best_test_score=None, state_bytes_low=None, step_bytes_low=None,
    )  # fmt: skip
    text = summary_table(summary)
    assert "never switched" in text
    assert "11,173,962\n" in text
    assert "fewer" not in text
    assert "(best -)" in text
    assert "state 134.1 MB, a step at most 1,250.0 MB (fsdp)" in text
    assert "5,000 full rank\n" in text


def ranks(layers, epochs):
    paths = [f"stage{i // 4}/block{i % 4}/conv" for i in range(layers)]
    return [(t, {path: 10 + 5 * i / (1 + t) for i, path in enumerate(paths)}) for t in range(epochs)]


def read_png(file):
    """Width, height and RGBA of a PNG."""
    from matplotlib.image import imread

    contents = file.read_bytes()
    assert contents.startswith(b"\x89PNG")
    return struct.unpack(">II", contents[16:24]), imread(file)


def is_crimson(pixels):
    return np.all(np.abs(pixels[..., :3] * 255 - [220, 20, 60]) < 2, axis=-1)


@pytest.mark.parametrize("layers", [1, 6, 60])
def test_the_picture_marks_the_switch(tmp_path, layers):
    file = tmp_path / "ranks.png"
    plot_ranks(ranks(layers, 10), file, switch_epoch=7, factorized=["stage0/block0/conv"])
    (width, height), pixels = read_png(file)
    assert width > height > 500
    # A line from the bottom to the top of the axes.
    assert is_crimson(pixels).sum(axis=0).max() > height / 2
    plot_ranks(ranks(layers, 10), file)
    assert not is_crimson(read_png(file)[1]).any()
    assert [path.name for path in tmp_path.iterdir()] == ["ranks.png"]


def test_kept_layers_are_fainter_than_factorized_ones(tmp_path):
    measurements = ranks(2, 10)
    plot_ranks(measurements, tmp_path / "solid.png", factorized=list(measurements[0][1]))
    plot_ranks(measurements, tmp_path / "faint.png", factorized=[])
    solid, faint = (read_png(tmp_path / name)[1][..., :3] for name in ("solid.png", "faint.png"))
    assert (solid < 0.5).any(axis=-1).sum() > 1.2 * (faint < 0.5).any(axis=-1).sum()


@pytest.mark.parametrize(
    "measurements", [[], [(0, {"a": 3.0})], [(0, {"a": [3.0, 4.0]}), (1, {"a": [2.0, 2.5]})]]
)
def test_little_and_stacked_data_make_a_picture_too(tmp_path, measurements):
    plot_ranks(measurements, tmp_path / "ranks.png", switch_epoch=1)
    assert read_png(tmp_path / "ranks.png")[1].size


def test_plotting_leaves_the_callers_matplotlib_alone(tmp_path):
    import matplotlib.pyplot as plt

    plt.switch_backend("svg")
    plot_ranks(ranks(3, 3), tmp_path / "ranks.png")
    assert plt.get_backend() == "svg"
    assert plt.get_fignums() == []


def test_a_place_that_cannot_be_written_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        plot_ranks(ranks(1, 1), tmp_path / "file" / "ranks.png")
