import json

import numpy as np
import pytest
from trajectories import TRAJECTORIES, load_trajectory, noisy_trend, replay

from cuttlefish_jax.criteria import AtEpoch, Never, ReferencePlateau, RelativePlateau
from cuttlefish_jax.tracker import RankTracker

# The recorded runs and the epochs between which their switch has to come.
EXPECTED_SWITCH = {
    "digits_resnet_seed?.json": (9, 15),
    "fashion_mnist_resnet18_cosine.json": (12, 20),
    "fashion_mnist_resnet18_steps.json": (12, 20),  # the second cut of the learning rate is at 22
    "resnet18_seed?.json": (9, 15),
    "vgg19_seed?.json": (9, 18),
    "deit_tiny_seed?.json": (16, 28),
    "resmlp_s12_seed?.json": (16, 28),
}

# --- Recorded runs ------------------------------------------------------------------------------------------


def test_every_recorded_trajectory_switches_when_it_should():
    unseen = {file.name for file in TRAJECTORIES.glob("*.json")}
    for pattern, (earliest, latest) in EXPECTED_SWITCH.items():
        files = [*TRAJECTORIES.glob(pattern)]
        assert files, pattern
        for file in files:
            epoch = replay(load_trajectory(file), RelativePlateau()).switch_epoch
            assert epoch is not None and earliest <= epoch <= latest, f"{file.name}: switch at {epoch}"
            unseen.remove(file.name)
    assert not unseen


def test_the_ranks_at_the_switch_are_those_of_the_end():
    """What a plateau is wanted for; in each recorded run, for each layer."""
    for file in TRAJECTORIES.glob("*.json"):
        history = load_trajectory(file)
        epoch = replay(history, RelativePlateau()).switch_epoch
        # The ResMLP's ranks rise again slowly, 14 epochs long.
        bound = 0.08 if file.name.startswith("resmlp") else 0.06
        for path, ranks in history.items():
            assert ranks[epoch] == pytest.approx(ranks[-1], rel=bound), f"{file.name}: {path}"


@pytest.mark.parametrize("noise", [0.005, 0.02])
def test_recorded_runs_with_more_noise_switch_later_not_earlier(noise):
    for file in TRAJECTORIES.glob("*.json"):
        history = load_trajectory(file)
        clean = replay(history, RelativePlateau()).switch_epoch
        rng = np.random.default_rng(0)
        noisy = {p: x * np.exp(noise * rng.standard_normal(len(x))) for p, x in history.items()}
        epoch = replay(noisy, RelativePlateau()).switch_epoch
        assert epoch is None or epoch >= clean - 2, f"{file.name}: {epoch}, without noise {clean}"


@pytest.mark.parametrize("criterion", [RelativePlateau(), ReferencePlateau.resnet50()])
def test_every_recorded_switch_is_announced_two_epochs_before(criterion):
    for file in TRAJECTORIES.glob("*.json"):
        tracker, announced = RankTracker(criterion=criterion), []
        history = load_trajectory(file)
        for values in zip(*history.values(), strict=True):
            if tracker.update(dict(zip(history, values, strict=True))):
                break
            announced.append(tracker.converges_within(2))
        assert announced[-2:] == [True, True], file.name
        assert sum(announced) <= 4, file.name  # not for ever: what is made ready early may be of no use


def test_a_saved_tracker_is_a_trajectory(tmp_path):
    tracker = replay({"a": [288] + [20] * 9, "b": [144] + [40] * 9}, RelativePlateau())
    file = tmp_path / "run.json"
    file.write_text(json.dumps(tracker.to_state()))
    assert replay(load_trajectory(file), RelativePlateau()).switch_epoch == tracker.switch_epoch == 5


# --- The tracker --------------------------------------------------------------------------------------------


def test_relative_plateau_is_the_default():
    assert RankTracker().criterion == RelativePlateau()


def test_converges_with_its_last_layer_and_layers_stay_stable():
    early = [288] + [20] * 6 + [20 * 0.8**i for i in range(1, 14)]  # settles, then falls again
    late = [288 * 0.8**i for i in range(8)] + [60] * 12
    tracker = RankTracker()
    seen = [tracker.update({"early": a, "late": b}) for a, b in zip(early, late, strict=True)]
    assert tracker.converged_at == {"early": 5, "late": 11}
    assert seen == [False] * 11 + [True] * 9
    assert tracker.converged and tracker.switch_epoch == 11
    assert tracker.history == {"early": early, "late": late}


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_at_epoch(epoch):
    tracker = RankTracker(criterion=AtEpoch(epoch))
    seen = [tracker.update({"a": 100.0 - i, "b": 50.0}) for i in range(9)]
    assert seen == [i >= epoch for i in range(9)]
    assert tracker.converged_at == {"a": epoch, "b": epoch}
    assert tracker.switch_epoch == epoch


@pytest.mark.parametrize("within", [0, 1, 3])
def test_a_switch_at_an_epoch_is_foreseen_exactly(within):
    tracker, seen = RankTracker(criterion=AtEpoch(7)), []
    assert not tracker.converges_within(within)  # nothing is measured yet
    for i in range(9):
        tracker.update({"a": 100.0 - i})
        state = json.dumps(tracker.to_state())
        seen.append(tracker.converges_within(within))
        assert json.dumps(tracker.to_state()) == state
    assert seen == [i + within >= 7 for i in range(9)]


def test_a_forecast_counts_measurements_from_zero():
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        RankTracker().converges_within(-1)


def test_never():
    tracker = RankTracker(criterion=Never())
    assert not any(tracker.update({"a": 20.0}) for _ in range(50))
    assert tracker.switch_epoch is None and not tracker.converges_within(9)


@pytest.mark.parametrize("criterion", [RelativePlateau(), ReferencePlateau.cifar()])
def test_stacked_layers_are_judged_like_separate_ones(criterion):
    series = [15.3 + 100 * decay ** np.arange(60) for decay in (0.2, 0.6, 0.8)]
    apart = replay({f"layer{i}": x for i, x in enumerate(series)}, criterion)
    stacked = replay({"layers": list(np.stack(series, axis=1))}, criterion)
    assert len(set(apart.converged_at.values())) > 1
    assert stacked.converged_at == {"layers": max(apart.converged_at.values())}
    assert stacked.switch_epoch == apart.switch_epoch


def test_arrays_of_any_float_type_are_welcome():
    jnp = pytest.importorskip("jax.numpy")
    tracker = RankTracker(criterion=Never())
    tracker.update({"a": jnp.float32(2.5), "b": jnp.array([1.5, 2.0]), "c": np.float64(3), "d": 4})
    assert tracker.history == {"a": [2.5], "b": [[1.5, 2.0]], "c": [3.0], "d": [4.0]}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, np.array([3.0, np.nan])])
def test_a_value_that_is_no_stable_rank_names_the_layer_and_changes_nothing(bad):
    tracker = RankTracker()
    shape = np.shape(bad)
    tracker.update({"good": 3.0, "stage2/conv1": np.full(shape, 9.0)})
    before = json.dumps(tracker.to_state())
    with pytest.raises(ValueError, match=r"^the stable rank of 'stage2/conv1' is .*has training diverged\?$"):
        tracker.update({"good": 3.0, "stage2/conv1": bad})
    assert json.dumps(tracker.to_state()) == before


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"a": 1.0}, "'b' is missing"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, "'c' is new"),
        ({"a": 1.0, "b": [1.0, 2.0]}, r"'b' have shape \(2,\), but \(\) at the first measurement"),
        ({}, "no layer to track"),
    ],
)
def test_other_layers_than_at_first_are_refused(second, message):
    tracker = RankTracker()
    tracker.update({"a": 1.0, "b": 1.0})
    with pytest.raises(ValueError, match=message):
        tracker.update(second)
    assert tracker.num_measurements == 1


def test_the_layers_of_nested_stacks_are_judged_one_by_one():
    flat, nested = RankTracker(), RankTracker()
    for values in noisy_trend(-0.01, 0.02, seed=3)[:, None] * np.asarray([1.0, 3.0, 2.0, 5.0, 4.0, 6.0]):
        one_by_one = flat.update({f"{i}{j}": x for (i, j), x in np.ndenumerate(values.reshape(2, 3))})
        assert nested.update({"a": values.reshape(2, 3)}) == one_by_one
        assert nested.converges_within(2) == flat.converges_within(2)
        nested = RankTracker.from_state(nested.criterion, json.loads(json.dumps(nested.to_state())))
    assert np.shape(nested.history["a"]) == (nested.num_measurements, 2, 3)
    assert nested.converged and nested.converged_at["a"] == max(flat.converged_at.values())
    with pytest.raises(ValueError, match=r"have shape \(6,\), but \(2, 3\) at the first measurement"):
        nested.update({"a": np.ones(6)})


@pytest.mark.parametrize(
    "criterion",
    [RelativePlateau(), ReferencePlateau.resnet50(), ReferencePlateau.cifar(), AtEpoch(20), Never()],
)
@pytest.mark.parametrize("cut", [0, 1, 6, 17, 30])
def test_a_resumed_tracker_gives_the_same_verdicts(criterion, cut):
    history = {
        "a": list(noisy_trend(-0.01, 0.02, seed=3)),
        "b": [288.0] + [20.0] * 40,
        "c": list(np.stack([noisy_trend(0, 0.01, 4), noisy_trend(0, 0.05, 5)], axis=1)),
    }
    measurements = [dict(zip(history, values, strict=True)) for values in zip(*history.values(), strict=True)]
    whole, resumed = RankTracker(criterion=criterion), RankTracker(criterion=criterion)
    for i, measurement in enumerate(measurements):
        if i == cut:
            state = json.loads(json.dumps(resumed.to_state()))
            resumed = RankTracker.from_state(criterion, state)
            assert resumed.to_state() == state
        assert resumed.update(measurement) == whole.update(measurement)
        assert resumed.converged_at == whole.converged_at
        assert resumed.switch_epoch == whole.switch_epoch
        assert resumed.converges_within(2) == whole.converges_within(2)
    assert resumed.history == whole.history
    assert json.dumps(resumed.to_state()) == json.dumps(whole.to_state())


def test_the_state_of_another_criterion_is_refused():
    state = RankTracker(criterion=RelativePlateau()).to_state()
    with pytest.raises(ValueError, match=r"used RelativePlateau\(max_slope=0\.02.*, not AtEpoch\(epoch=3\)"):
        RankTracker.from_state(AtEpoch(3), state)
    with pytest.raises(ValueError, match="resume with the same criterion"):
        RankTracker.from_state(RelativePlateau(max_slope=0.01), state)
