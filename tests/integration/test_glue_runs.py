"""Every task of GLUE, two epochs with a tiny BERT, through the switch."""

import json

import pytest
from glue_tools import COLUMNS, write_bert, write_task

from configs.bert_glue import get_config
from cuttlefish_jax.errors import ConfigError
from cuttlefish_jax.training.loop import run

pytestmark = pytest.mark.slow

SMALL = {
    "epochs": 2,
    "batch_size": 8,
    "model.pretrained": "",
    "data.validation_examples": 8,
    # One length, and so one program for each number of classes.
    "data.max_length": 16,
    "data.lengths": (16,),
    "schedule.peak": 1e-3,
    # Layers of 16 channels do not get faster.
    "profile.enabled": False,
}
METRICS = {
    "cola": {"matthews", "accuracy"},
    "sst2": {"accuracy"},
    "mrpc": {"f1", "accuracy"},
    "stsb": {"pearson", "spearman"},
    "qqp": {"f1", "accuracy"},
    "mnli": {"accuracy"},
    "qnli": {"accuracy"},
    "rte": {"accuracy"},
    "wnli": {"accuracy"},
}
SCORES = dict.fromkeys(COLUMNS, "accuracy") | dict(cola="matthews", mrpc="f1", stsb="pearson", qqp="f1")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder with a config.json and a tokenizer.json."""
    return write_bert(tmp_path_factory.mktemp("bert"), num_hidden_layers=1)


def small(task, data_dir, bert, **changes):
    config = get_config(task)
    folders = {"model.config_file": bert, "data.tokenizer": bert, "data.data_dir": str(data_dir)}
    config.update_from_flattened_dict(SMALL | folders | changes)
    return config


# These are less than mnli, but for the names of their columns: tests/training/data has those too.
LARGE = {"cola", "sst2", "qqp", "qnli", "rte", "wnli"}


@pytest.mark.parametrize(
    "task", [pytest.param(task, marks=[pytest.mark.large] if task in LARGE else []) for task in COLUMNS]
)
def test_every_task(task, bert, tmp_path):
    data_dir = write_task(tmp_path / "tfds", task)
    summary = run(small(task, data_dir, bert), tmp_path / "run")

    assert summary["switch_epoch"] == 1
    assert set(summary["ranks"]) == {
        f"layer1/attention/{name}" for name in ("query", "key", "value", "output")
    }
    # The feed-forward kernels are frozen, and not factorized.
    assert summary["params_trained"] < summary["params_final"] < summary["params_full"]
    frozen = 2 * 16 * 32
    assert summary["params_final"] - summary["params_trained"] == frozen

    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["full_rank", "low_rank"]
    tests = ["test", "test_mismatched"] if task == "mnli" else ["test"]
    expected = {f"{split}_{name}" for split in ["validation", *tests] for name in METRICS[task] | {"loss"}}
    assert {key for key in lines[-1] if key.startswith(("validation_", "test_"))} == expected
    assert all(-1 <= line[key] <= 1 for line in lines for key in expected if not key.endswith("loss"))

    assert summary["metric"] == SCORES[task]
    assert summary["test_score"] == lines[-1][f"test_{SCORES[task]}"]
    if task == "stsb":
        assert summary["test_accuracy"] is None and summary["best_test_accuracy"] is None
    else:
        assert summary["test_accuracy"] == lines[-1]["test_accuracy"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.name": "glue/sst-2"}, "GLUE has no task 'sst-2'; did you mean sst2"),
        ({"data.tokenizer": "/nowhere/at/all"}, "config.data: .*/nowhere/at/all"),
        ({"data.tokenizer": ""}, "glue/sst2 needs a tokenizer: --config.data.tokenizer=FILE or FOLDER"),
        ({"data.max_length": 64}, "the texts need max_length 64 or more, but the network has 32"),
        ({"model.name": "resnet18", "model.config_file": ""}, "the inputs are texts, and ResNet has no"),
        ({"optimizer.freeze": ("*/fnn/*",)}, r"config\.optimizer\.freeze: '\*/fnn/\*' matches no layer"),
    ],
    ids=lambda changes: ",".join(changes) if isinstance(changes, dict) else "",
)
def test_bad_input_is_a_one_line_error_before_anything_is_written(changes, message, bert, tmp_path):
    data_dir = write_task(tmp_path / "tfds", "sst2")
    with pytest.raises(ConfigError, match=message) as error:
        run(small("sst2", data_dir, bert, **changes), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "config.json").exists()
