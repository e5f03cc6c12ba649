"""The nine tasks of GLUE, read from TFDS and tokenized.

References:
  Wang et al., GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding,
  ICLR 2019.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from cuttlefish_jax.training.data.damage import check_labels
from cuttlefish_jax.training.data.prepared import open_records, split_examples
from cuttlefish_jax.training.data.sources import READ_AT_ONCE, read_records
from cuttlefish_jax.training.data.texts.tokens import (
    Text,
    TokenSource,
    open_tokenizer,
    padded_lengths,
    tokenize,
    vocabulary_size,
)

PREFIX = "glue/"
MAX_SCORE = 5.0  # of the similarity of two sentences, from 0


@dataclasses.dataclass(frozen=True)
class GlueTask:
    """Where a task's texts and labels are in TFDS.

    Attributes:
      columns: features with the text, or the two texts of a pair.
      num_classes: labels are ``0 ... num_classes - 1``; 0 is a regression to a number from 0 to 5.
      tests: the labelled splits that are kept for the final numbers: what they are called here and there.
        The labels of GLUE's own test splits are not public.
    """

    columns: tuple[str, ...]
    num_classes: int = 2
    tests: tuple[tuple[str, str], ...] = (("test", "validation"),)


_SENTENCES = ("sentence1", "sentence2")
GLUE: Mapping[str, GlueTask] = MappingProxyType(
    {
        "cola": GlueTask(("sentence",)),
        "sst2": GlueTask(("sentence",)),
        "mrpc": GlueTask(_SENTENCES),
        "stsb": GlueTask(_SENTENCES, num_classes=0),
        "qqp": GlueTask(("question1", "question2")),
        "mnli": GlueTask(
            ("premise", "hypothesis"),
            num_classes=3,
            tests=(("test", "validation_matched"), ("test_mismatched", "validation_mismatched")),
        ),
        "qnli": GlueTask(("question", "sentence")),
        "rte": GlueTask(_SENTENCES),
        "wnli": GlueTask(_SENTENCES),
    }
)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class GlueDataset:
    """A task of GLUE, tokenized and split.

    Attributes:
      task: its key in ``GLUE``.
      train: what a run trains on.
      evaluation: ``"validation"``, held out of the training data, and the splits of ``GlueTask.tests``.
      vocab_size: one more than the largest id of the tokenizer.
    """

    task: str
    train: TokenSource
    evaluation: Mapping[str, TokenSource]
    vocab_size: int

    @property
    def num_types(self) -> int:
        """One more than the largest token type."""
        return max(source.num_types for source in (self.train, *self.evaluation.values()))


def load_glue_dataset(data: Any, *, tokenizer: str | Path) -> GlueDataset:
    """Opens and tokenizes the task that ``config.data`` names.

    The splits do not depend on the run's seed, so that runs with different seeds can be compared.

    Args:
      data: ``config.data`` of a run's ``ConfigDict``; its keys ``name`` (``glue/<task>``), ``data_dir``,
        ``max_length``, ``lengths``, ``train_examples`` and ``validation_examples`` are used.
      tokenizer: see :func:`cuttlefish_jax.training.data.texts.open_tokenizer`.

    Raises:
      DatasetNotPreparedError: if the files are missing; the message is the command that makes them.
      ValueError: if there is no such task or no tokenizer, a label is out of range, or more examples are
        asked for than are there.
    """
    name = data.name.removeprefix(PREFIX)
    if name not in GLUE:
        near = difflib.get_close_matches(name.lower(), GLUE)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(GLUE)}"
        raise ValueError(f"GLUE has no task {name!r}; {hint}")
    task = GLUE[name]
    lengths = padded_lengths(data.lengths, data.max_length)
    opened = open_tokenizer(tokenizer, max_length=data.max_length, pairs=len(task.columns) == 2)
    names = ("train", *(there for _, there in task.tests))
    records = {split: open_records(data.name, split, data.data_dir) for split in names}
    train, validation = split_examples(data, len(records["train"]))

    def source(split: str, indices: np.ndarray | None = None) -> TokenSource:
        wanted = np.arange(len(records[split])) if indices is None else indices
        texts, labels = _read(task, records[split], wanted, where=f"{data.name}, split {split}")
        return tokenize(texts, labels, opened, lengths=lengths)

    tests = {here: source(there) for here, there in task.tests}
    return GlueDataset(
        task=name,
        train=source("train", train),
        evaluation={"validation": source("train", validation), **tests},
        vocab_size=vocabulary_size(opened),
    )


def _read(
    task: GlueTask, records: Sequence[Any], indices: np.ndarray, *, where: str
) -> tuple[list[Text], np.ndarray]:
    """Texts and labels of some records."""
    texts: list[Text] = []
    labels: list[Any] = []
    for start in range(0, len(indices), READ_AT_ONCE):
        for row in read_records(records, indices[start : start + READ_AT_ONCE]):
            parts = tuple(row[column].decode("utf-8", "replace") for column in task.columns)
            texts.append(parts if len(parts) == 2 else parts[0])
            labels.append(row["label"])
    array = np.asarray(labels, np.int32 if task.num_classes else np.float32)
    largest = task.num_classes - 1 if task.num_classes else MAX_SCORE
    check_labels(array, largest, lambda i: f"{where}: record {indices[i]}")
    return texts, array
