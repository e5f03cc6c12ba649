"""Whole runs whose state is split over the devices, and over hosts: the numbers of one that is whole."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest
from host_tools import run_on_two_hosts

from cuttlefish_jax.training import loop
from cuttlefish_jax.training.checkpoint import Checkpointer

pytestmark = pytest.mark.slow
# Batch statistics of all devices, so that their number is of no account; and the ranks are measured.
SETTINGS = {
    "model.sync_batch_norm": True,
    "optimizer.ema": 0.9,
    "data.train_examples": 160,
    "plan.calibration_batches": 2,
}
# Another order of summation takes a ReLU over its kink now and then, and with it the gradient of a channel.
SMOOTH = "lambda x: nn.softplus(4 * x) / 4"
ON_TWO_HOSTS = f"""
    import json, sys
    import flax.linen as nn
    import jax
    from configs import quickstart
    from cuttlefish_jax.training import loop

    nn.relu = {SMOOTH}
    jax.config.update("jax_disable_most_optimizations", True)
    config = quickstart.get_config()
    config.update_from_flattened_dict(json.loads(sys.argv[2]))
    track = loop._Run._track

    def stops_once(self, epochs_trained):
        if epochs_trained == 3:
            loop._Run._track = track
            raise KeyboardInterrupt
        track(self, epochs_trained)

    loop._Run._track = stops_once
    try:
        loop.run(config, sys.argv[1])
    except KeyboardInterrupt:
        print(json.dumps(loop.run(config, sys.argv[1])))
"""


@pytest.fixture(scope="module", autouse=True)
def smooth():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn, "relu", eval(SMOOTH))
        yield


def finished(workdir):
    """The last checkpoint's arrays, and the numbers that were logged."""
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        leaves = dict(checkpointer.restore().leaves)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    names = ("train_loss", "test_loss", "validation_loss", "learning_rate")
    return leaves, [[line[name] for name in names] for line in lines]


@pytest.fixture(scope="module")
def whole(tiny_config, tmp_path_factory, smooth):
    """A run whose state is whole on each of eight devices: its summary and workdir."""
    workdir = tmp_path_factory.mktemp("pmap")
    return loop.run(tiny_config(**SETTINGS), workdir), workdir


def compare(workdir, summary, whole):
    reference, other_dir = whole
    assert summary["ranks"] == reference["ranks"] and summary["ranks"]
    assert summary["switch_epoch"] == reference["switch_epoch"] == 2
    (arrays, numbers), (expected, other_numbers) = finished(workdir), finished(other_dir)
    np.testing.assert_allclose(numbers, other_numbers, rtol=1e-5)
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(arrays[name], array, rtol=1e-4, atol=1e-5, err_msg=name)


def stopped_and_gone_on(before, after, workdir, monkeypatch):
    """The summary of a run that stops in its low-rank phase; it goes on from the checkpoint before that."""

    def stops(self, epochs_trained):
        if epochs_trained == 3:
            raise KeyboardInterrupt
        track(self, epochs_trained)

    track = loop._Run._track
    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_track", stops)
        with pytest.raises(KeyboardInterrupt):
            loop.run(before, workdir)
    return loop.run(after, workdir)


def test_a_run_that_is_stopped_and_goes_on(tiny_config, tmp_path, monkeypatch, whole):
    config = tiny_config(parallelism="fsdp", **SETTINGS)
    summary = stopped_and_gone_on(config, config, tmp_path, monkeypatch)
    compare(tmp_path, summary, whole)
    assert summary["state_bytes_full"] < 0.5 * whole[0]["state_bytes_full"]
    assert summary["state_bytes_low"] < 0.6 * whole[0]["state_bytes_low"]


@pytest.mark.parametrize("names", [("pmap", "fsdp"), pytest.param(("fsdp", "pmap"), marks=pytest.mark.large)])
def test_a_run_that_goes_on_the_other_way(names, tiny_config, tmp_path, monkeypatch, whole):
    before, after = (tiny_config(parallelism=name, **SETTINGS) for name in names)
    summary = stopped_and_gone_on(before, after, tmp_path, monkeypatch)
    compare(tmp_path, summary, whole)
    # Half of the run had it whole.
    assert (summary["state_bytes_low"] < 0.6 * whole[0]["state_bytes_low"]) == (names[1] == "fsdp")


@pytest.mark.large
def test_a_run_on_two_hosts(tiny_config, tmp_path, whole):
    config = tiny_config(parallelism="fsdp", **SETTINGS)
    settings = json.loads(config.to_json())
    flat = {
        ".".join(str(key.key) for key in keys): value
        for keys, value in jax.tree.leaves_with_path(
            settings, is_leaf=lambda node: not isinstance(node, dict)
        )
    }
    outputs = run_on_two_hosts(ON_TWO_HOSTS, tmp_path, json.dumps(flat))
    first, second = (json.loads(output.splitlines()[-1]) for output in outputs)
    assert first["ranks"] == second["ranks"] and first["test_accuracy"] == second["test_accuracy"]
    compare(tmp_path, first, whole)
