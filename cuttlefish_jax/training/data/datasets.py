"""The data sets, by name: where they come from, how they are split, and their pixel statistics."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np

from cuttlefish_jax.training.data.sources import ArraySource, RecordSource, Source, fit_images

DEFAULT_VALIDATION_SHARE = 0.05


class DatasetNotPreparedError(ValueError):
    """A data set has to be downloaded and written as array_record first; the message is how."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set, split. All images have the shape that the configuration asked for.

    Attributes:
      name: as in the configuration.
      num_classes: labels are ``0 ... num_classes - 1``.
      train: what a run trains on.
      validation: held out of the training data, to choose the best epoch by.
      test: for the final numbers alone.
      mean: per channel, of pixels scaled to [0, 1], over the original training images.
      std: likewise.
    """

    name: str
    num_classes: int
    train: Source
    validation: Source
    test: Source
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class _TfdsImages:
    """A TFDS data set with splits "train" and "test" and features "image" and "label"."""

    tfds_name: str
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


# Statistics of the training images as published, so that nobody has to read all of them to start. SVHN's
# are of its 73,257 "train" images: the half million "extra" ones are not used.
TFDS_IMAGES = {
    "cifar10": _TfdsImages("cifar10", 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": _TfdsImages("cifar100", 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": _TfdsImages("svhn_cropped", 10, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "fashion_mnist": _TfdsImages("fashion_mnist", 10, (0.2860,), (0.3530,)),
}
DATASETS = ("digits", *TFDS_IMAGES, "imagenet")


def load_dataset(data: Any) -> Dataset:
    """Opens the data set that ``config.data`` describes.

    The splits do not depend on the run's seed, so that runs with different seeds can be compared.

    Args:
      data: ``config.data`` of a run's ``ConfigDict``; its keys ``name``, ``data_dir``, ``image_size``,
        ``channels``, ``train_examples`` and ``validation_examples`` are used.

    Returns:
      A :class:`Dataset`. "digits" is in memory; the others are read from disk when they are asked for.

    Raises:
      DatasetNotPreparedError: if the files are missing; the message is the command that makes them.
      ValueError: if the name is unknown, the images do not fit, or more examples are asked for than are
        there.

    Example:
      >>> from cuttlefish_jax.training.config import default_config
      >>> data = default_config().data
      >>> data.name = "digits"
      >>> dataset = load_dataset(data)
      >>> len(dataset.train), len(dataset.validation), len(dataset.test)
      (1365, 72, 360)
      >>> dataset.train.read(np.arange(2))["image"].shape
      (2, 32, 32, 3)
    """
    if data.name not in DATASETS:
        near = difflib.get_close_matches(data.name, DATASETS)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(DATASETS)}"
        raise ValueError(f"no data set {data.name!r}; {hint}")
    if data.name == "imagenet":
        from cuttlefish_jax.training.data.imagenet import load_imagenet

        return load_imagenet(data)
    return _load_digits(data) if data.name == "digits" else _load_tfds(data)


def _load_digits(data: Any) -> Dataset:
    from sklearn import datasets, model_selection

    pixels, labels = datasets.load_digits(return_X_y=True)
    images = np.rint(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    trainable, tested = model_selection.train_test_split(
        np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels
    )
    trainable, tested = np.asarray(trainable), np.asarray(tested)
    original = images[trainable] / 255
    fitted = fit_images(images, image_size=data.image_size, channels=data.channels)
    everything = ArraySource({"image": fitted, "label": labels.astype(np.int32)})
    train, validation = split_examples(data, len(trainable))
    return Dataset(
        name=data.name,
        num_classes=10,
        train=everything.take(trainable[train]),
        validation=everything.take(trainable[validation]),
        test=everything.take(tested),
        mean=_per_channel([original.mean()], data.channels),
        std=_per_channel([original.std()], data.channels),
    )


def _load_tfds(data: Any) -> Dataset:
    spec = TFDS_IMAGES[data.name]
    records = {split: open_records(spec.tfds_name, split, data.data_dir) for split in ("train", "test")}
    train, validation = split_examples(data, len(records["train"]))

    def source(split: str, indices: np.ndarray) -> RecordSource:
        return RecordSource(records[split], indices, data.image_size, data.channels)

    dataset = Dataset(
        name=data.name,
        num_classes=spec.num_classes,
        train=source("train", train),
        validation=source("train", validation),
        test=source("test", np.arange(len(records["test"]))),
        mean=_per_channel(spec.mean, data.channels),
        std=_per_channel(spec.std, data.channels),
    )
    dataset.train.read(np.arange(1))  # an image that does not fit is an error here, not in a reader thread
    return dataset


def open_records(name: str, split: str, data_dir: str, *, encoded: Sequence[str] = ()) -> Sequence[Any]:
    """The prepared records of a TFDS split; never starts a download, as ``tfds.data_source`` would.

    Features named in ``encoded`` are left as they lie on disk.
    """
    import tensorflow_datasets as tfds  # a second and more to import: not for those who use "digits"

    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError as error:  # without TensorFlow it knows GLUE from its files alone
        where = data_dir or "the data_dir that is TFDS's default"
        raise DatasetNotPreparedError(_how_to_prepare(name, data_dir, f"not in {where}")) from error
    if not builder.is_prepared():
        raise DatasetNotPreparedError(_how_to_prepare(name, data_dir, f"not in {builder.data_dir}"))
    try:
        # A decorator of TFDS hides the parameters from the type checker.
        decoders = {feature: tfds.decode.SkipDecoding() for feature in encoded}
        return builder.as_data_source(split=split, decoders=decoders)  # pyright: ignore[reportCallIssue]
    except NotImplementedError as error:
        found = f"in {builder.data_dir}, but not as array_record; choose another data_dir"
        raise DatasetNotPreparedError(_how_to_prepare(name, data_dir, found)) from error


def _how_to_prepare(name: str, data_dir: str, found: str) -> str:
    # Not `tfds build`: that command also needs apache-beam.
    where = f", data_dir={data_dir!r}" if data_dir else ""
    return (
        f"data set {name!r} is {found}. Prepare it once: pip install -e '.[prepare]' && "
        f'python -c "import tensorflow_datasets as tfds; tfds.data_source({name!r}{where})"'
    )


def split_examples(data: Any, num_examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and the validation examples, the same in every run.

    The validation examples do not depend on ``train_examples`` either.
    """
    held_out = data.validation_examples or max(1, round(DEFAULT_VALIDATION_SHARE * num_examples))
    left = num_examples - held_out
    if left < 1:
        raise ValueError(
            f"data.validation_examples={held_out} leaves none of {data.name}'s {num_examples} training "
            "examples to train on"
        )
    if data.train_examples > left:
        raise ValueError(
            f"data.train_examples={data.train_examples}, but {data.name} has {left} (of {num_examples}, "
            f"{held_out} are held out for validation)"
        )
    # RandomState, because NumPy promises that its stream never changes; it does not for default_rng.
    order = np.random.RandomState(0).permutation(num_examples)
    train = order[held_out:][: data.train_examples or left]
    return np.sort(train), np.sort(order[:held_out])


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Grey statistics repeated to all channels, as the images are."""
    return tuple(float(v) for v in values) * (channels // len(values))
