import io
import pathlib
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image
from tfds_tools import write_dataset

from cuttlefish_jax.training.config import default_config
from cuttlefish_jax.training.data import ArraySource, DatasetNotPreparedError, load_dataset
from cuttlefish_jax.training.data.damage import DataError
from cuttlefish_jax.training.data.images.small import fit_images
from cuttlefish_jax.training.data.sources import in_memory


def data_config(name, **settings):
    data = default_config().data
    data.name = name
    data.update(settings)
    return data


def rows(source):
    """The examples as a set: their pixels and labels."""
    everything = in_memory(source).arrays
    return {
        (image.tobytes(), int(label))
        for image, label in zip(everything["image"], everything["label"], strict=True)
    }


def test_digits_is_the_whole_of_a_real_data_set():
    dataset = load_dataset(data_config("digits"))
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (1365, 72, 360)
    images = np.concatenate(
        [in_memory(s).arrays["image"] for s in (dataset.train, dataset.validation, dataset.test)]
    )
    assert images.shape == (1797, 32, 32, 3)
    assert images.dtype == np.uint8
    assert (images.min(), images.max()) == (0, 255)
    assert dataset.num_classes == 10


def test_digits_test_set_is_stratified_and_apart_from_the_training_data():
    dataset = load_dataset(data_config("digits"))
    counts = np.bincount(in_memory(dataset.test).arrays["label"])
    assert counts.min() >= 34
    assert counts.max() <= 37
    assert not rows(dataset.test) & rows(dataset.train)
    assert not rows(dataset.validation) & rows(dataset.train)


def test_digits_are_enlarged_and_their_statistics_are_of_the_original():
    small = load_dataset(data_config("digits", image_size=8, channels=1))
    large = load_dataset(data_config("digits", image_size=32, channels=3))
    pixels = in_memory(small.train).arrays["image"]
    np.testing.assert_array_equal(in_memory(large.train).arrays["image"][:, 2::4, 1::4, 2], pixels[..., 0])
    assert large.mean == small.mean * 3
    assert large.std == small.std * 3
    everything = np.concatenate([pixels, in_memory(small.validation).arrays["image"]]) / 255
    np.testing.assert_allclose(small.mean, everything.mean())
    np.testing.assert_allclose(small.std, everything.std())


def test_fewer_training_examples_are_a_subset_and_leave_the_rest_alone():
    whole = load_dataset(data_config("digits"))
    part = load_dataset(data_config("digits", train_examples=100))
    again = load_dataset(data_config("digits", train_examples=100))
    more = load_dataset(data_config("digits", train_examples=300))
    assert len(part.train) == 100
    assert rows(part.train) == rows(again.train)
    assert rows(part.train) < rows(more.train) < rows(whole.train)
    assert rows(part.validation) == rows(whole.validation)
    assert rows(part.test) == rows(whole.test)
    assert part.mean == whole.mean


def test_validation_examples_come_out_of_the_training_data():
    dataset = load_dataset(data_config("digits", validation_examples=437))
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (1000, 437, 360)


def test_prepared_records_are_read_without_tensorflow(prepared, made_up_image):
    dataset = load_dataset(data_config("fashion_mnist", data_dir=prepared, validation_examples=10))
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (30, 10, 10)
    assert not rows(dataset.validation) & rows(dataset.train)
    tested = dataset.test.read(np.arange(10))
    for i in range(10):
        expected = np.zeros((32, 32, 3), np.uint8)
        expected[2:30, 2:30] = made_up_image(40 + i)
        np.testing.assert_array_equal(tested["image"][i], expected)
        assert tested["label"][i] == i
    assert dataset.mean == (0.2860,) * 3


def test_records_one_by_one_at_once_and_pickled_are_the_same(prepared):
    train = load_dataset(data_config("fashion_mnist", data_dir=prepared)).train
    indices = np.array([7, 0, 7, 30])
    read = train.read(indices)
    assert read["image"].dtype == np.uint8
    assert read["label"].dtype == np.int32
    copied = pickle.loads(pickle.dumps(train))
    for i, index in enumerate(indices):
        for source in (train, copied, in_memory(train)):
            (one,) = zip(*source.read(np.array([index])).values(), strict=True)
            np.testing.assert_array_equal(one[0], read["image"][i])
            assert one[1] == read["label"][i]


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "fashion_mnist"])
def test_data_that_is_not_prepared_says_how_to_prepare_it(name, tmp_path):
    tfds_name = "svhn_cropped" if name == "svhn" else name
    command = f"tfds.data_source('{tfds_name}', data_dir='{tmp_path}')"
    with pytest.raises(DatasetNotPreparedError, match=r"pip install -e '\.\[prepare\]'") as error:
        load_dataset(data_config(name, data_dir=str(tmp_path)))
    assert command in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_data_prepared_in_another_format_says_so(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "fashion_mnist" / "3.0.1"
    info = (folder / "dataset_info.json").read_text()
    (folder / "dataset_info.json").write_text(info.replace('"array_record"', '"tfrecord"'))
    for path in pathlib.Path(folder).glob("*.array_record-*"):
        path.rename(path.with_name(path.name.replace("array_record", "tfrecord")))
    with pytest.raises(DatasetNotPreparedError, match="not as array_record; choose another data_dir"):
        load_dataset(data_config("fashion_mnist", data_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(name="cifar11"), "no data set 'cifar11'; did you mean cifar10"),
        (dict(name="mushrooms"), "choose from digits, cifar10, cifar100, svhn, fashion_mnist, imagenet"),
        (dict(train_examples=1366), "data.train_examples=1366, but digits has 1365"),
        (dict(validation_examples=1437), "leaves none of digits's 1437 training examples"),
        (dict(image_size=7), "images of 8x8 do not fit image_size 7"),
    ],
)
def test_impossible_settings_are_one_line_errors(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        load_dataset(data_config(**{"name": "digits", **settings}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"label": 10}, r"record 7 has label 10, expected 0 to 9: prepare the data set again$"),
        ({"label": -1}, r"record 7 has label -1, expected 0 to 9: prepare the data set again$"),
        ({"image": b"no image"}, r"record 7 cannot be read \(.+\): prepare the data set again$"),
    ],
)
def test_a_bad_record_is_named(damage, message, tmp_path):
    import tensorflow_datasets as tfds

    png = io.BytesIO()
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(png, format="PNG")
    rows = [{"image": png.getvalue(), "label": i % 10} for i in range(12)]
    rows[7] |= damage
    features = {
        "image": tfds.features.Image(shape=(28, 28, 1)),
        "label": tfds.features.ClassLabel(num_classes=10),
    }
    write_dataset(tmp_path, "fashion_mnist", "3.0.1", features, {"train": rows[:7], "test": rows})
    data = default_config().data
    data.update(dict(name="fashion_mnist", data_dir=str(tmp_path), channels=1))
    dataset = load_dataset(data)
    in_memory(dataset.train)
    assert len(dataset.test.read(np.arange(7))["label"]) == 7
    with pytest.raises(DataError, match=f"^fashion_mnist, split test: {message}") as error:
        in_memory(dataset.test)
    assert "\n" not in str(error.value)


def test_images_that_do_not_fit_are_found_on_load(prepared):
    with pytest.raises(ValueError, match="images of 28x28 do not fit image_size 24"):
        load_dataset(data_config("fashion_mnist", data_dir=prepared, image_size=24))


def test_fit_images_enlarges_by_a_whole_factor_then_pads():
    images = np.arange(1, 10, dtype=np.uint8).reshape(1, 3, 3, 1)
    fitted = fit_images(images, image_size=7, channels=2)
    expected = np.zeros((7, 7), np.uint8)
    expected[:6, :6] = np.kron(images[0, :, :, 0], np.ones((2, 2), np.uint8))
    np.testing.assert_array_equal(fitted[0, :, :, 0], expected)
    np.testing.assert_array_equal(fitted[0, :, :, 1], expected)


def test_fit_images_centres_images_that_are_not_square():
    fitted = fit_images(np.full((1, 2, 4, 3), 9, np.uint8), image_size=4, channels=3)
    np.testing.assert_array_equal(fitted[0, :, 0, 0], [0, 9, 9, 0])


def test_coloured_images_do_not_become_grey():
    with pytest.raises(ValueError, match="images of 3 channels cannot have 1"):
        fit_images(np.zeros((1, 4, 4, 3), np.uint8), image_size=4, channels=1)


def test_array_source_refuses_other_types():
    def refuse(image, label, message):
        with pytest.raises(ValueError, match=message):
            ArraySource({"image": image, "label": label})

    images, labels = np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, np.int32)
    refuse(images.astype(np.float32), labels, r"images must be uint8\[n, h, w, c\], got float32")
    refuse(images, labels.astype(np.int64), r"labels must be int32\[n\] or float32\[n\], got int64\(2,\)")
    refuse(images, np.zeros(3, np.int32), "'image' has 2 examples, but there are 3 labels")
