"""Runs that start from a safetensors file: what is evaluated, what ranks follow, what resuming needs."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from glue_tools import write_bert, write_task
from safetensors.numpy import save_file

import cuttlefish_jax as cf
from configs.bert_glue import get_config
from cuttlefish_jax.errors import ConfigError
from cuttlefish_jax.models import create_model
from cuttlefish_jax.models.pretrained.transformers import locate_bert
from cuttlefish_jax.training import loop
from cuttlefish_jax.training.experiment import Experiment
from cuttlefish_jax.training.loop import run

pytestmark = pytest.mark.slow

WIDTH = 32
IDS = jnp.zeros((1, 16), jnp.int32)


class Interrupted(Exception):
    pass


def make_params(folder):
    """Parameters of the BERT that ``folder`` has a config.json of: its matrices are of rank 1, nearly."""
    model = create_model("bert_base", num_classes=2, config_file=folder)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IDS, IDS, IDS)["params"]
    rng = np.random.default_rng(0)

    def make(path, shape):
        noise = rng.normal(size=shape.shape, scale=0.02)
        if len(shape.shape) == 2:
            m, n = shape.shape
            noise += 0.3 * rng.normal(size=(m, 1)) @ rng.normal(size=(1, n)) / np.sqrt(m)
        return np.float32(noise + (path[-1].key == "scale"))

    params = jax.tree_util.tree_map_with_path(make, shapes)
    # Sure of itself: a network that is unsure of everything has one loss, whatever its weights.
    params["classifier"]["kernel"] = np.float32(3 * rng.normal(size=(WIDTH, 2)))
    return model, params


def write_weights(file, params):
    """As transformers does, with a head of the pre-training."""
    tensors = {"cls.predictions.bias": np.zeros(3, np.float32)}
    for path, param in traverse_util.flatten_dict(params, sep="/").items():
        tensors[locate_bert(path).names[0]] = param.T.copy() if path.endswith("/kernel") else param
    save_file(tensors, file)


@pytest.fixture
def folder(tmp_path):
    """A folder with weights, their config.json and their tokenizer.json."""
    sizes = dict(hidden_size=WIDTH, num_hidden_layers=1, intermediate_size=2 * WIDTH)
    place = Path(write_bert(tmp_path / "bert", **sizes))
    write_weights(place / "model.safetensors", make_params(str(place))[1])
    return place


@pytest.fixture
def config(folder, tmp_path):
    config = get_config("sst2")
    config.update_from_flattened_dict(
        {
            "epochs": 2,
            "batch_size": 8,
            "model.pretrained": str(folder),
            "model.config_file": str(folder),
            "model.fresh": (),
            "data.data_dir": write_task(tmp_path / "tfds", "sst2"),
            "data.validation_examples": 8,
            "data.max_length": 16,
            "data.lengths": (16,),
            # So little that the weights stay what they are.
            "schedule.peak": 1e-30,
            "plan.rank_rule": "scaled_stable_rank",
            "profile.enabled": False,
        }
    )
    return config


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_from_a_checkpoint_resumes_without_it(config, folder, tmp_path, monkeypatch):
    workdir = tmp_path / "run"

    def interrupt(*args, **options):
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(loop, "plan_from_config", interrupt)
        with pytest.raises(Interrupted):
            run(config, workdir)
    # All is in the run's own checkpoint now.
    (folder / "model.safetensors").unlink()
    summary = run(config, workdir)

    model, params = make_params(str(folder))
    experiment = Experiment.from_config(config)
    tests = experiment.task.evaluation["test"]
    examples = tests.read(np.arange(len(tests)), batch=np.arange(len(tests)))

    logits = model.apply({"params": params}, *experiment.task.eval_inputs(examples))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, examples["label"])
    first, last = read_lines(workdir / "metrics.jsonl")
    np.testing.assert_allclose(first["test_loss"], np.mean(losses), rtol=1e-5)
    assert abs(first["test_loss"] - np.log(2)) > 0.1  # which is the loss of a random network

    # The scale of a random matrix, not that of the pre-trained one: by that the ranks would be full.
    ranks = read_lines(workdir / "ranks.jsonl")
    np.testing.assert_allclose(
        ranks[1]["layer1/attention/query"], ranks[0]["layer1/attention/query"], rtol=1e-3
    )
    assert summary["switch_epoch"] == 1 and last["phase"] == "low_rank"
    assert summary["ranks"] == {
        path: int(np.ceil(4 * ranks[1][path]))
        for path in experiment.kernels
        if path.startswith("layer1/attention/")
    }


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"layer1.0.conv1.weight": np.zeros((2, 2, 3, 3), np.float32)},
            "looks like a torchvision ResNet checkpoint, not the transformers BERT of bert_base",
        ),
        (None, r"has other shapes: .*embeddings/word/embedding is \(15, 32\), but .* \(14, 32\)"),
    ],
    ids=["wrong network", "wrong shape"],
)
def test_a_checkpoint_that_does_not_fit_is_a_one_line_error(tensors, message, config, folder, tmp_path):
    if tensors is None:
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text.replace('"vocab_size": 14', '"vocab_size": 15'))
    else:
        config.model.unused = ()
        save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=rf"^config\.model\.pretrained: .*{message}") as error:
        run(config, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


def test_weights_that_are_missing_are_found_before_anything_is_measured(config, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise AssertionError("measured before the weights were read")

    monkeypatch.setattr(cf, "profile_kernels", fail)
    config.profile.enabled = True
    config.data.tokenizer = config.model.config_file
    config.model.pretrained = "/nowhere"
    with pytest.raises(
        ConfigError, match=r"^config\.model\.pretrained: there is no file or folder /nowhere$"
    ):
        run(config, tmp_path / "run")
