"""What somebody who means harm may hand over: every command refuses it in one line, and writes nothing."""

import json
import os
import shutil
import struct

import numpy as np
import orbax.checkpoint as ocp
import pytest
from hostile_tools import make_huge, store_in_pieces

DEEP = "[" * 100_000


def _safetensors(folder, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def _orbax(folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "saved", {"fc": {"kernel": np.ones((4, 3), np.float32)}})
    for path in (folder / "saved").iterdir():
        shutil.move(path, folder)
    (folder / "saved").rmdir()


def deep_header(folder, run):
    _safetensors(folder, b'{"a":' * 100_000 + b"1" + b"}" * 100_000)


def huge_shape(folder, run):
    _safetensors(
        folder, {"a/kernel": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 4]}}, bytes(4)
    )


def shards_elsewhere(folder, run):
    index = {"weight_map": {"fc/kernel": "../../../etc/passwd"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def same_key_twice(folder, run):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b", "a": "c"}}')


def a_pickle(folder, run):
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch harmed'\ntR.")


def huge_pieces(folder, run):
    _orbax(folder)
    store_in_pieces(folder, "fc.kernel", [2**20, 2**20])


def huge_metadata(folder, run):
    _orbax(folder)
    make_huge(folder / "_METADATA")


def deep_metadata(folder, run):
    _orbax(folder)
    (folder / "_METADATA").write_text(DEEP)


def pipe_for_metadata(folder, run):
    _orbax(folder)
    (folder / "manifest.ocdbt").unlink()
    os.mkfifo(folder / "manifest.ocdbt")


def deep_config(folder, run):
    shutil.copytree(run, folder, dirs_exist_ok=True)
    (folder / "config.json").write_text(DEEP)


def huge_config(folder, run):
    shutil.copytree(run, folder, dirs_exist_ok=True)
    make_huge(folder / "config.json")


def config_of_no_run(folder, run):
    shutil.copytree(run, folder, dirs_exist_ok=True)
    (folder / "config.json").write_text('{"model": {"name": ["__import__"]}, "data": 3}')


def deep_record(folder, run):
    shutil.copytree(run, folder, dirs_exist_ok=True)
    (folder / "best" / "3" / "record" / "metadata").write_text(DEEP)


def huge_record(folder, run):
    shutil.copytree(run, folder, dirs_exist_ok=True)
    make_huge(folder / "best" / "3" / "record" / "metadata")


@pytest.mark.parametrize("command", ["inspect", "factorize", "merge", "export"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (deep_header, "truncated, or not a safetensors file"),
        (huge_shape, "truncated, or not a safetensors file"),
        (shards_elsewhere, "'../../../etc/passwd', which is not a file beside it"),
        (same_key_twice, "an object has the same key twice: 'a'"),
        (a_pickle, "is a pickle, which can run code when it is read"),
        (huge_pieces, "is stored in pieces of (1048576, 1048576)"),
        (huge_metadata, "_METADATA: it has more than 64 MiB, too much for such a document"),
        (deep_metadata, "cannot read"),
        (pipe_for_metadata, "manifest.ocdbt is neither a file nor a directory"),
        (deep_config, "is not the config.json of a run"),
        (huge_config, "it has more than 64 MiB, too much for such a document"),
        (config_of_no_run, "is not the config.json of a run"),
        (deep_record, "its files are damaged"),
        (huge_record, "it has more than 64 MiB, too much for such a document"),
    ],
)
def test_no_command_is_harmed(make, message, command, full_run, cuttlefish, tmp_path, monkeypatch):
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    make(hostile, full_run)
    monkeypatch.chdir(tmp_path)
    status, printed, error = cuttlefish(
        command, hostile, *([] if command == "inspect" else ["--out", "new.safetensors"])
    )
    assert status == 2 and not printed
    assert message in error and str(hostile) in error and len(error) < 1000, error
    assert os.listdir(tmp_path) == ["hostile"]


def test_layers_are_called_like_files_and_nothing_more(cuttlefish, tmp_path, monkeypatch):
    names = [f"{layer}/kernel" for layer in ("a", "../../harmed", "c")]
    header = {
        name: {"dtype": "F32", "shape": [8, 8], "data_offsets": [256 * i, 256 * (i + 1)]}
        for i, name in enumerate(names)
    }
    _safetensors(tmp_path, header, np.eye(8, dtype=np.float32).tobytes() * 3)
    monkeypatch.chdir(tmp_path)
    status, printed, _ = cuttlefish("inspect", "model.safetensors", "--rank-ratio", "0.25")
    assert status == 0 and "../../harmed" in printed
    status, _, error = cuttlefish(
        "factorize", "model.safetensors", "--rank-ratio", "0.25", "--out", "low.safetensors"
    )
    assert status == 2 and "'params/..' has a key that is empty or has a dot" in error
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert not (tmp_path.parent.parent / "harmed").exists()
