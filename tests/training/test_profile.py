"""Measured once for a run, kept in its working directory, and what a run makes of it."""

import dataclasses
import json

import pytest

import cuttlefish_jax as cf
from configs import quickstart
from cuttlefish_jax.errors import ConfigError, WorkdirError
from cuttlefish_jax.profiling.kernel_profile import KernelProfile, KernelTiming
from cuttlefish_jax.training.experiment import Experiment
from cuttlefish_jax.training.loop import run
from cuttlefish_jax.training.profile import get_profile
from cuttlefish_jax.training.workdir import Workdir

FILE = "profile.json"


def make_config(**changes):
    """One block of two convolutions in each of two stages."""
    config = quickstart.get_config()
    settings = {
        "epochs": 2,
        "batch_size": 16,
        "model.width": 8,
        "model.stage_sizes": (1, 1),
        "data.train_examples": 64,
        "data.image_size": 8,
        "schedule.warmup_epochs": 0.0,
        "profile.enabled": True,
        "plan.keep": (),
        "plan.factorize": (),
        "plan.rank_rule": "rank_ratio",
    }
    config.update_from_flattened_dict(settings | changes)
    return config


def write_profile(directory, experiment, speedups):
    """As if it had been measured that each stack is so many times as fast."""
    timings = tuple(
        KernelTiming(
            path=path,
            stack=path.split("/")[0],
            layer=kernel.layer,
            shape=kernel.shape,
            rank=kernel.max_rank // 4,
            input_shape=(2, 8, 8, kernel.shape[-2]),
            input_dtype="float32",
            calls=1,
            full_seconds=1e-3,
            factorized_seconds=1e-3 / speedups[path.split("/")[0]],
        )
        for path, kernel in experiment.kernels.items()
        if path in experiment.candidates
    )
    profile = KernelProfile(timings=timings, ratio=0.25, device="hand")
    directory.mkdir(exist_ok=True)
    (directory / FILE).write_text(profile.to_json())
    return profile


@pytest.fixture
def experiment():
    return Experiment.from_config(make_config())


@pytest.fixture
def never_measured(monkeypatch):
    def fail(*args, **options):
        raise AssertionError("measured again")

    monkeypatch.setattr(cf, "profile_kernels", fail)


def test_it_is_measured_once_of_the_candidates_alone(experiment, tmp_path, capsys, monkeypatch):
    with Workdir(tmp_path) as directory:
        measured = get_profile(experiment, directory)
        assert list(measured) == [f"stage{i}/block1/conv{j}" for i in (1, 2) for j in (1, 2)]
        assert set(measured) == set(experiment.candidates)
        # A device's share of the batch: 16 examples on 8 devices.
        assert all(timing.input_shape[0] == 2 for timing in measured.timings)
        assert KernelProfile.from_json((tmp_path / FILE).read_text()) == measured
        said = capsys.readouterr()
        assert measured.report() in said.out
        assert "measuring what factorizing saves, 1/" in said.err

        monkeypatch.delattr(cf, "profile_kernels")
        assert get_profile(experiment, directory) == measured
        assert measured.report() in capsys.readouterr().out


def test_the_parts_of_an_accumulated_batch_are_what_is_measured(tmp_path, monkeypatch, experiment):
    sizes = []

    def profile_kernels(model, *inputs, **options):
        sizes.extend(x.shape for x in inputs)
        assert options["ratio"] == 0.5 and options["paths"] == experiment.candidates
        return write_profile(tmp_path, experiment, {"stage1": 2.0, "stage2": 2.0})

    monkeypatch.setattr(cf, "profile_kernels", profile_kernels)
    changes = {"batch_size": 64, "optimizer.accumulation_steps": 2, "profile.ratio": 0.5}
    with Workdir(tmp_path / "run") as directory:
        get_profile(Experiment.from_config(make_config(**changes)), directory)
    assert sizes == [(4, 8, 8, 1)]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "is damaged .*restore the file"),
        (lambda text: "[]", "kernel profile.* Delete the file to measure again"),
        (lambda text: text.replace('"full_seconds": 0.001', '"full_seconds": -1'), "Delete the file"),
        (lambda text: text.replace("conv2", "conv9"), "no kernel 'stage1/block1/conv9'. Delete the file"),
    ],
    ids=["torn", "no profile", "negative time", "another model"],
)
def test_a_file_that_is_no_profile_of_the_run_is_a_one_line_error(
    damage, message, experiment, tmp_path, never_measured
):
    text = write_profile(tmp_path, experiment, {"stage1": 2.0, "stage2": 2.0}).to_json()
    damaged = damage(text)
    assert damaged != text
    (tmp_path / FILE).write_text(damaged)
    with Workdir(tmp_path) as directory, pytest.raises(WorkdirError, match=message) as error:
        get_profile(experiment, directory)
    assert str(error.value).startswith(str(tmp_path / FILE))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_run_factorizes_what_gets_faster_and_awaits_no_other_ranks(experiment, tmp_path, never_measured):
    write_profile(tmp_path, experiment, {"stage1": 1.2, "stage2": 2.0})
    # The criterion's verdict does not matter; which layers it is asked about does.
    config = make_config(**{"switch.criterion": "reference_cifar", "switch.deadline": 0.5})
    with pytest.warns(UserWarning, match=r"the stable ranks of 2 layers \(stage2/block1/conv1 \.\.\.\)"):
        summary = run(config, tmp_path)
    assert list(summary["ranks"]) == ["stage2/block1/conv1", "stage2/block1/conv2"]
    plan = cf.FactorizationPlan.from_json((tmp_path / "plan.json").read_text())
    reason = "stack 'stage1' gets only 1.20x faster at ratio 0.25, less than 1.5x"
    assert [path for path, why in plan.kept.items() if why == reason] == [
        "stage1/block1/conv1",
        "stage1/block1/conv2",
    ]
    # The ranks of all layers are written down all the same.
    line = json.loads((tmp_path / "ranks.jsonl").read_text().splitlines()[0])
    assert set(line) == {"epoch", *experiment.kernels}


@pytest.mark.parametrize("method", ["cuttlefish", "energy"])
def test_where_nothing_gets_faster_the_run_ends_at_once(method, experiment, tmp_path, never_measured):
    write_profile(tmp_path, experiment, {"stage1": 1.2, "stage2": 0.9})
    expected = (
        r"^there is nothing to switch, every layer would be kept \(2 layers: stack 'stage1' gets only 1\.20x "
        r"faster at ratio 0\.25, less than 1\.5x; 2 layers: stack 'stage2' gets only 0\.90x "
        r".*: change that, or train with --config\.method=full_rank$"
    )
    with pytest.raises(ConfigError, match=expected) as error:
        run(make_config(method=method), tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "checkpoints" / "1").exists()
    # The same directory takes the settings that were mended.
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("method", ["pufferfish", "si_fd"])
def test_methods_with_layers_of_their_own_do_not_ask_the_profile(method, experiment, tmp_path):
    profile = write_profile(tmp_path, experiment, {"stage1": 1.2, "stage2": 0.9})
    own = Experiment.from_config(make_config(method=method))
    assert set(cf.make_plan(own.kernels, rank_rule=cf.RankRatio(0.25)).ranks) == set(own.candidates)
    assert dataclasses.replace(own, profile=profile).candidates == own.candidates
