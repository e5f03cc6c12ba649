"""Data sets, the input pipeline and augmentation. The only part that imports tfds and grain."""

from cuttlefish_jax.training.data.images.dataset import Dataset
from cuttlefish_jax.training.data.images.datasets import DATASETS, load_dataset
from cuttlefish_jax.training.data.images.preprocess import make_preprocess
from cuttlefish_jax.training.data.images.small import RecordSource
from cuttlefish_jax.training.data.pipeline import EvalInput, TrainInput, materialize
from cuttlefish_jax.training.data.prepared import DatasetNotPreparedError
from cuttlefish_jax.training.data.sources import ArraySource, Source
from cuttlefish_jax.training.data.texts.glue import GLUE, GlueDataset, load_glue_dataset
from cuttlefish_jax.training.data.texts.tokens import TokenSource

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
