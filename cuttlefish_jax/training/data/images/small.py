"""Data sets of small images, all of one shape: scikit-learn's digits, and several of TFDS."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from cuttlefish_jax.training.data.damage import DataError, check_labels
from cuttlefish_jax.training.data.images.dataset import Dataset
from cuttlefish_jax.training.data.prepared import open_records, split_examples
from cuttlefish_jax.training.data.sources import Arrays, ArraySource, Seed, read_records


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


def load_digits(data: Any) -> Dataset:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels; a fifth of each class is the test set."""
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


def load_tfds(data: Any) -> Dataset:
    """A data set of ``TFDS_IMAGES``, by its name there."""
    spec = TFDS_IMAGES[data.name]
    records = {split: open_records(spec.tfds_name, split, data.data_dir) for split in ("train", "test")}
    train, validation = split_examples(data, len(records["train"]))

    def source(split: str, indices: np.ndarray) -> RecordSource:
        return RecordSource(
            records=records[split],
            indices=indices,
            image_size=data.image_size,
            channels=data.channels,
            num_classes=spec.num_classes,
            where=f"{data.name}, split {split}",
        )

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


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Grey statistics repeated to all channels, as the images are."""
    return tuple(float(v) for v in values) * (channels // len(values))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class RecordSource:
    """Examples decoded from disk when they are read, and made to fit the model.

    Attributes:
      records: ``records[i]`` is a mapping with ``"image"`` ``uint8[h, w, c]`` and ``"label"``; e.g. what
        ``tfds.data_source`` returns. All images have one shape.
      indices: ``int[n]``, the records that are this source's examples.
      image_size: height and width that images are enlarged and padded to.
      channels: that grey images are repeated to.
      num_classes: labels are ``0 ... num_classes - 1``.
      where: what the records are called in messages.
    """

    records: Sequence[Any]
    indices: np.ndarray
    image_size: int
    channels: int
    num_classes: int
    where: str

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.indices)

    def read(
        self,
        indices: np.ndarray,
        *,
        seeds: Sequence[Seed] | None = None,
        batch: np.ndarray | None = None,
    ) -> Arrays:
        """See :meth:`Source.read`.

        Raises:
          DataError: if a label is none of the classes', or an image cannot be decoded: of these few megabytes
            there is no reason to put up with a part.
        """
        numbers = self.indices[indices]
        rows = self._rows(numbers)
        images = np.stack([row["image"] for row in rows])
        labels = np.asarray([row["label"] for row in rows], np.int32)
        check_labels(labels, self.num_classes - 1, lambda i: f"{self.where}: record {numbers[i]}")
        return {
            "image": fit_images(images, image_size=self.image_size, channels=self.channels),
            "label": labels,
        }

    def _rows(self, numbers: np.ndarray) -> Sequence[Any]:
        try:
            return read_records(self.records, numbers)
        except Exception as error:  # of whatever type the decoder that TFDS found has
            if len(numbers) > 1:
                return [row for number in numbers for row in self._rows(np.array([number]))]
            problem = " ".join(str(error).split())
            raise DataError(
                f"{self.where}: record {numbers[0]} cannot be read ({problem}): prepare the data set again"
            ) from error


def fit_images(images: np.ndarray, *, image_size: int, channels: int) -> np.ndarray:
    """Enlarges, pads and colours images to the shape that a model takes.

    Images are enlarged by the largest whole factor that fits (each pixel repeated), then centred on zeros;
    grey ones are repeated to all channels.

    Args:
      images: ``uint8[n, h, w, c]``.
      image_size: height and width of the result.
      channels: of the result.

    Returns:
      ``uint8[n, image_size, image_size, channels]``.

    Raises:
      ValueError: if the images are larger than ``image_size``, or coloured and ``channels`` are not theirs.
    """
    _, height, width, depth = images.shape
    if max(height, width) > image_size:
        raise ValueError(f"images of {height}x{width} do not fit image_size {image_size}")
    if depth not in (1, channels):
        raise ValueError(f"images of {depth} channels cannot have {channels}; only grey ones can be repeated")
    factor = image_size // max(height, width)
    if factor > 1:
        images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    rows, columns = (image_size - factor * side for side in (height, width))
    if rows or columns:
        around = [(0, 0), (rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2), (0, 0)]
        images = np.pad(images, around)
    return images.repeat(channels, axis=3) if depth != channels else images
