"""Random-access image data: in host memory, or read from disk example by example."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, TypedDict

import numpy as np

READ_AT_ONCE = 1024  # examples decoded by one call while a whole source is read into memory


class Example(TypedDict):
    """One image ``uint8[h, w, c]`` and its class."""

    image: np.ndarray
    label: int


class Source(Protocol):
    """What the input pipeline reads from: examples by index, one by one or several at once."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def __getitem__(self, index: int) -> Example:
        """The example at ``index``."""
        ...

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images ``uint8[b, h, w, c]`` and labels ``int32[b]`` at ``indices`` ``int[b]``."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
    """Examples in host memory.

    Attributes:
      images: ``uint8[n, h, w, c]``.
      labels: ``int32[n]``.

    Raises:
      ValueError: if the arrays are not of these types, or not of one length.
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        """Checks what a compiled step would otherwise stumble over."""
        if self.images.ndim != 4 or self.images.dtype != np.uint8:
            raise ValueError(f"images must be uint8[n, h, w, c], got {self.images.dtype}{self.images.shape}")
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != np.int32:
            raise ValueError(
                f"labels must be int32[{len(self.images)}], got {self.labels.dtype}{self.labels.shape}"
            )

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        """The example at ``index``."""
        return {"image": self.images[index], "label": int(self.labels[index])}

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images ``uint8[b, h, w, c]`` and labels ``int32[b]`` at ``indices``."""
        return self.images[indices], self.labels[indices]

    def take(self, indices: np.ndarray) -> ArraySource:
        """The examples at ``indices``, in that order."""
        return ArraySource(*self.read(indices))


@dataclasses.dataclass(frozen=True, eq=False)
class RecordSource:
    """Examples decoded from disk when they are read, and made to fit the model.

    Attributes:
      records: ``records[i]`` is a mapping with ``"image"`` ``uint8[h, w, c]`` and ``"label"``; e.g. what
        ``tfds.data_source`` returns. All images have one shape.
      indices: ``int[n]``, the records that are this source's examples.
      image_size: height and width that images are enlarged and padded to.
      channels: that grey images are repeated to.
    """

    records: Sequence[Any]
    indices: np.ndarray
    image_size: int
    channels: int

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        """The example at ``index``."""
        images, labels = self.read(np.asarray([index]))
        return {"image": images[0], "label": int(labels[0])}

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images ``uint8[b, h, w, c]`` and labels ``int32[b]`` at ``indices``."""
        wanted = [int(i) for i in self.indices[indices]]
        # TFDS and grain sources decode many records faster by this one call.
        read_many = getattr(self.records, "__getitems__", None)
        rows = read_many(wanted) if read_many else [self.records[i] for i in wanted]
        images = np.stack([row["image"] for row in rows])
        labels = np.asarray([row["label"] for row in rows], np.int32)
        return fit_images(images, image_size=self.image_size, channels=self.channels), labels


def in_memory(source: Source) -> ArraySource:
    """Reads a whole source into host memory; an :class:`ArraySource` is returned as it is."""
    if isinstance(source, ArraySource):
        return source
    starts = range(0, len(source), READ_AT_ONCE)
    parts = [source.read(np.arange(i, min(i + READ_AT_ONCE, len(source)))) for i in starts]
    return ArraySource(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


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
