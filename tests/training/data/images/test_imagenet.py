import dataclasses
import pickle

import numpy as np
import pytest
from image_records import CMYK, GREY, SCRAMBLED, TRUNCATED, encode, make_records, tone, write_imagenet

from cuttlefish_jax.errors import UserError
from cuttlefish_jax.training.config import default_config
from cuttlefish_jax.training.data import DatasetNotPreparedError, EvalInput, TrainInput
from cuttlefish_jax.training.data.damage import DataError
from cuttlefish_jax.training.data.images.augment import EvalTransform, RandAugment, TrainTransform
from cuttlefish_jax.training.data.images.imagenet import MEAN, EncodedImageSource, load_imagenet, transforms

NUM_TRAIN, NUM_TEST = 20, 6


def data_config(**settings):
    data = default_config().data
    data.update(dict(name="imagenet", image_size=16, on_device=False, validation_examples=4) | settings)
    return data


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A ``data_dir`` of 20 training and 6 validation images, two of the former damaged."""
    data_dir = tmp_path_factory.mktemp("tfds")
    records = make_records(NUM_TRAIN)
    write_imagenet(data_dir, {"train": records, "validation": records[13 : 13 + NUM_TEST]})
    return str(data_dir)


def source(records=None, **options):
    """All training records, without TFDS."""
    records = make_records(NUM_TRAIN) if records is None else records
    settings = dict(
        records=records,
        indices=np.arange(len(records)),
        num_classes=1000,
        training=TrainTransform(size=16, randaugment=RandAugment()),
        evaluation=EvalTransform(size=16),
    )
    return EncodedImageSource(**(settings | options))


def test_imagenet_is_read_from_tfds(prepared):
    dataset = load_imagenet(data_config(data_dir=prepared))
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (16, 4, 6)
    assert (dataset.num_classes, dataset.mean) == (1000, MEAN)
    held_out = set(dataset.validation.indices.tolist())
    assert held_out | set(dataset.train.indices.tolist()) == set(range(NUM_TRAIN))
    test = dataset.test.read(np.arange(NUM_TEST))
    assert sorted(test) == ["damaged", "image", "label"]
    assert {name: (array.shape, array.dtype) for name, array in test.items()} == {
        "image": ((6, 16, 16, 3), np.uint8),
        "label": ((6,), np.int32),
        "damaged": ((6,), np.int32),
    }
    np.testing.assert_array_equal(test["label"], 3 * np.arange(13, 19))
    np.testing.assert_allclose(test["image"].mean(axis=(1, 2, 3)), tone(np.arange(13, 19)), atol=1.5)
    assert (test["damaged"] == -1).all()


def test_labels_stay_with_their_images_whatever_the_colours():
    good = np.array([0, GREY, 1, CMYK, 19])
    examples = source().read(good)
    np.testing.assert_array_equal(examples["label"], 3 * good)
    np.testing.assert_allclose(examples["image"].mean(axis=(1, 2)), np.tile(tone(good)[:, None], 3), atol=1.5)


def test_png_files_are_read_too():
    records = make_records(2)
    records[1]["image"] = encode(1, format="PNG")
    examples = source(records).read(np.arange(2))
    assert (examples["damaged"] == -1).all()
    np.testing.assert_allclose(examples["image"].mean(axis=(1, 2, 3)), tone(np.arange(2)), atol=1.5)


def test_a_damaged_image_is_replaced_by_the_next_one_and_reported():
    asked = np.array([2, TRUNCATED, SCRAMBLED, 0])
    for seeds in (None, [(0, 0, int(i)) for i in asked]):
        examples = source().read(asked, seeds=seeds)
        np.testing.assert_array_equal(examples["damaged"], [-1, TRUNCATED, SCRAMBLED, -1])
        np.testing.assert_array_equal(examples["label"], 3 * np.array([2, TRUNCATED + 1, SCRAMBLED + 1, 0]))
    evaluated, others = (source().read(np.array(i)) for i in (asked, [2, TRUNCATED + 1, SCRAMBLED + 1, 0]))
    np.testing.assert_array_equal(evaluated["image"], others["image"])


def test_indices_are_those_of_the_source_not_of_the_records():
    part = source(indices=np.array([19, 4, TRUNCATED, 8]))
    examples = part.read(np.arange(4))
    np.testing.assert_array_equal(examples["damaged"], [-1, -1, 2, -1])
    np.testing.assert_array_equal(examples["label"], [57, 12, 24, 24])
    assert part.name_of(2) == "record 3 (n0003.JPEG)"
    # After the last one comes the first.
    wrapped = source(indices=np.array([19, 4, TRUNCATED])).read(np.array([2]))
    np.testing.assert_array_equal(wrapped["label"], [57])


def test_many_damaged_images_in_a_row_are_an_error():
    records = [dict(record, image=b"GIF89a") for record in make_records(30)]
    with pytest.raises(
        DataError, match=r"record 7 \(n0007.JPEG\) and the 15 examples after it cannot be"
    ) as error:
        source(records).read(np.array([7]))
    assert isinstance(error.value, UserError)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("label", [-1, 1000])
def test_a_label_out_of_range_names_the_record_and_the_range(label):
    records = make_records(3)
    records[1]["label"] = label
    with pytest.raises(
        DataError, match=rf"record 1 \(n0001.JPEG\) has label {label}, expected 0 to 999"
    ) as error:
        source(records).read(np.arange(3))
    assert "\n" not in str(error.value)


def test_an_error_in_the_augmentation_is_not_taken_for_damage(monkeypatch):
    def broken(*args, **options):
        raise ValueError("a mistake in the code")

    monkeypatch.setattr("cuttlefish_jax.training.data.images.augment.color_jitter", broken)
    jittering = source(training=TrainTransform(size=16, color_jitter=0.4))
    with pytest.raises(ValueError, match="a mistake in the code"):
        jittering.read(np.arange(2), seeds=[(0,), (1,)])


def test_training_images_are_a_function_of_their_seeds():
    seeds = [(0, 2, 5), (0, 2, 25), (0, 2, 5), (0, 3, 5)]
    images = source().read(np.full(4, 5), seeds=seeds)["image"]
    np.testing.assert_array_equal(images[0], images[2])
    assert not np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[3])
    alone = pickle.loads(pickle.dumps(source())).read(np.array([5]), seeds=seeds[1:2])
    np.testing.assert_array_equal(alone["image"][0], images[1])


def test_evaluation_images_are_always_the_same():
    first, second = (source().read(np.arange(3))["image"] for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_pipeline_reads_it(prepared, workers):
    dataset = load_imagenet(data_config(data_dir=prepared, validation_examples=4))
    # The damage is taken off the batches here, where a DamageLog does in a run.
    train = TrainInput(dataset.train, batch_size=8, seed=0, on_device=False, workers=workers)
    evaluation = EvalInput(dataset.test, batch_size=8, on_device=False)
    try:
        batch = next(train.epoch(0))
        expected = dataset.train.read(
            np.asarray(batch["index"]).ravel(),
            seeds=[(0, 0, int(i)) for i in np.asarray(batch["index"]).ravel()],
        )
        np.testing.assert_array_equal(np.asarray(batch["image"])[:, 0], expected["image"])
        np.testing.assert_array_equal(np.asarray(batch["label"]).ravel(), expected["label"])
        (tested,) = evaluation.batches()
        labels = np.asarray(tested["label"])[np.asarray(tested["weight"]) > 0]
        np.testing.assert_array_equal(labels, 3 * np.arange(13, 19))
    finally:
        train.close()
        evaluation.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_its_errors_come_through_the_pipeline(prepared, workers):
    few_classes = dataclasses.replace(load_imagenet(data_config(data_dir=prepared)).train, num_classes=2)
    train = TrainInput(few_classes, batch_size=8, seed=0, on_device=False, workers=workers)
    try:
        with pytest.raises(
            DataError, match=r"^record \d+ \(n\d+.JPEG\) has label \d+, expected 0 to 1: prepare"
        ):
            next(train.epoch(0))
    finally:
        train.close()


def test_the_configuration_becomes_transforms():
    settings = dict(interpolation="bicubic", randaugment="m7-mstd0.5-inc1", crop_ratio=0.9, color_jitter=0.4)
    training, evaluation = transforms(data_config(**settings))
    assert evaluation == EvalTransform(size=16, crop_ratio=0.9, interpolation="bicubic")
    assert training == TrainTransform(
        size=16, interpolation="bicubic", randaugment=RandAugment(magnitude=7.0), fill=(124, 116, 104)
    )
    # Colour jitter is for those who go without RandAugment.
    training, _ = transforms(data_config(color_jitter=0.4))
    assert (training.randaugment, training.color_jitter) == (None, 0.4)


def test_the_fill_colour_is_the_mean():
    training, _ = transforms(data_config())
    np.testing.assert_allclose(np.array(training.fill) / 255, MEAN, atol=0.5 / 255)


def test_data_that_is_not_prepared_says_where_its_files_go(tmp_path):
    with pytest.raises(
        DatasetNotPreparedError, match=r"tfds.data_source\('imagenet2012', data_dir="
    ) as error:
        load_imagenet(data_config(data_dir=str(tmp_path)))
    assert f"put them into {tmp_path}/downloads/manual" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(channels=1), "data.channels=1, but imagenet's images have 3"),
        (
            dict(on_device=True),
            "data.on_device=True, but imagenet is decoded while a run trains: set it to False",
        ),
        (dict(train_examples=17), "data.train_examples=17, but imagenet has 16"),
        (dict(randaugment="m9"), "no randaugment 'm9'; only increasing operations are there"),
        (dict(interpolation="nearest"), "no interpolation 'nearest'; choose from bilinear, bicubic"),
        (dict(crop_ratio=0.0), "crop_ratio 0: expected more than 0"),
        (dict(color_jitter=-0.1), "color_jitter -0.1: expected at least 0"),
    ],
)
def test_impossible_settings_are_one_line_errors(prepared, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        load_imagenet(data_config(data_dir=prepared, **settings))
    assert "\n" not in str(error.value)


def test_sources_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        source().num_classes = 5
