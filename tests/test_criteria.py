import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trajectories import noisy_trend, replay, switch_epoch

from cuttlefish_jax.criteria import AtEpoch, ReferencePlateau, RelativePlateau, trend
from cuttlefish_jax.tracker import RankTracker

CIFAR_HISTORY = [60, 41, 33, 28, 25, 23, 21, 20, 19, 18, 17, 17, 16, 16] + [15] * 6 + [14] * 40
IMAGENET_HISTORY = [178, 160, 150, 141, 135, 131, 128, 126, 125, 124, 123, 123]


# --- The reference's detector -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epoch", "value"), [(15, 2.084919), (20, 1.277279), (30, 0.417035), (40, 0.109712), (41, 0.095998)]
)
def test_golden_statistic_cifar(epoch, value):
    # Measured before the epoch: its measurement is number `epoch`.
    statistic = ReferencePlateau.cifar().statistic(CIFAR_HISTORY[: epoch + 1])
    assert statistic == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(("epoch", "value"), [(5, 6.532099), (7, 4.714266), (10, 2.256079)])
@pytest.mark.parametrize("preset", [ReferencePlateau.resnet50, ReferencePlateau.deit])
def test_golden_statistic_imagenet(preset, epoch, value):
    # Measured after the epoch: its measurement is number `epoch + 1`.
    assert preset().statistic(IMAGENET_HISTORY[: epoch + 2]) == pytest.approx(value, abs=1e-6)


def test_golden_detection_cifar():
    held = ReferencePlateau(window=15, last=11, threshold=0.1, delay=1)  # no relaxation
    tracker = replay({"layer": CIFAR_HISTORY}, held)
    assert tracker.converged_at == {"layer": 41}
    assert tracker.switch_epoch == 42  # epoch 41 is still trained full-rank
    # The last layer has a threshold five times as large: 0.417 at 30 passes.
    assert replay({"layer": CIFAR_HISTORY}, ReferencePlateau.cifar()).converged_at["layer"] <= 30


def test_reference_remembers_the_initialisation_for_fifty_epochs():
    held = ReferencePlateau(window=15, last=11, threshold=0.1, delay=1)
    assert replay({"layer": [288] + [20] * 99}, held).converged_at == {"layer": 50}


def test_reference_truncates_to_integers():
    jitter = [15.01 + 0.98 * (i % 2) for i in range(20)]
    assert ReferencePlateau.cifar().statistic(jitter) == 0
    assert replay({"layer": jitter}, ReferencePlateau.cifar()).converged_at == {"layer": 15}


@pytest.mark.parametrize(
    ("preset", "first_index", "first_low_rank_epoch"),
    [(ReferencePlateau.cifar, 15, 16), (ReferencePlateau.resnet50, 6, 6), (ReferencePlateau.deit, 6, 6)],
)
def test_reference_gives_no_verdict_before_epoch_n(preset, first_index, first_low_rank_epoch):
    # Detection at epoch N at the earliest (15; 5, which is measurement 6), the switch one epoch later.
    tracker = replay({"layer": [20.0] * 30}, preset())
    assert tracker.converged_at == {"layer": first_index}
    assert tracker.switch_epoch == first_low_rank_epoch


@pytest.mark.parametrize(
    ("preset", "left", "factor"),
    [("cifar", left, factor) for left, factor in ((1, 5.0), (2, 2.5), (3, 1.0), (9, 1.0))]
    + [("resnet50", left, factor) for left, factor in ((1, 5.0), (3, 5.0), (4, 2.5), (6, 2.5), (7, 1.0))]
    + [("deit", left, factor) for left, factor in ((1, 5.0), (4, 5.0), (5, 2.5), (9, 2.5), (10, 1.0))],
)
def test_threshold_is_relaxed_when_few_layers_are_left(preset, left, factor):
    criterion = getattr(ReferencePlateau, preset)()
    series = 1000 + 200 * 0.93 ** np.arange(40)  # the statistic falls past every threshold, gently
    histories = dict.fromkeys([*range(left), "converged before"], series)
    stable = {"converged before"}
    for t in range(2, 41):
        cut = {name: x[:t] for name, x in histories.items()}
        epoch = t - 1 if preset == "cifar" else t - 2
        passes = criterion.statistic(series[:t]) <= factor * criterion.threshold
        expected = set(range(left)) if epoch >= criterion.window and passes else set()
        assert criterion.newly_stable(cut, stable) == expected


def test_left_is_counted_once_at_the_start_of_a_measurement():
    criterion = ReferencePlateau(window=2, last=2, threshold=1.0, relaxations=((1, 100.0),), delay=1)
    tracker = RankTracker(criterion=criterion)
    for flat, falling in zip([20] * 4, [100, 90, 80, 70], strict=True):
        tracker.update({"flat": flat, "falling": falling})
        if "falling" in tracker.converged_at:
            break
    # "flat" converges at 2, but "falling" is alone, and its threshold relaxed, only from 3 on.
    assert tracker.converged_at == {"flat": 2, "falling": 3}


# --- The default --------------------------------------------------------------------------------------------


def fired(slope, noise, runs=100):
    """Share of runs of 40 epochs in which the default declares the layer stable, and the median epoch."""
    epochs = [switch_epoch(noisy_trend(slope, noise, seed), RelativePlateau()) for seed in range(runs)]
    hits = [epoch for epoch in epochs if epoch is not None]
    return len(hits) / runs, float(np.median(hits)) if hits else None


@pytest.mark.parametrize("slope", [-0.08, -0.04])
@pytest.mark.parametrize("noise", [0.0, 0.01, 0.02, 0.05, 0.1])
def test_a_trend_of_four_percent_is_not_mistaken_for_a_plateau(slope, noise):
    rate, _ = fired(slope, noise)
    assert rate <= (0.0 if noise <= 0.02 else 0.05)


@pytest.mark.parametrize(
    ("noise", "within"), [(0.0, 4), (0.003, 4), (0.01, 6), (0.02, 8), (0.05, 14), (0.1, 20)]
)
@pytest.mark.parametrize("slope", [0.0, -0.005])
def test_a_plateau_is_found_through_noise(slope, noise, within):
    rate, median = fired(slope, noise)
    assert rate >= 0.98
    assert median <= within


def test_memory_of_the_initialisation_does_not_hold_it_up():
    assert switch_epoch([288] + [20] * 40, RelativePlateau()) == 5


def test_an_exponential_decay_is_stable_when_its_slope_is_two_percent():
    ranks = 30 + 250 * 0.75 ** np.arange(60)
    slopes = -np.diff(np.log(ranks))
    epoch = switch_epoch(ranks, RelativePlateau())
    first_flat = int(np.argmax(slopes < 0.02))
    assert epoch is not None
    assert first_flat <= epoch <= first_flat + 5


def test_a_long_fall_and_rise_is_no_plateau():
    # Over the whole window the net change is nil; only the last measurements tell.
    ranks = np.concatenate([100 * 0.96 ** np.arange(15), 100 * 0.96**14 * 1.04 ** np.arange(1, 15)])
    assert switch_epoch(ranks, RelativePlateau()) is None


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(1.0, 500.0), min_size=5, max_size=15),
    st.floats(1e-3, 1e3),
)
def test_only_ratios_count(ranks, scale):
    ranks = np.array(ranks)
    slope, margin = trend(ranks)
    np.testing.assert_allclose(trend(scale * ranks), (slope, margin), rtol=1e-6, atol=1e-9)


def test_scaling_a_history_does_not_change_the_verdict():
    for seed in range(30):
        ranks = noisy_trend(-0.015, 0.03, seed)
        assert switch_epoch(ranks, RelativePlateau()) == switch_epoch(ranks * 37.5, RelativePlateau())


def test_trend_is_the_textbook_confidence_interval():
    stats = pytest.importorskip("scipy.stats")
    for t in (4, 5, 8, 20):
        ranks = noisy_trend(-0.03, 0.05, seed=t, length=t)
        expected = stats.linregress(np.arange(t), np.log(ranks))
        slope, margin = trend(ranks)
        assert slope == pytest.approx(expected.slope)
        # The quantile is an expansion: 3 % low at two degrees of freedom, 1 % from three on.
        assert margin == pytest.approx(
            stats.t.ppf(0.975, t - 2) * expected.stderr, rel=0.035 if t == 4 else 0.01
        )


def test_a_layer_of_zeros_is_stable_but_not_one_that_comes_to_life():
    assert switch_epoch([0.0] * 6, RelativePlateau()) == 4
    assert switch_epoch([0.0, 0.0, 0.0, 0.0, 5.0, 9.0, 14.0], RelativePlateau()) is None


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="max_slope must be positive, got 0"):
        RelativePlateau(max_slope=0)
    with pytest.raises(ValueError, match="min_window must be at least 4, got 3"):
        RelativePlateau(min_window=3)
    with pytest.raises(ValueError, match="epoch must not be negative, got -1"):
        AtEpoch(-1)
