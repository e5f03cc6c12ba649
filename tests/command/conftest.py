"""A run's workdir as train.py leaves it, full-rank and factorized; nothing is trained."""

import json

import jax
import numpy as np
import pytest

import cuttlefish_jax as cf
from configs import quickstart
from cuttlefish_jax.command.main import main, parse
from cuttlefish_jax.training.checkpoint import Checkpointer
from cuttlefish_jax.training.method import make_tracker
from cuttlefish_jax.training.network import create_network, input_shapes
from cuttlefish_jax.training.progress import Progress


@pytest.fixture(scope="session")
def network():
    """Configuration, model, variables and plan."""
    config = quickstart.get_config()
    config.model.update(width=8, stage_sizes=(1, 1))
    model, inputs = create_network(config.model, num_outputs=10), input_shapes(config.data)
    kernels = cf.find_kernels(model, *inputs, train=False)
    shapes = jax.eval_shape(lambda *x: model.init(jax.random.key(0), *x, train=False), *inputs)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.uniform(0.01, 0.1, x.shape).astype(np.float32), shapes)
    return config, model, variables, cf.make_plan(kernels, rank_rule=cf.RankRatio(0.5))


def _save_run(folder, network, plan):
    config, _, variables, _ = network
    params = variables["params"] if plan is None else cf.factorize_params(variables["params"], plan)
    tracker = make_tracker(config)
    tracker.update(dict.fromkeys(network[3].ranks, 2.0))
    with Checkpointer(folder / "best", keep=1) as best:
        best.save(3, {**variables, "params": params}, Progress(tracker, plan=plan).to_record())
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


@pytest.fixture(scope="session")
def full_run(network, tmp_path_factory):
    return _save_run(tmp_path_factory.mktemp("full"), network, None)


@pytest.fixture(scope="session")
def low_run(network, tmp_path_factory):
    return _save_run(tmp_path_factory.mktemp("low"), network, network[3])


@pytest.fixture
def cuttlefish(capsys):
    """Runs a command line in this process: its exit status, what it printed, and its errors."""

    def run(*arguments):
        try:
            status = main(parse([str(argument) for argument in arguments]))
        except SystemExit as stopped:
            status = stopped.code
        out, err = capsys.readouterr()
        assert len(err.splitlines()) == (1 if status else 0), err
        return status, out, err

    return run
