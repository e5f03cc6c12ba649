"""Random-access data: in host memory, or read from disk example by example."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

READ_AT_ONCE = 1024  # examples decoded by one call while a whole source is read into memory

Arrays = dict[str, np.ndarray]  # of one length, "label" among them
Seed = tuple[int, ...]


class Source(Protocol):
    """What the input pipeline reads from: a number of examples, any of them at once."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def read(
        self,
        indices: np.ndarray,
        *,
        seeds: Sequence[Seed] | None = None,
        batch: np.ndarray | None = None,
    ) -> Arrays:
        """The examples at ``indices``.

        Args:
          indices: ``int[b]``.
          seeds: one for each example, of its random augmentation; None for evaluation, where there is none.
          batch: the indices of the whole batch that these are a host's part of. What the shape of the arrays
            depends on (the longest text) has to be taken from it, so that it is the same on all hosts.

        Returns:
          Arrays ``[b, ...]`` by name, ``"label"`` among them.
        """
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
    """Examples in host memory.

    Attributes:
      arrays: ``[n, ...]`` by name. ``"label"`` is ``int32[n]``, or ``float32[n]`` for regression; an
        ``"image"`` is ``uint8[n, h, w, c]``.

    Raises:
      ValueError: if the arrays are not of these types, or not of one length.
    """

    arrays: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        """Checks what a compiled step would otherwise stumble over."""
        images, labels = self.arrays.get("image"), self.arrays["label"]
        if images is not None and (images.ndim != 4 or images.dtype != np.uint8):
            raise ValueError(f"images must be uint8[n, h, w, c], got {images.dtype}{images.shape}")
        if labels.ndim != 1 or labels.dtype not in (np.int32, np.float32):
            raise ValueError(f"labels must be int32[n] or float32[n], got {labels.dtype}{labels.shape}")
        for name, array in self.arrays.items():
            if len(array) != len(labels):
                raise ValueError(f"{name!r} has {len(array)} examples, but there are {len(labels)} labels")

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.arrays["label"])

    def read(
        self,
        indices: np.ndarray,
        *,
        seeds: Sequence[Seed] | None = None,
        batch: np.ndarray | None = None,
    ) -> Arrays:
        """See :meth:`Source.read`."""
        return {name: array[indices] for name, array in self.arrays.items()}

    def take(self, indices: np.ndarray) -> ArraySource:
        """The examples at ``indices``, in that order."""
        return ArraySource(self.read(indices))


def read_records(records: Sequence[Any], indices: np.ndarray) -> Sequence[Any]:
    """Several records; TFDS and grain sources decode many faster by one call."""
    wanted = [int(i) for i in indices]
    read_many = getattr(records, "__getitems__", None)
    return read_many(wanted) if read_many else [records[i] for i in wanted]


def in_memory(source: Source) -> ArraySource:
    """Reads a whole source into host memory; an :class:`ArraySource` is returned as it is."""
    if isinstance(source, ArraySource):
        return source
    starts = range(0, len(source), READ_AT_ONCE)
    parts = [source.read(np.arange(i, min(i + READ_AT_ONCE, len(source)))) for i in starts]
    return ArraySource({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
