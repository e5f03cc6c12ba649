import json
import subprocess
import sys

import numpy as np
import pytest
from glue_tools import COLUMNS, SPECIAL, WORDS, make_rows, splits_of, write_task, write_tokenizer

from cuttlefish_jax.training.config import default_config
from cuttlefish_jax.training.data import GLUE, DatasetNotPreparedError, load_glue_dataset
from cuttlefish_jax.training.data.damage import DataError

NUMBER = 24


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A ``data_dir`` with all tasks."""
    data_dir = tmp_path_factory.mktemp("tfds")
    for task in COLUMNS:
        write_task(data_dir, task, number=NUMBER)
    return str(data_dir)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def data_config(task, data_dir, **settings):
    data = default_config().data
    data.update(
        {"name": f"glue/{task}", "data_dir": str(data_dir), "max_length": 32, "lengths": (8, 16), **settings}
    )
    return data


def decoded(source):
    """The texts of a source, padding and special tokens left out, each with its label."""
    batch = source.read(np.arange(len(source)))
    found = []
    for ids, mask, types, label in zip(*batch.values(), strict=True):
        parts = tuple(
            " ".join(WORDS[i - len(SPECIAL)] for i in ids[(mask == 1) & (types == part)] if i >= len(SPECIAL))
            for part in range(source.num_types)
        )
        found.append((parts, label.item()))
    return found


def written(task, split):
    """What the same texts and labels are on disk."""
    columns, num_classes = COLUMNS[task]
    rows = make_rows(task, NUMBER, splits_of(task).index(split))
    number = int if num_classes else lambda label: float(np.float32(label))
    return [(tuple(row[column] for column in columns), number(row["label"])) for row in rows]


@pytest.mark.parametrize("task", COLUMNS)
def test_every_task_has_its_texts_labels_and_splits(task, prepared, tokenizer):
    dataset = load_glue_dataset(data_config(task, prepared, validation_examples=5), tokenizer=tokenizer)
    assert dataset.task == task
    assert dataset.vocab_size == len(SPECIAL) + len(WORDS)
    assert dataset.num_types == len(COLUMNS[task][0])
    validation = dataset.evaluation["validation"]
    assert (len(dataset.train), len(validation)) == (NUMBER - 5, 5)
    assert sorted(decoded(dataset.train) + decoded(validation)) == sorted(written(task, "train"))
    tests = {"test": "validation"}
    if task == "mnli":
        tests = {"test": "validation_matched", "test_mismatched": "validation_mismatched"}
    assert dataset.evaluation.keys() - {"validation"} == tests.keys()
    for here, there in tests.items():
        assert decoded(dataset.evaluation[here]) == written(task, there)
    for source in (dataset.train, *dataset.evaluation.values()):
        assert source.labels.dtype == (np.int32 if COLUMNS[task][1] else np.float32)
        assert source.lengths == (8, 16, 32)


_BUILDERS = """
import json
from tensorflow_datasets.text.glue import Glue
table = {c.name: (sorted(c.text_features), len(c.label_classes or ())) for c in Glue.BUILDER_CONFIGS}
print(json.dumps(table))
"""


def test_the_table_is_that_of_tfds():
    # In a process of its own: without TensorFlow, TFDS knows GLUE only once this module was imported.
    done = subprocess.run([sys.executable, "-c", _BUILDERS], capture_output=True, text=True, check=True)
    of_tfds = json.loads(done.stdout)
    assert GLUE.keys() == of_tfds.keys() - {"mnli_matched", "mnli_mismatched", "ax"}
    for name, task in GLUE.items():
        assert [sorted(task.columns), task.num_classes] == of_tfds[name]


def test_fewer_training_examples_are_a_subset_and_leave_the_rest_alone(prepared, tokenizer):
    whole = load_glue_dataset(data_config("cola", prepared), tokenizer=tokenizer)
    part = load_glue_dataset(data_config("cola", prepared, train_examples=6), tokenizer=tokenizer)
    assert len(part.train) == 6
    assert set(decoded(part.train)) <= set(decoded(whole.train))
    for split in whole.evaluation:
        assert decoded(part.evaluation[split]) == decoded(whole.evaluation[split])


def test_strange_texts_break_nothing(tmp_path, tokenizer):
    rows = [
        {"sentence": text, "label": 1, "idx": i}
        for i, text in enumerate(["", "  \n", "film " * 500, "naïve 映画 \U0001f3ac", b"bad \xff\xfe film"])
    ]
    write_task(tmp_path, "sst2", {"train": rows, "validation": rows})
    dataset = load_glue_dataset(data_config("sst2", tmp_path), tokenizer=tokenizer)
    sizes = dataset.evaluation["test"].read(np.arange(5))["attention_mask"].sum(axis=1)
    np.testing.assert_array_equal(sizes[:3], [2, 2, 32])
    assert sizes[3:].min() > 2


@pytest.mark.parametrize(
    ("task", "label", "message"),
    [
        ("cola", 2, "glue/cola, split train: record 7 has label 2, expected 0 to 1"),
        ("cola", -1, "glue/cola, split train: record 7 has label -1, expected 0 to 1"),
        ("mnli", 3, "glue/mnli, split train: record 7 has label 3, expected 0 to 2"),
        ("stsb", -1.0, r"glue/stsb, split train: record 7 has label -1\.0, expected 0 to 5"),
        ("stsb", 5.5, r"glue/stsb, split train: record 7 has label 5\.5, expected 0 to 5"),
        ("stsb", float("nan"), "glue/stsb, split train: record 7 has label nan, expected 0 to 5"),
    ],
)
def test_a_label_out_of_range_is_named(task, label, message, tmp_path, tokenizer):
    rows = make_rows(task, NUMBER, 0)
    rows[7]["label"] = label
    others = {split: make_rows(task, NUMBER, 1) for split in splits_of(task)[1:]}
    write_task(tmp_path, task, {"train": rows, **others})
    with pytest.raises(DataError, match=message) as error:
        load_glue_dataset(data_config(task, tmp_path, validation_examples=1), tokenizer=tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sst-2", r"GLUE has no task 'sst-2'; did you mean sst2"),
        ("STS-B", r"GLUE has no task 'STS-B'; did you mean stsb"),
        ("mnli-m", r"did you mean mnli"),
        ("mnli_mismatched", r"choose from cola"),
        ("imdb", r"choose from cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli"),
        ("", r"choose from cola"),
    ],
)
def test_a_task_with_a_typo_is_a_one_line_error(name, message, prepared, tokenizer):
    with pytest.raises(ValueError, match=message) as error:
        load_glue_dataset(data_config(name, prepared), tokenizer=tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("others", [(), ("sst2",)])
def test_data_that_are_not_prepared_say_how_to_prepare_them(others, tmp_path, tokenizer):
    for task in others:
        write_task(tmp_path, task)
    with pytest.raises(DatasetNotPreparedError, match=r"pip install -e '\.\[prepare\]'") as error:
        load_glue_dataset(data_config("rte", tmp_path), tokenizer=tokenizer)
    assert f"data set 'glue/rte' is not in {tmp_path}" in str(error.value)
    assert f"tfds.data_source('glue/rte', data_dir='{tmp_path}')" in str(error.value)
    assert "\n" not in str(error.value)
    assert len(list(tmp_path.rglob("*.array_record*"))) == 2 * len(others)


def test_too_many_examples_are_an_error(prepared, tokenizer):
    with pytest.raises(ValueError, match=r"data\.train_examples=24, but glue/rte has 23"):
        load_glue_dataset(data_config("rte", prepared, train_examples=24), tokenizer=tokenizer)
