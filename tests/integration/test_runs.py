"""Whole runs in this process: what they leave, and the choices along the way."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cuttlefish_jax as cf
from cuttlefish_jax.errors import ConfigError, DivergedError, WorkdirError
from cuttlefish_jax.training import experiment
from cuttlefish_jax.training.checkpoint import Checkpointer
from cuttlefish_jax.training.loop import run
from cuttlefish_jax.training.recipe import make_optimizer
from cuttlefish_jax.training.tasks import load_task

pytestmark = pytest.mark.slow


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_leaves_every_artifact(tiny_config, tmp_path, capsys):
    summary = run(tiny_config(), tmp_path)

    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    keys = """method model dataset seed epochs switch_epoch ranks params_full params_final flops_full
        flops_final test_accuracy best_test_accuracy train_seconds rank_seconds switch_seconds compile_seconds
        examples_per_second_full examples_per_second_low device parallelism"""
    assert set(keys.split()) <= set(summary)
    assert summary["switch_epoch"] == 2
    assert summary["params_final"] < summary["params_full"]
    assert summary["flops_final"] < summary["flops_full"]
    assert 0 < summary["state_bytes_low"] < summary["state_bytes_full"] < summary["step_bytes_full"]

    metrics = read_lines(tmp_path / "metrics.jsonl")
    assert [line["epoch"] for line in metrics] == [0, 1, 2, 3]
    assert [line["phase"] for line in metrics] == ["full_rank"] * 2 + ["low_rank"] * 2
    keys = """train_loss test_loss test_accuracy learning_rate seconds examples_per_second rank_seconds
        validation_loss validation_accuracy"""
    assert all(set(keys.split()) <= set(line) for line in metrics)
    assert metrics[-1]["train_loss"] < metrics[0]["train_loss"]

    ranks = read_lines(tmp_path / "ranks.jsonl")
    assert [line["epoch"] for line in ranks] == [0, 1, 2]
    plan = cf.FactorizationPlan.from_json((tmp_path / "plan.json").read_text())
    assert plan.ranks == summary["ranks"]
    assert plan.num_params == summary["params_final"]
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "checkpoints" / "4").is_dir()

    said = capsys.readouterr().out
    assert "epoch 1/4  full rank" in said and "epoch 4/4  low rank" in said
    assert "stem_conv" in said and "first layer" in said  # the table at the switch

    again = run(tiny_config(), tmp_path)
    assert again == summary
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(WorkdirError, match=r"other settings: seed \(there 0, here 1\)"):
        run(tiny_config(seed=1), tmp_path)
    with pytest.raises(ConfigError, match=r"config\.parallelism = 'fsdpp': it must be one of pmap, fsdp"):
        run(tiny_config(parallelism="fsdpp"), tmp_path)


def test_full_rank_never_switches(tiny_config, tmp_path, caplog):
    (tmp_path / "ranks.png").mkdir()
    with pytest.warns(UserWarning, match=r"no picture of the stable ranks: .*ranks\.png: Is a directory"):
        summary = run(tiny_config(method="full_rank", epochs=2), tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["switch_epoch"] is None
    assert summary["params_final"] == summary["params_full"]
    assert summary["ranks"] == {}
    assert not (tmp_path / "plan.json").exists()

    # Without its results it is a run that was interrupted at the very end; and without its log it has none.
    (tmp_path / "summary.json").unlink()
    (tmp_path / "ranks.png").rmdir()
    again = run(tiny_config(method="full_rank", epochs=2), tmp_path)
    assert again["test_score"] == summary["test_score"]
    (tmp_path / "summary.json").unlink()
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(WorkdirError, match=r"metrics\.jsonl has lost the line of the last epoch, 1, "):
        run(tiny_config(method="full_rank", epochs=2), tmp_path)
    assert "has lost 2 of its lines, that of epoch 0 first" in caplog.text
    (tmp_path / "config.json").unlink()
    with pytest.raises(WorkdirError, match=r"has checkpoints and no config\.json"):
        run(tiny_config(method="full_rank", epochs=2, seed=1), tmp_path)


@pytest.mark.parametrize(("switch_epoch", "phases"), [(0, ["low_rank"]), (1, ["full_rank"])])
def test_one_epoch_with_an_example_a_device(tiny_config, tmp_path, switch_epoch, phases):
    """The shortest of runs: low-rank from the first step, or told to switch when all is over."""
    changes = {"epochs": 1, "batch_size": 8, "switch.epoch": switch_epoch, "plan.rank_rule": "rank_ratio"}
    # Less than a batch to evaluate on, and examples that fill no batch.
    changes |= {"data.train_examples": 20, "data.validation_examples": 3, "model.width": 8}
    summary = run(tiny_config(**changes), tmp_path)
    assert [line["phase"] for line in read_lines(tmp_path / "metrics.jsonl")] == phases
    assert summary["switch_epoch"] == (0 if phases == ["low_rank"] else None)
    assert summary["steps"] == 2
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert round(3 * line["validation_accuracy"], 6).is_integer()


@pytest.mark.parametrize("if_never", ["full_rank", "switch"])
def test_ranks_that_miss_the_deadline(tiny_config, tmp_path, if_never):
    config = tiny_config(
        **{"switch.criterion": "reference_cifar", "switch.deadline": 0.5, "switch.if_never": if_never}
    )
    verdict = "switching now" if if_never == "switch" else "staying full-rank to the end"
    with pytest.warns(UserWarning, match=f"have not converged by epoch 2 of 4: {verdict}"):
        summary = run(config, tmp_path)
    assert summary["switch_epoch"] == (2 if if_never == "switch" else None)


def test_a_plan_that_shrinks_nothing_stays_full_rank(tiny_config, tmp_path):
    # By definition the scaled stable ranks at initialisation are the full ranks.
    with pytest.warns(UserWarning, match="no layer would get smaller"):
        summary = run(tiny_config(epochs=1, **{"switch.epoch": 0}), tmp_path)
    assert summary["switch_epoch"] is None


@pytest.mark.parametrize(
    "changes",
    [
        {
            "plan.extra_batch_norm": True,
            "model.sync_batch_norm": True,
            "optimizer.ema": 0.9,
            "optimizer.clip_norm": 1.0,
        },
        {
            "optimizer.frobenius_decay": 1e-4,
            "model.dtype": "bfloat16",
            "loss.label_smoothing": 0.1,
            "data.on_device": False,
            "optimizer.name": "adamw",
            "switch.optimizer": "reset",
            "switch.learning_rate": "rewarmup",
            "schedule.warmup_epochs": 1.0,
            "schedule.peak": 1e-2,
            "ranks.method": "exact",
        },
    ],
    ids=lambda changes: ",".join(key.split(".")[-1] for key in changes),
)
def test_options_go_through_the_switch(tiny_config, tmp_path, changes):
    summary = run(tiny_config(epochs=3, **changes), tmp_path)
    assert summary["switch_epoch"] == 2
    losses = [line["train_loss"] for line in read_lines(tmp_path / "metrics.jsonl")]
    assert np.all(np.isfinite(losses)) and losses[-1] < losses[0]


def test_both_inputs_train_alike(tiny_config, tmp_path):
    """On-device and host input feed the same examples, augmented alike, to the same steps."""
    config = {"epochs": 1, "method": "full_rank"}
    run(tiny_config(**config), tmp_path / "device")
    run(tiny_config(**config, **{"data.on_device": False}), tmp_path / "host")
    device, host = (read_lines(tmp_path / name / "metrics.jsonl")[0] for name in ("device", "host"))
    np.testing.assert_allclose(device["train_loss"], host["train_loss"], rtol=1e-6)
    np.testing.assert_allclose(device["test_loss"], host["test_loss"], rtol=1e-5)


def test_divergence_stops_the_run_and_keeps_the_last_checkpoint(tiny_config, tmp_path):
    # The rate explodes in the second epoch, after the first checkpoint.
    schedule = {
        "schedule.name": "steps",
        "schedule.milestones": (0.25,),
        "schedule.decay": 1e30,
        "method": "full_rank",
    }
    with pytest.raises(DivergedError, match=r"the loss is (nan|inf|-inf) at step \d of epoch 1") as error:
        run(tiny_config(**schedule), tmp_path)
    assert "\n" not in str(error.value)
    assert (tmp_path / "checkpoints" / "1").is_dir()
    assert [line["epoch"] for line in read_lines(tmp_path / "metrics.jsonl")] == [0]


def test_no_checkpoint_holds_what_an_epochs_last_step_ruined(tiny_config, tmp_path, monkeypatch):
    def make_ruinous_optimizer(*args, **options):
        ruin = optax.scale_by_schedule(lambda step: jnp.where(step == 1, jnp.inf, 1.0))
        return optax.chain(make_optimizer(*args, **options), ruin)

    # One step an epoch; that of the second has a finite loss, and makes the parameters infinite.
    monkeypatch.setattr(experiment, "make_optimizer", make_ruinous_optimizer)
    config = tiny_config(method="full_rank", **{"data.train_examples": 16})
    with pytest.raises(
        DivergedError, match=r"^a gradient, or what came of it, is not finite at step 0 of epoch 1 "
    ):
        run(config, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        leaves = checkpointer.restore().leaves
    assert all(np.all(np.isfinite(leaf)) for leaf in leaves.values())

    # Without a good step in an epoch there is nothing to go on with.
    config.update_from_flattened_dict({"nonfinite": "skip"})
    with pytest.raises(DivergedError, match=r"^all 1 steps of epoch 1 went bad and were skipped"):
        run(config, tmp_path / "skip")


def test_bad_steps_are_skipped_and_counted_through_the_switch(tiny_config, tmp_path, monkeypatch):
    def load_bad_task(config):
        task = load_task(config)

        def train_loss(outputs, targets):
            # Where all examples of a device are of one class, as happens now and then.
            is_bad = jnp.all(targets[0] == targets)
            return jnp.where(is_bad, jnp.inf, 1.0) * task.train_loss(outputs, targets)

        return dataclasses.replace(task, train_loss=train_loss)

    monkeypatch.setattr(experiment, "load_task", load_bad_task)
    with pytest.warns(UserWarning, match=r"steps of epoch \d were skipped") as said:
        summary = run(tiny_config(epochs=3, nonfinite="skip", **{"optimizer.ema": 0.9}), tmp_path)
    lines = read_lines(tmp_path / "metrics.jsonl")
    skipped = [line["train_skipped_steps"] for line in lines]
    assert summary["switch_epoch"] == 2 and summary["skipped_steps"] == sum(skipped)
    assert [str(warning.message) for warning in said] == [
        f"{number} of 20 steps of epoch {epoch} were skipped: their loss or a gradient was not finite"
        for epoch, number in enumerate(skipped)
        if number
    ]
    assert skipped[0] and skipped[2], "in either phase"
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        leaves = checkpointer.restore().leaves
    assert all(np.all(np.isfinite(leaf)) for leaf in leaves.values())
    assert leaves["step"] == 60


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "cutlefish"}, "config.method = 'cutlefish': it must be one of cuttlefish, full_rank"),
        ({"data.name": "digitz"}, "digits"),
        ({"model.name": "resnet19"}, "resnet18"),
        ({"plan.keep": ("stage9/*",)}, "'stage9/\\*' matches no layer; near it: stage"),
        ({"plan.keep": ("*",)}, r"every layer would be kept \(7 layers: rule '\*'\)"),
        ({"plan.min_rank_ratio": 1.0}, "rank 16 of 16 would not make it smaller"),
        (
            {"plan.extra_batch_norm": True, "optimizer.frobenius_decay": 1e-4},
            "extra_batch_norm and Frobenius decay .* exclude each other",
        ),
        ({"batch_size": 63}, "batch_size 63 cannot be shared evenly by 8 devices"),
        ({"batch_size": 4096}, "less than one batch of 4096"),
        ({"epochs": 0}, "config.epochs = 0"),
        ({"switch.criterion": "soon"}, "config.switch.criterion = 'soon'"),
        ({"schedule.name": "polynomial"}, "schedule.name"),
        ({"optimizer.name": "adam"}, "optimizer.name"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(tiny_config, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        run(tiny_config(**changes), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "config.json").exists()
