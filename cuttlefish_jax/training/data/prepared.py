"""Data sets as TFDS prepares them: opening what is there, how to come by what is not, and splitting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

DEFAULT_VALIDATION_SHARE = 0.05


class DatasetNotPreparedError(ValueError):
    """A data set has to be downloaded and written as array_record first; the message is how."""


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
