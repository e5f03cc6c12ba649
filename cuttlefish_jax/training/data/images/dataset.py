"""What every data set of images is, wherever it comes from."""

from __future__ import annotations

import dataclasses

from cuttlefish_jax.training.data.sources import Source


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
