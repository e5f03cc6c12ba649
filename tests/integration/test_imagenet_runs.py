"""The ImageNet variants, decoded on the way, with all augmentations, on a handful of images, some damaged."""

import importlib
import json
import re
from collections import Counter

import pytest
from image_records import SCRAMBLED, TRUNCATED, make_records, write_imagenet

from cuttlefish_jax.training.data.damage import DataError
from cuttlefish_jax.training.loop import run

pytestmark = pytest.mark.slow

NUM = 20  # records, two of them damaged
SMALL = {
    "epochs": 2,
    "batch_size": 16,
    "data.image_size": 32,
    "data.workers": 0,
    # 32 training examples: two batches.
    "data.validation_examples": 8,
    "schedule.warmup_epochs": 0.0,
    "schedule.peak": 1e-3,
    "switch.criterion": "at_epoch",
    "switch.epoch": 1,
    "profile.enabled": False,
    # After one epoch the ranks are still those of random weights.
    "plan.rank_rule": "rank_ratio",
}
NETWORKS = {
    "resnet50": {
        "model.width": 8,
        "model.stage_sizes": (1, 1),
        "plan.factorize": (),
        # Where there is RandAugment, the recipe of the transformers, there is no colour jitter.
        "data.color_jitter": 0.4,
        "data.random_erasing": 0.5,
        "data.mixup": 0.2,
        "data.cutmix": 1.0,
        "data.workers": 1,
    },
    "deit_base": {
        "model.width": 32,
        "model.depth": 1,
        "model.heads": 2,
        "model.patch": 8,
        "data.random_erasing": 0.5,
    },
}


def named(records, prefix):
    """The records under other names, so that the log's messages tell them apart."""
    return [record | {"file_name": f"{prefix}{i}.JPEG".encode()} for i, record in enumerate(records)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("tfds")
    records = make_records(NUM)
    write_imagenet(
        data_dir, {"train": named(2 * records, "train"), "validation": named(records, "validation")}
    )
    return str(data_dir)


def small(name, data_dir, **changes):
    config = importlib.import_module(f"configs.{name}").get_config()
    config.update_from_flattened_dict(SMALL | {"data.data_dir": str(data_dir)} | NETWORKS[name] | changes)
    return config


@pytest.mark.parametrize("name", [pytest.param("resnet50", marks=pytest.mark.large), "deit_base"])
def test_the_recipe_goes_through_the_switch_and_names_every_damaged_image_once(
    name, prepared, tmp_path, caplog
):
    config = small(name, prepared)
    summary = run(config, tmp_path)

    assert summary["switch_epoch"] == 1 and summary["dataset"] == "imagenet"
    assert summary["params_final"] < summary["params_full"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["full_rank", "low_rank"]
    # The targets of mixed images are no classes, and their accuracy would mean nothing.
    assert "train_accuracy" not in lines[0]

    warned = Counter(
        re.findall(r"record \d+ \((\w+)\.JPEG\) cannot be decoded, and is left out", caplog.text)
    )
    assert set(warned.values()) == {1}
    damaged = {"train": (TRUNCATED, SCRAMBLED, NUM + TRUNCATED, NUM + SCRAMBLED)}
    damaged["validation"] = damaged["train"][:2]
    of_tests = {f"validation{i}" for i in damaged["validation"]}
    of_training = {f"train{i}" for i in damaged["train"]}
    # Two epochs of three copies of a third of the examples do not meet them all.
    assert of_tests < set(warned) <= of_tests | of_training
    if config.data.repeated_augmentation == 1:
        assert of_training < set(warned)


def test_too_many_damaged_images_end_the_run(tmp_path):
    # Every other one: many in a row would be an error of its own.
    (whole,) = make_records(1)
    records = [whole | {"image": b""} if i % 2 else whole for i in range(42)]
    write_imagenet(tmp_path, {"train": named(records, "train"), "validation": named(records[:2], "test")})
    config = small("resnet50", tmp_path, method="full_rank", **{"data.workers": 0})
    with pytest.raises(
        DataError,
        match=r"^11 of 34 examples cannot be decoded, the last of them record \d+ \(train\d+.JPEG\)",
    ) as error:
        run(config, tmp_path / "run")
    assert "\n" not in str(error.value)
