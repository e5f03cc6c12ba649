"""A run's directory: one owner, whole files, logs without gaps or repetitions."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from cuttlefish_jax.errors import StorageError, UserError, WorkdirError
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


@pytest.mark.parametrize(
    "text",
    [b'{"seed": ', b"[" * 100_000, b"\xff\xfe{", b"[1]", b"null", b'"x"'],
)
def test_a_damaged_json_file_is_named(workdir, text):
    (workdir.path / "config.json").write_bytes(text)
    with pytest.raises(WorkdirError, match=r"config\.json is damaged") as error:
        workdir.claim({"seed": 0})
    assert "\n" not in str(error.value)
    assert (workdir.path / "config.json").read_bytes() == text


def test_settings_nested_however_deep_are_refused(workdir):
    for depth in range(500, 1000, 7):
        (workdir.path / "config.json").write_text('{"a":' * depth + "1" + "}" * depth)
        with pytest.raises(WorkdirError):
            workdir.check({"seed": 0})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("checkpoints/12/record", ""),
        ("best/3.replaced/record", ""),
        ("metrics.jsonl", '{"epoch": 0}\n'),
        ("ranks.jsonl", '{"epoch": 0}\n{"epoch": 1}\n'),
        ("summary.json", "{}"),
    ],
)
def test_what_a_run_left_without_its_settings_is_refused(workdir, name, text):
    (workdir.path / name).parent.mkdir(parents=True, exist_ok=True)
    (workdir.path / name).write_text(text)
    what = name.partition("/")[0].replace(".", r"\.")
    with pytest.raises(WorkdirError, match=rf"/one has {what} and no config\.json, .* another --workdir$"):
        workdir.check({"seed": 0})
    with pytest.raises(WorkdirError, match=what):
        workdir.claim({"seed": 0})
    assert not (workdir.path / "config.json").exists()


def test_what_a_run_leaves_before_it_begins_is_free(workdir):
    (workdir.path / "checkpoints").mkdir()
    (workdir.path / "checkpoints" / ".folder_view").write_text("")
    (workdir.path / "profile.json").write_text("{}")
    workdir.append("ranks.jsonl", {"epoch": 0})
    assert workdir.claim({"seed": 0})


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


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("5", "it is a number or a truth value, not an object"),
        ("null", "it is null, not an object"),
        ('{"loss": 1}', 'it has no "epoch"'),
        ('{"epoch": "2"}', 'it has no "epoch"'),
        ('{"epoch": 2, ', r"Expecting property name .* at column \d+"),
        ("", "Expecting value at column 1"),
        ("\xff", "'utf-8' codec .*"),
    ],
)
def test_a_bad_line_of_a_log_is_named_by_its_number(workdir, line, reason):
    text = '{"epoch": 0}\n{"epoch": 1, "x": "\\u2028"}\n' + line + '\n{"epoch": 3}\n'
    (workdir.path / "log.jsonl").write_text(text, encoding="latin-1")
    with pytest.raises(WorkdirError, match=rf"log\.jsonl is damaged, in line 3 \({reason}\)\. Del") as error:
        workdir.read_log("log.jsonl")
    assert "\n" not in str(error.value)


def test_a_log_that_is_too_large_is_not_read(workdir):
    with open(workdir.path / "log.jsonl", "wb") as file:
        file.truncate(2**40)  # without taking space
    with pytest.raises(WorkdirError, match=r"log\.jsonl is damaged \(it has more than 256 MiB"):
        workdir.read_log("log.jsonl")


@pytest.mark.parametrize(
    ("epochs", "epoch", "last", "lost"),
    [
        ([0, 1, 2, 3], 3, None, None),
        ([0, 2, 3], 3, None, "1 of its lines, that of epoch 1 first"),
        ([], 2, None, "2 of its lines, that of epoch 0 first"),
        ([0, 1], 4, None, "2 of its lines, that of epoch 2 first"),
        ([0, 1], 4, 1, None),
        ([0], 4, 1, "1 of its lines, that of epoch 1 first"),
        ([0, 1, 2, 3], 0, None, None),
    ],
)
def test_lines_that_a_log_has_lost_are_a_warning(workdir, caplog, epochs, epoch, last, lost):
    for number in epochs:
        workdir.append("log.jsonl", {"epoch": number})
    workdir.rewind_log("log.jsonl", epoch=epoch, last=last)
    said = [record.getMessage() for record in caplog.records]
    expected = f"{workdir.path}/log.jsonl has lost {lost}: the run goes on without them"
    assert said == ([expected] if lost else [])
    assert [line["epoch"] for line in workdir.read_log("log.jsonl")] == [n for n in epochs if n < epoch]


def test_only_the_writer_writes(tmp_path, workdir):
    other = Workdir(workdir.path, is_writer=False)
    assert other.claim({"seed": 1})
    other.write_json("summary.json", {})
    other.append("metrics.jsonl", {"epoch": 0})
    assert os.listdir(workdir.path) == [".lock"]
    workdir.claim({"seed": 2})
    workdir.append("metrics.jsonl", {"epoch": 0})
    other.rewind_log("metrics.jsonl", epoch=0)
    assert other.read_log("metrics.jsonl") == [{"epoch": 0}]
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


def test_a_lock_that_was_deleted_stops_the_run_at_its_next_line(workdir):
    lock = workdir.path / ".lock"
    contents = lock.read_bytes()
    workdir.append("log.jsonl", {"epoch": 0})
    lock.unlink()
    message = r"/\.lock was deleted while this run worked, so another one may be in .*/one by now: see to it"
    with pytest.raises(WorkdirError, match=message):
        workdir.append("log.jsonl", {"epoch": 1})
    lock.write_bytes(b"1 on elsewhere\n")
    with pytest.raises(WorkdirError, match=message):
        workdir.append("log.jsonl", {"epoch": 1})
    # As on file systems that do not keep the number of a file: what is in it tells.
    lock.write_bytes(contents)
    workdir.append("log.jsonl", {"epoch": 1})
    assert [line["epoch"] for line in workdir.read_log("log.jsonl")] == [0, 1]


@pytest.mark.parametrize("path", ["gs://bucket/run", "s3://bucket/run", "hdfs+x://host:1/run", "file:///run"])
def test_storage_that_is_not_mounted_is_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WorkdirError, match=rf"^{re.escape(path)} is not on .*: mount that storage, and"):
        Workdir(path)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x\udcff", r"^--workdir='[^']*/x\\udcff': its name is not UTF-8\. Give another one$"),
        (
            "/".join(["x" * 200] * 18),
            r"^--workdir=.*\.\.\.: its path has \d+ bytes\. Give one of at most 3500",
        ),
        ("x" * 300, r"^cannot write .*: File name too long\. .*--workdir$"),
    ],
)
def test_names_that_no_file_can_have_are_refused_at_the_start(tmp_path, name, message):
    with pytest.raises(UserError, match=message) as error:
        Workdir(f"{tmp_path}/{name}")
    assert "\n" not in str(error.value) and str(error.value).isascii()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_folder_where_a_file_should_be_is_named(workdir, name):
    (workdir.path / name).mkdir()
    message = rf"{name}: Is a directory\. Mend that, or give another --workdir$"
    for action in (workdir.read_json, workdir.read_log):
        with pytest.raises(StorageError, match=f"^cannot read .*{message}"):
            action(name)
    for action in (workdir.write_json, workdir.append):
        with pytest.raises(StorageError, match=f"^cannot write .*{message}"):
            action(name, {"epoch": 0})
    assert sorted(os.listdir(workdir.path)) == [".lock", name]


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


def test_a_read_only_disk_is_refused_unless_the_run_is_finished(small_disk):
    with Workdir(small_disk) as workdir:
        workdir.claim({"seed": 0})

    def read_only(is_it):
        mode = "ro" if is_it else "rw"
        subprocess.run(["mount", "-o", f"remount,{mode}", str(small_disk)], check=True)

    read_only(True)
    with pytest.raises(StorageError, match="permission denied"):
        Workdir(small_disk)
    read_only(False)
    (small_disk / "summary.json").write_text('{"epochs": 1}')
    read_only(True)
    with Workdir(small_disk) as workdir:
        assert workdir.is_finished
        assert not workdir.check({"seed": 0})
        with pytest.raises(WorkdirError, match="other settings"):
            workdir.check({"seed": 1})
        assert workdir.read_json("summary.json") == {"epochs": 1}
        with pytest.raises(StorageError, match="permission denied"):
            workdir.append("metrics.jsonl", {"epoch": 0})
