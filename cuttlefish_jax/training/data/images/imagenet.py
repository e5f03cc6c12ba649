"""ImageNet (ILSVRC 2012), decoded and augmented on the host while a run trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from cuttlefish_jax.training.data.damage import DAMAGED, DataError, check_labels
from cuttlefish_jax.training.data.images.augment import EvalTransform, RandAugment, TrainTransform
from cuttlefish_jax.training.data.images.dataset import Dataset
from cuttlefish_jax.training.data.images.decode import DecodingError, open_image
from cuttlefish_jax.training.data.prepared import DatasetNotPreparedError, open_records, split_examples
from cuttlefish_jax.training.data.sources import Arrays, Seed, read_records

TFDS_NAME = "imagenet2012"
NUM_CLASSES = 1000
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
FILL = (124, 116, 104)  # the mean, as a colour
# If not one of so many examples in a row can be decoded, the files are something else, not damaged.
MAX_IN_A_ROW = 16


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class EncodedImageSource:
    """Images that lie encoded on disk, decoded and transformed when they are read.

    An image that cannot be decoded is replaced by the next one of the source, with its label; what
    :meth:`read` returns says so.

    Attributes:
      records: ``records[i]`` is a mapping with ``"image"`` (JPEG or PNG ``bytes``), ``"label"`` and, if
        there is one, ``"file_name"``.
      indices: ``int[n]``, the records that are this source's examples.
      num_classes: labels are ``0 ... num_classes - 1``.
      training: the transform of examples that are read with seeds.
      evaluation: of those without.
    """

    records: Sequence[Any]
    indices: np.ndarray
    num_classes: int
    training: TrainTransform
    evaluation: EvalTransform

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.indices)

    def name_of(self, index: int) -> str:
        """What an example is called in messages: its number on disk, and its file."""
        (record,) = read_records(self.records, self.indices[[index]])
        return self._name(index, record)

    def read(
        self,
        indices: np.ndarray,
        *,
        seeds: Sequence[Seed] | None = None,
        batch: np.ndarray | None = None,
    ) -> Arrays:
        """The examples at ``indices``; see :meth:`~cuttlefish_jax.training.data.sources.Source.read`.

        Returns:
          ``"image"`` ``uint8[b, size, size, 3]``, ``"label"`` ``int32[b]``, and ``"damaged"`` ``int32[b]``:
          the index of an example in whose place there is another one, -1 for the others.

        Raises:
          DataError: if a label is none of the classes', or many examples in a row cannot be decoded.
        """
        size = self.evaluation.size
        images = np.empty((len(indices), size, size, 3), np.uint8)
        labels = np.empty(len(indices), np.int32)
        damaged = np.full(len(indices), -1, np.int32)
        for i, record in enumerate(read_records(self.records, self.indices[indices])):
            index, rng = int(indices[i]), None if seeds is None else np.random.default_rng(seeds[i])
            image = self._decode(record, rng)
            if image is None:
                damaged[i] = index
                index, record, image = self._next(index, rng)
            images[i], labels[i] = np.asarray(image), self._label(index, record)
        return {"image": images, "label": labels, DAMAGED: damaged}

    def _decode(self, record: Any, rng: np.random.Generator | None) -> Image.Image | None:
        """The transformed image; None if it is damaged."""
        try:
            image = open_image(record["image"])
            return self.evaluation(image) if rng is None else self.training(image, rng)
        except DecodingError:
            return None

    def _next(self, index: int, rng: np.random.Generator | None) -> tuple[int, Any, Image.Image]:
        """The first example after ``index`` that can be decoded."""
        for step in range(1, MAX_IN_A_ROW):
            other = (index + step) % len(self)
            (record,) = read_records(self.records, self.indices[[other]])
            image = self._decode(record, rng)
            if image is not None:
                return other, record, image
        raise DataError(
            f"{self.name_of(index)} and the {MAX_IN_A_ROW - 1} examples after it cannot be decoded: "
            "prepare the data set again"
        )

    def _label(self, index: int, record: Any) -> int:
        label = np.asarray([record["label"]], np.int32)
        check_labels(label, self.num_classes - 1, lambda _: self._name(index, record))
        return int(label[0])

    def _name(self, index: int, record: Any) -> str:
        file_name = record.get("file_name", b"")
        file_name = file_name.decode() if isinstance(file_name, bytes) else str(file_name)
        return f"record {self.indices[index]}" + (f" ({file_name})" if file_name else "")


def load_imagenet(data: Any) -> Dataset:
    """Opens ILSVRC 2012 as TFDS prepares it; its validation images are the test set.

    Args:
      data: ``config.data`` of a run's ``ConfigDict``; its keys ``data_dir``, ``image_size``, ``channels``,
        ``train_examples``, ``validation_examples``, ``on_device``, ``interpolation``, ``crop_ratio``,
        ``randaugment`` and ``color_jitter`` are used.

    Raises:
      DatasetNotPreparedError: if the files are missing; the message says how to come by them.
      ValueError: if an option makes no sense, or more examples are asked for than are there.
      DataError: if the first training images cannot be decoded.
    """
    if data.channels != 3:
        raise ValueError(f"data.channels={data.channels}, but imagenet's images have 3")
    if data.on_device:
        raise ValueError("data.on_device=True, but imagenet is decoded while a run trains: set it to False")
    training, evaluation = transforms(data)
    records = {split: _open(split, data.data_dir) for split in ("train", "validation")}
    train, validation = split_examples(data, len(records["train"]))

    def source(split: str, indices: np.ndarray) -> EncodedImageSource:
        return EncodedImageSource(
            records=records[split],
            indices=indices,
            num_classes=NUM_CLASSES,
            training=training,
            evaluation=evaluation,
        )

    dataset = Dataset(
        name=data.name,
        num_classes=NUM_CLASSES,
        train=source("train", train),
        validation=source("train", validation),
        test=source("validation", np.arange(len(records["validation"]))),
        mean=MEAN,
        std=STD,
    )
    dataset.train.read(np.arange(1))  # what is no image at all is an error here, not in a reader thread
    return dataset


def transforms(data: Any) -> tuple[TrainTransform, EvalTransform]:
    """The transforms that ``config.data`` describes, for training and for evaluation.

    Colour jitter is left out where there is RandAugment, which changes colours too; so does timm.

    Args:
      data: its keys ``image_size``, ``interpolation``, ``crop_ratio``, ``randaugment`` and
        ``color_jitter`` are used.

    Raises:
      ValueError: if an option makes no sense.
    """
    size, interpolation = data.image_size, data.interpolation
    randaugment = RandAugment.parse(data.randaugment) if data.randaugment else None
    training = TrainTransform(
        size=size,
        interpolation=interpolation,
        randaugment=randaugment,
        color_jitter=0.0 if randaugment else data.color_jitter,
        fill=FILL,
    )
    return training, EvalTransform(size=size, interpolation=interpolation, crop_ratio=data.crop_ratio)


def _open(split: str, data_dir: str) -> Sequence[Any]:
    try:
        return open_records(TFDS_NAME, split, data_dir, encoded=("image",))
    except DatasetNotPreparedError as error:
        manual = f"{data_dir or '~/tensorflow_datasets'}/downloads/manual"
        raise DatasetNotPreparedError(
            f"{error}; before that, get ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from "
            f"image-net.org and put them into {manual}"
        ) from error
