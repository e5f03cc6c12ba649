"""Data sets, the input pipeline and augmentation. The only part that imports tfds and grain."""

from cuttlefish_jax.training.data.datasets import DATASETS, Dataset, DatasetNotPreparedError, load_dataset
from cuttlefish_jax.training.data.glue import GLUE, GlueDataset, load_glue_dataset
from cuttlefish_jax.training.data.pipeline import EvalInput, TrainInput, materialize
from cuttlefish_jax.training.data.preprocess import make_preprocess
from cuttlefish_jax.training.data.sources import ArraySource, RecordSource, Source
from cuttlefish_jax.training.data.texts import TokenSource

__all__ = [
    "DATASETS",
    "GLUE",
    "ArraySource",
    "Dataset",
    "DatasetNotPreparedError",
    "EvalInput",
    "GlueDataset",
    "RecordSource",
    "Source",
    "TokenSource",
    "TrainInput",
    "load_dataset",
    "load_glue_dataset",
    "make_preprocess",
    "materialize",
]
