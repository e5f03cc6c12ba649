"""Hosts that differ: found out, named, and stopped together."""

import json
import os

import pytest
from host_tools import run_on_two_hosts

from cuttlefish_jax.errors import ConfigError, HostLostError, UserError
from cuttlefish_jax.training import hosts
from cuttlefish_jax.training.agreement import agree, agreed_outcome, describe_difference

NAMES = ["a", "b", "c"]
RANKS = {"stem": 3.0, "stage1/conv1": [4.0, 5.0]}


@pytest.mark.parametrize(
    ("first", "others", "message"),
    [
        ({"a": {"b": 1}}, [{"a": {"b": 2}}], "the thing: a.b is 2 on host 1 (b), and 1 on host 0 (a)"),
        ({"a": 1}, [{"a": 1, "c": None}], "the thing: c is null on host 1 (b), and missing on host 0 (a)"),
        ({"a": [1, 2]}, [{"a": [1, 2]}, {"a": [1, 3]}], "a[1] is 3 on host 2 (c), and 2 on host 0 (a)"),
        ({"a": [1]}, [{"a": [1, 2]}], "a is [1, 2] on host 1 (b), and [1] on host 0 (a)"),
        ("x", ["y", "z"], 'the thing is "y" on host 1 (b) (and host 2), and "x" on host 0 (a)'),
        (None, [{"epoch": 3}], 'the thing is {"epoch": 3} on host 1 (b), and null on host 0 (a)'),
    ],
)
def test_the_first_difference_is_named(first, others, message):
    values = [["the thing", value] for value in (first, *others)]
    assert describe_difference(values, NAMES).endswith(message)


def test_numbers_may_differ_by_a_tolerance_and_nothing_else():
    def message(other, tolerance):
        return describe_difference([["ranks", RANKS], ["ranks", other]], NAMES, tolerance=tolerance)

    near = {"stem": 3.03, "stage1/conv1": [4.0, 5.0]}
    assert message(RANKS, 0.0) == message(near, 0.02) == ""
    assert "ranks: stem is 3.03 on host 1" in message(near, 0.0)
    assert "ranks: stage1/conv1[1] is 5.2 on host 1" in message(near | {"stage1/conv1": [4.0, 5.2]}, 0.02)
    assert "stem is NaN" in message(RANKS | {"stem": float("nan")}, 0.02)
    both = [["ranks", {"stem": float("nan")}]] * 2
    assert describe_difference(json.loads(json.dumps(both)), NAMES) == ""


def test_hosts_at_other_points_of_the_program_are_told_so():
    message = describe_difference([["the plan", 1], ["the plan", 1], ["the verdict", 1]], NAMES)
    assert message.endswith("host 2 (c) is at 'the verdict', host 0 (a) at 'the plan'")


def test_one_host_agrees_with_itself():
    value = {"stem": (1, 2)}
    assert agree("the thing", value) is value
    with pytest.raises(ConfigError, match=r"^as it was$"), agreed_outcome():
        raise ConfigError("as it was")


ADDRESS = {"coordinator_address": "localhost:1234", "num_processes": 2, "process_id": 0}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_processes": 2}, "--num_processes without --coordinator_address and --process_id: give all"),
        (ADDRESS | {"automatic": True}, "--distributed finds the hosts by itself: leave it out, or --coord"),
        (ADDRESS | {"process_id": 2}, "--process_id=2: with --num_processes=2 it must be from 0 to 1"),
        (ADDRESS | {"process_id": -1}, "--process_id=-1"),
        (ADDRESS | {"num_processes": 0}, "--num_processes=0: it must be 1 or more"),
        (ADDRESS | {"coordinator_address": "localhost"}, "=localhost: it must be host:port, of process 0"),
        (ADDRESS | {"coordinator_address": "localhost:99999"}, "it must be host:port"),
        (ADDRESS | {"timeout": 0}, "--initialization_timeout=0: it must be 1 or more seconds"),
    ],
)
def test_wrong_flags_are_refused_in_a_line(given, message):
    with pytest.raises(UserError) as error:
        hosts.join(**given)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_one_process_needs_nobody():
    hosts.join()
    hosts.join(**ADDRESS | {"num_processes": 1})
    assert hosts.leave(3, UserError("on one host")) == 3
    # What looks like a broken connection is none, where there is one host.
    with pytest.raises(ValueError, match="Gloo"), hosts.lost_hosts():
        raise ValueError("Gloo")
    assert issubclass(HostLostError, UserError)


_DISAGREEMENTS = """
    import contextlib, fcntl, json, os, sys
    from pathlib import Path

    import numpy as np
    from jax.experimental import multihost_utils

    from configs import quickstart
    from cuttlefish_jax.training import start
    from cuttlefish_jax.training.agreement import agree, agreed_outcome, first_hosts
    from cuttlefish_jax.training.data import ArraySource, EvalInput, TrainInput
    from cuttlefish_jax.errors import ConfigError, UserError
    from cuttlefish_jax.training.experiment import Experiment
    from cuttlefish_jax.training.profile import get_profile

    host, root, said = jax.process_index(), Path(sys.argv[1]), {}

    @contextlib.contextmanager
    def expecting(name):
        try:
            yield
        except UserError as error:
            said[name] = str(error)
        else:
            said[name] = "no error"

    def open_workdir(name, config):
        with start.shared_workdir(root / name, config):
            pass

    said["equal"] = agree("it", {"a": [1, None, 0.1]})
    said["near"] = agree("it", {"a": 1.0 + host / 100}, tolerance=0.02)
    said["first"] = first_hosts({"a": np.arange(3) + host})["a"].tolist()
    with expecting("rank"):
        agree("the stable ranks", {"stage1/conv1": 4.0 + host}, tolerance=0.02)
    with expecting("elsewhere"):
        agree(["the plan", "the verdict"][host], 1)
    with expecting("outcome"), agreed_outcome():
        if host == 1:
            raise ConfigError("no such file")
    config = quickstart.get_config()
    config.update(batch_size=16, seed=host)
    with expecting("config"):
        open_workdir("run", config)
    config.seed = 0
    with expecting("workdir"):
        open_workdir(f"run{host}", config)
    if host == 0:
        (root / "locked").mkdir()
        lock = open(root / "locked" / ".lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    with expecting("lock"):
        open_workdir("locked", config)
    version, start.version = start.version, lambda name: "0.0" if host and name == "flax" else version(name)
    with expecting("program"):
        open_workdir("run", config)
    start.version = version

    # What the hosts measure, and what they read.
    config.model.update(width=8, stage_sizes=(1, 1))
    config.plan.update(keep=(), rank_rule="rank_ratio")
    config.data.train_examples = 64
    experiment = Experiment.from_config(config)
    with start.shared_workdir(root / "run", config) as directory:
        said["profile"] = get_profile(experiment, directory).to_json()
    start.check_data(experiment.task)
    source = experiment.task.train
    other = ArraySource({**source.arrays, "label": (source.arrays["label"] + host) % 10})
    with expecting("data"):
        start.check_data(experiment.task.__class__(**{**vars(experiment.task), "train": other}))

    def own(batches, wanted=lambda batch: True):
        return [
            int(i)
            for batch in batches
            for shard, weight in zip(
                batch["index"].addressable_shards, batch.get("weight", batch["index"]).addressable_shards
            )
            for i, w in zip(np.ravel(shard.data), np.ravel(weight.data))
            if "weight" not in batch or w
        ]

    source = ArraySource({"label": np.arange(21, dtype=np.int32)})
    for on_device in (True, False):
        train = TrainInput(source, batch_size=4, seed=0, on_device=on_device)
        evaluation = EvalInput(source, batch_size=4, on_device=on_device)
        said[f"train {on_device}"] = own(train.epoch(0))
        said[f"evaluation {on_device}"] = own(evaluation.batches())
        train.close(), evaluation.close()
    print(json.dumps(said), flush=True)
"""


@pytest.mark.slow
def test_two_hosts_that_differ_say_the_same_and_go_on_together(tmp_path):
    outputs = run_on_two_hosts(_DISAGREEMENTS, tmp_path)
    first, second = (json.loads(output.splitlines()[-1]) for output in outputs)

    for said in (first, second):
        assert said["equal"] == {"a": [1, None, 0.1]}
        assert said["near"] == {"a": 1.0} and said["first"] == [0, 1, 2]
        assert "\n" not in "".join(said[name] for name in ("rank", "config", "lock"))
    for name in ("rank", "elsewhere", "config", "program", "data"):
        assert first[name] == second[name]
    node = os.uname().nodename
    differ = f"stage1/conv1 is 5.0 on host 1 ({node}), and 4.0 on host 0 ({node})"
    assert first["rank"] == f"the hosts differ in the stable ranks: {differ}"
    assert "is at 'the verdict'" in first["elsewhere"]
    assert (first["outcome"], second["outcome"]) == (f"on host 1 ({node}): no such file", "no such file")
    assert "the hosts differ in config: seed is 1 on host 1" in first["config"]
    assert "is not the same directory on host 1 as on host 0" in second["workdir"]
    assert first["lock"].startswith("another run is working in")
    assert second["lock"] == f"on host 0 ({node}): {first['lock']}"
    assert 'the program: flax is "0.0" on host 1' in first["program"]
    assert "the data: train.the SHA-256 of a few of them is" in first["data"]

    # Times that each had measured by itself would differ.
    assert first["profile"] == second["profile"]
    written = json.loads((tmp_path / "run" / "profile.json").read_text())
    assert json.loads(first["profile"]) == written
    # Every example once: in training but for the remainder, one of 21 here.
    for way in ("True", "False"):
        train = first[f"train {way}"] + second[f"train {way}"]
        assert len(train) == len(set(train)) == 20 and set(train) <= set(range(21))
        assert len(first[f"train {way}"]) == len(second[f"train {way}"])
        assert sorted(first[f"evaluation {way}"] + second[f"evaluation {way}"]) == list(range(21))
    assert first["train True"] == first["train False"]
