"""The data sets of images, by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from cuttlefish_jax.training.data.images.dataset import Dataset
from cuttlefish_jax.training.data.images.imagenet import load_imagenet
from cuttlefish_jax.training.data.images.small import TFDS_IMAGES, load_digits, load_tfds

DATASETS: Mapping[str, Callable[[Any], Dataset]] = {
    "digits": load_digits,
    **dict.fromkeys(TFDS_IMAGES, load_tfds),
    "imagenet": load_imagenet,
}


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
      >>> import numpy as np
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
    return DATASETS[data.name](data)
