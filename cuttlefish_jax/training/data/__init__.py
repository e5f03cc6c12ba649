"""Data sets, the input pipeline and augmentation. The only part that imports tfds and grain."""

from cuttlefish_jax.training.data.datasets import DATASETS, Dataset, DatasetNotPreparedError, load_dataset
from cuttlefish_jax.training.data.pipeline import EvalInput, TrainInput, materialize
from cuttlefish_jax.training.data.preprocess import make_preprocess
from cuttlefish_jax.training.data.sources import ArraySource, Example, RecordSource, Source

__all__ = [
    "DATASETS",
    "ArraySource",
    "Dataset",
    "DatasetNotPreparedError",
    "EvalInput",
    "Example",
    "RecordSource",
    "Source",
    "TrainInput",
    "load_dataset",
    "make_preprocess",
    "materialize",
]
