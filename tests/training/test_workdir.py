"""A run's directory: one owner, whole files, logs without gaps or repetitions."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from cuttlefish_jax.errors import StorageError, WorkdirError
from cuttlefish_jax.training.config import default_config
from cuttlefish_jax.training.workdir import Workdir

SMALL_DISK = "64k"  # the size of the fixture of that name


@pytest.fixture
def workdir(tmp_path):
    with Workdir(tmp_path / "runs" / "one") as workdir:
        yield workdir


def test_the_first_claim_writes_the_settings_and_the_second_finds_them(workdir):
    config = default_config()
    assert workdir.claim(config)
    assert not workdir.claim(default_config())
    saved = json.loads((workdir.path / "config.json").read_text())
    assert saved["schedule"]["milestones"] == [0.5, 0.75]
    assert saved["name"] == "unnamed"


def test_a_check_leaves_a_free_directory_free_and_refuses_as_a_claim_does(workdir):
    config = default_config()
    config.seed = 3
    assert workdir.check(config)
    assert workdir.claim(default_config())
    assert not workdir.check(default_config())
    with pytest.raises(WorkdirError, match=r"settings: seed \(there 0, here 3\)\."):
        workdir.check(config)


def test_other_settings_are_refused_by_name_and_value(workdir):
    workdir.claim(default_config())
    config = default_config()
    config.seed = 3
    config.plan.keep = ("stem",)
    before = (workdir.path / "config.json").read_bytes()
    with pytest.raises(WorkdirError) as caught:
        workdir.claim(config)
    message = str(caught.value)
    assert 'plan.keep (there [], here ["stem"]), seed (there 0, here 3).' in message
    assert "Give another --workdir" in message
    assert (workdir.path / "config.json").read_bytes() == before
    assert not workdir.claim(config, ignore=("seed", "plan.keep"))
    with pytest.raises(WorkdirError, match=r"settings: seed \(there 0, here 3\)\."):
        workdir.claim(config, ignore=("plan.keep",))


def test_settings_that_only_one_side_knows_are_differences(workdir):
    workdir.claim({"a": {"b": 1}, "old": 2})
    with pytest.raises(WorkdirError, match=r"old \(there 2, here not set\), a.new \(there not set, here 3\)"):
        workdir.claim({"a": {"b": 1, "new": 3}})


def test_settings_that_an_older_version_did_not_know_had_their_defaults(workdir):
    workdir.claim({"a": {"b": 1}})
    defaults = {"a": {"b": 0, "new": 3}}
    assert not workdir.check({"a": {"b": 1, "new": 3}}, defaults=defaults)
    with pytest.raises(WorkdirError, match=r"settings: a.new \(there 3, here 4\)\."):
        workdir.check({"a": {"b": 1, "new": 4}}, defaults=defaults)


@pytest.mark.parametrize("text", [b'{"seed": ', b"[" * 100_000, b"\xff\xfe{"])
def test_a_damaged_json_file_is_named(workdir, text):
    (workdir.path / "config.json").write_bytes(text)
    with pytest.raises(WorkdirError, match=r"config\.json is damaged"):
        workdir.claim({"seed": 0})


def test_json_takes_arrays_and_is_replaced_as_a_whole(workdir):
    workdir.write_json("summary.json", {"ranks": np.arange(3), "loss": jnp.float32(0.5), "n": np.int64(7)})
    assert workdir.read_json("summary.json") == {"ranks": [0, 1, 2], "loss": 0.5, "n": 7}
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        workdir.write_json("summary.json", {"x": object()})
    assert workdir.read_json("summary.json")["n"] == 7
    assert workdir.read_json("missing.json") is None


def test_a_summary_means_finished(workdir):
    assert not workdir.is_finished
    workdir.write_json("summary.json", {})
    assert workdir.is_finished


def test_a_resumed_log_is_that_of_an_unbroken_run(workdir):
    def log(epochs):
        for epoch in epochs:
            workdir.append(
                "metrics.jsonl", {"epoch": epoch, "loss": 1 / (epoch + 3), "seconds": float("nan")}
            )

    log(range(6))
    file = workdir.path / "metrics.jsonl"
    unbroken = file.read_bytes()
    with open(file, "ab") as stream:
        stream.write(b'{"epoch": 6, "lo')  # killed within a line
    workdir.rewind_log("metrics.jsonl", epoch=4)
    assert [line["epoch"] for line in workdir.read_log("metrics.jsonl")] == [0, 1, 2, 3]
    log(range(4, 6))
    assert file.read_bytes() == unbroken
    workdir.rewind_log("missing.jsonl", epoch=0)
    assert not (workdir.path / "missing.jsonl").exists()


@pytest.mark.parametrize("torn", [b'{"epoch": 1, "lo', b"x" * 10_000, b""])
def test_a_torn_last_line_is_left_out_and_written_over(workdir, torn):
    workdir.append("log.jsonl", {"epoch": 0})
    with open(workdir.path / "log.jsonl", "ab") as stream:
        stream.write(torn)
    assert workdir.read_log("log.jsonl") == [{"epoch": 0}]
    workdir.append("log.jsonl", {"epoch": 1})
    assert workdir.read_log("log.jsonl") == [{"epoch": 0}, {"epoch": 1}]


def test_a_log_that_is_one_torn_line_is_empty(workdir):
    (workdir.path / "log.jsonl").write_text('{"epo')
    assert workdir.read_log("log.jsonl") == []
    workdir.append("log.jsonl", {"epoch": 0})
    assert (workdir.path / "log.jsonl").read_text() == '{"epoch": 0}\n'


def test_damage_within_a_log_is_an_error(workdir):
    (workdir.path / "log.jsonl").write_text('{"epoch": 0}\n{"ep\n{"epoch": 2}\n')
    with pytest.raises(WorkdirError, match=r"log\.jsonl is damaged"):
        workdir.read_log("log.jsonl")
    (workdir.path / "log.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(WorkdirError, match=r"log\.jsonl is damaged"):
        workdir.read_log("log.jsonl")


def test_only_the_writer_writes(tmp_path, workdir):
    other = Workdir(workdir.path, is_writer=False)
    assert other.claim({"seed": 1})
    other.write_json("summary.json", {})
    other.append("metrics.jsonl", {"epoch": 0})
    workdir.append("metrics.jsonl", {"epoch": 0})
    other.rewind_log("metrics.jsonl", epoch=0)
    assert sorted(os.listdir(workdir.path)) == [".lock", "metrics.jsonl"]
    assert other.read_log("metrics.jsonl") == [{"epoch": 0}]
    workdir.claim({"seed": 2})
    with pytest.raises(WorkdirError, match="seed"):
        other.claim({"seed": 1})


def test_a_second_run_in_the_same_directory_is_refused(workdir):
    with pytest.raises(WorkdirError, match=rf"another run is working in .* \(process {os.getpid()} on "):
        Workdir(workdir.path)
    workdir.close()
    Workdir(workdir.path).close()


def test_the_lock_of_a_killed_run_is_free(tmp_path):
    # Loads the one module alone: the test is about processes, and importing jax in them takes its time.
    script = """
        import sys, time, types
        from pathlib import Path
        package = Path(sys.argv[2])
        for name, path in (("cuttlefish_jax", package), ("cuttlefish_jax.training", package / "training")):
            module = types.ModuleType(name)
            module.__path__ = [str(path)]
            sys.modules[name] = module
        from cuttlefish_jax.training.workdir import Workdir
        workdir = Workdir(sys.argv[1])
        print("locked", flush=True)
        time.sleep(60)
    """
    package = Path(sys.modules["cuttlefish_jax"].__path__[0])
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), str(package)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(WorkdirError, match=rf"process {process.pid} on "):
            Workdir(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
        Workdir(tmp_path).close()


def test_a_path_that_is_a_file_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match=r"is a file, not a directory\. Give another --workdir"):
            Workdir(path)


def test_a_full_disk_leaves_what_was_there(small_disk):
    with Workdir(small_disk) as workdir:
        workdir.write_json("summary.json", {"a": 1})
        workdir.append("metrics.jsonl", {"epoch": 0})
        with pytest.raises(StorageError, match=r"summary\.json: no space left"):
            workdir.write_json("summary.json", {"a": "x" * 100_000})
        with pytest.raises(StorageError, match=r"metrics\.jsonl: no space left"):
            workdir.append("metrics.jsonl", {"epoch": 1, "x": "x" * 100_000})
        assert workdir.read_json("summary.json") == {"a": 1}
        assert (small_disk / "metrics.jsonl").read_text() == '{"epoch": 0}\n'
        assert sorted(os.listdir(small_disk)) == [".lock", "metrics.jsonl", "summary.json"]
        workdir.append("metrics.jsonl", {"epoch": 1})
        assert len(workdir.read_log("metrics.jsonl")) == 2
