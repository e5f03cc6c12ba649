"""Every configuration, two epochs on a handful of examples at reduced width, through the switch."""

import importlib
import json

import numpy as np
import pytest

from cuttlefish_jax.training.loop import run

pytestmark = pytest.mark.slow

SMALL = {
    "epochs": 2,
    "batch_size": 16,
    "data.train_examples": 48,
    "data.validation_examples": 1300,
    "schedule.warmup_epochs": 0.0,
    "schedule.peak": 1e-3,
    "switch.criterion": "at_epoch",
    "switch.epoch": 1,
    "profile.enabled": False,
    # After one epoch the ranks are still those of random weights.
    "plan.rank_rule": "rank_ratio",
}
CONVOLUTIONAL = {"model.width": 8}
RESIDUAL = CONVOLUTIONAL | {"model.stage_sizes": (1, 1)}
BOTTLENECKS = CONVOLUTIONAL | {"model.stage_sizes": (1, 1, 1, 1)}  # the recipe's patterns name stage 4
PATCHES = {"model.width": 32, "model.depth": 1, "model.patch": 8}
NETWORKS = {
    "resnet18": RESIDUAL,
    "vgg19": CONVOLUTIONAL,
    "resnet50": BOTTLENECKS,
    "wide_resnet50_2": BOTTLENECKS,
    "deit_base": PATCHES | {"model.heads": 2},
    "resmlp_s36": PATCHES,
}


def small(name, argument, **changes):
    config = importlib.import_module(f"configs.{name}").get_config(argument)
    config.update_from_flattened_dict(SMALL | changes)
    return config


def check(summary, workdir):
    assert summary["switch_epoch"] == 1
    assert summary["ranks"]
    assert summary["params_final"] < summary["params_full"]
    phases = [json.loads(line)["phase"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert phases == ["full_rank", "low_rank"]


def some(names, *, large):
    """Parameters of a test, of which some are for the large suite: they differ from another in one number."""
    return [pytest.param(name, marks=[pytest.mark.large] if name in large else []) for name in names]


# VGG is tried nowhere else; the quickstart has the ResNet, test_imagenet_runs.py the recipes of others.
@pytest.mark.parametrize("name", some(NETWORKS, large=NETWORKS.keys() - {"vgg19"}))
def test_small_images(name, tmp_path):
    config = small(name, "digits", **NETWORKS[name])
    summary = run(config, tmp_path)
    assert summary["model"] == name
    check(summary, tmp_path)


# A few steps of the same are in tests/training/test_parallelism.py.
@pytest.mark.large
def test_gradients_of_parts_of_a_batch_are_those_of_the_batch(tmp_path):
    """Of a network without batch norm, which would normalise every part by itself."""
    exact = {"model.drop_path": 0.0, "data.mixup": 0.0, "data.cutmix": 0.0, "model.dtype": "float32"}
    losses = []
    for parts in (1, 2):
        changes = NETWORKS["deit_base"] | exact | {"optimizer.accumulation_steps": parts}
        run(small("deit_base", "digits", **changes), tmp_path / f"{parts}")
        lines = (tmp_path / f"{parts}" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["train_loss"] for line in lines])
    whole, in_parts = np.asarray(losses)
    assert len(whole) == 2 and whole[1] != whole[0]
    np.testing.assert_allclose(in_parts, whole, rtol=1e-5)


# .ci/run has the quickstart itself.
@pytest.mark.parametrize("name", some(["quickstart", "fashion_mnist"], large={"quickstart"}))
def test_examples_of_the_readme(name, tmp_path):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    config.update_from_flattened_dict(
        SMALL | RESIDUAL | {"data.name": "digits", "data.image_size": 8, "plan.keep": ()}
    )
    check(run(config, tmp_path), tmp_path)


METHODS = ["pufferfish", "si_fd", "vanilla_stable_rank", "accumulative_rank", "energy"]


@pytest.mark.parametrize(
    "method", some(METHODS, large={"vanilla_stable_rank", "accumulative_rank", "energy"})
)
def test_every_method_switches(method, tiny_config, tmp_path):
    config = tiny_config(
        **{
            "method": method,
            "epochs": 3,
            "pufferfish.switch_share": 2 / 3,
            # The data is simple, and half of the energy is in a few directions from the first step on.
            "model.width": 16,
        }
    )
    summary = run(config, tmp_path)
    assert summary["method"] == method
    assert summary["switch_epoch"] == (0 if method == "si_fd" else 2)
    assert summary["params_final"] < summary["params_full"]
    plan = json.loads((tmp_path / "plan.json").read_text())
    full_rank = {
        k["path"]: min(k["shape"][-1], k["shape"][0]) for k in plan["kernels"] if len(k["shape"]) == 2
    }
    assert not full_rank.keys() & summary["ranks"].keys()  # the classifier is kept
