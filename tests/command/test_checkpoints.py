"""Every kind of checkpoint is found and read; the others are refused in one line."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState
from hostile_tools import make_huge

import cuttlefish_jax as cf
from cuttlefish_jax import files, serving
from cuttlefish_jax.command.checkpoints import read_checkpoint
from cuttlefish_jax.errors import CheckpointError, UserError
from cuttlefish_jax.training.checkpoint import Checkpointer
from cuttlefish_jax.training.method import make_tracker
from cuttlefish_jax.training.progress import Progress

PARAMS = {"fc": {"kernel": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3), "bias": jnp.ones(3)}}
STATS = {"norm": {"mean": jnp.zeros(3)}}


def test_a_workdir_is_read_with_its_plan_and_settings(network, full_run, low_run):
    config, _, variables, plan = network
    full, low = read_checkpoint(str(full_run)), read_checkpoint(str(low_run))
    chex.assert_trees_all_equal(full.variables, variables)
    assert full.plan is None and low.plan == plan
    assert low.config.model.to_dict() == config.model.to_dict() | {"stage_sizes": [1, 1]} | {
        key: list(value) for key, value in config.model.items() if isinstance(value, tuple)
    }
    assert full.ranks_0 == dict.fromkeys(plan.ranks, 2.0)
    assert low.num_params == plan.num_params
    best = cf.merge_params(low.params, plan)
    chex.assert_trees_all_close(low.full_rank(), jax.device_get(best))
    chex.assert_trees_all_equal(read_checkpoint(str(low_run / "best")).params, low.params)


def test_the_average_is_read_where_a_run_has_one(network, tmp_path):
    config, _, variables, _ = network
    average = jax.tree.map(lambda x: 2 * x, variables["params"])
    state = {**variables, "ema_params": average, "opt_state": {"count": np.int32(1)}}
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save(1, state, Progress(make_tracker(config)).to_record())
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    checkpoint = read_checkpoint(str(tmp_path))
    chex.assert_trees_all_equal(checkpoint.params, average)
    assert checkpoint.ranks_0 is None


def save_standard(folder, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)


def save_manager(folder, tree):
    with ocp.CheckpointManager(folder) as manager:
        manager.save(2, args=ocp.args.StandardSave(jax.tree.map(jnp.zeros_like, tree)))
        manager.save(10, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()


def save_composite(folder, tree):
    with ocp.CheckpointManager(folder) as manager:
        items = ocp.args.Composite(state=ocp.args.StandardSave(tree), about=ocp.args.JsonSave({"a": 1}))
        manager.save(1, args=items)
        manager.wait_until_finished()


@pytest.mark.parametrize("save", [save_standard, save_manager, save_composite])
def test_orbax_checkpoints_of_others(tmp_path, save, monkeypatch):
    save(tmp_path / "saved", {"params": PARAMS, "batch_stats": STATS})
    monkeypatch.chdir(tmp_path)
    checkpoint = read_checkpoint("saved")
    chex.assert_trees_all_equal(
        checkpoint.variables, jax.device_get({"params": PARAMS, "batch_stats": STATS})
    )
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(checkpoint.variables))
    assert checkpoint.plan is None and checkpoint.config is None


@pytest.mark.parametrize(
    "tree",
    [
        PARAMS,
        {"params": {"params": PARAMS}},
        {"fc": {name: {"value": leaf} for name, leaf in PARAMS["fc"].items()}},  # as NNX had it once
        TrainState.create(apply_fn=None, params=PARAMS, tx=optax.adam(0.1)),
    ],
    ids=["bare params", "nested", "boxes of NNX", "a training state"],
)
def test_params_are_found_wherever_they_are(tmp_path, tree):
    save_standard(tmp_path / "saved", tree)
    chex.assert_trees_all_equal(read_checkpoint(str(tmp_path / "saved")).params, jax.device_get(PARAMS))


def test_what_does_not_fit_into_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    save_standard(tmp_path / "saved", PARAMS)
    (tmp_path / "plan.json").touch()
    make_huge(tmp_path / "plan.json")
    with pytest.raises(
        UserError, match=r"plan\.json: it has more than 64 MiB, too much for such a document$"
    ):
        read_checkpoint(str(tmp_path / "saved"), str(tmp_path / "plan.json"))
    monkeypatch.setattr(files.os, "sysconf", lambda name: 1)
    with pytest.raises(CheckpointError, match=r"cannot read .*saved \(ValueError: it declares arrays of "):
        read_checkpoint(str(tmp_path / "saved"))


def test_a_plan_in_a_file_of_its_own(network, tmp_path):
    _, _, variables, plan = network
    save_standard(tmp_path / "saved", cf.factorize_params(variables["params"], plan))
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert read_checkpoint(str(tmp_path / "saved"), str(tmp_path / "plan.json")).plan == plan
    with pytest.raises(UserError, match=r"cannot read .*nothing\.json"):
        read_checkpoint(str(tmp_path / "saved"), str(tmp_path / "nothing.json"))
    for text, message in {"[" * 100_000: "it is not JSON", '{"format": 1e999}': "too large a number"}.items():
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match=rf"bad\.json: not a factorization plan: .*{message}"):
            read_checkpoint(str(tmp_path / "saved"), str(tmp_path / "bad.json"))
    serving.save_safetensors(tmp_path / "low.safetensors", PARAMS, plan)
    with pytest.raises(UserError, match="has its plan"):
        read_checkpoint(str(tmp_path / "low.safetensors"), str(tmp_path / "plan.json"))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "'plan'"),
        ({"plan": "{}"}, "not a factorization plan"),
        ({"plan": None, "tracker": {"history": {"fc": []}}}, "index out of range"),
        ({"plan": None, "tracker": {"history": None}}, "NoneType"),
    ],
)
def test_records_that_are_not_those_of_a_run(tmp_path, record, message):
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save(1, {"params": PARAMS}, record)
    with pytest.raises(CheckpointError, match=rf"1: its record is not that of a run: .*{message}"):
        read_checkpoint(str(tmp_path / "checkpoints"))


def test_what_is_no_checkpoint_is_refused(tmp_path, full_run):
    with pytest.raises(UserError, match=r"there is no checkpoint .*missing"):
        read_checkpoint(str(tmp_path / "missing"))
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        read_checkpoint(str(tmp_path))
    with pytest.raises(UserError, match=r"3 is one of several checkpoints: give .*best"):
        read_checkpoint(str(full_run / "best" / "3"))
    (tmp_path / "pickle.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"pickle\.pt is a pickle"):
        read_checkpoint(str(tmp_path / "pickle.pt"))
    save_standard(tmp_path / "list", [jnp.ones(2)])
    with pytest.raises(UserError, match="has no params: it is a list"):
        read_checkpoint(str(tmp_path / "list"))
    save_standard(tmp_path / "damaged", PARAMS)
    (tmp_path / "damaged" / "_METADATA").write_text("{}")
    with pytest.raises(CheckpointError, match=r"cannot read .*damaged"):
        read_checkpoint(str(tmp_path / "damaged"))
    save_standard(tmp_path / "two" / "a", PARAMS)
    save_standard(tmp_path / "two" / "b", PARAMS)
    with pytest.raises(CheckpointError, match=r"has several items \(a, b\): give one of them"):
        read_checkpoint(str(tmp_path / "two"))
