"""Safetensors files made by somebody who means harm: each is refused by a line that names it, or harmless."""

import json
import struct
import tracemalloc

import numpy as np
import pytest

from cuttlefish_jax import serving
from cuttlefish_jax.safetensors_file import files_of, open_checkpoint


def raw(path, header, data=b"", length=None):
    """A file, byte by byte: the length of its header, the header, the tensors."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def tensor(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def refusal(path):
    """What is said of a file: one line that names it, and never more memory than a small file needs."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r".") as error:
            serving.load_safetensors(path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    message = str(error.value)
    assert str(path) in message and len(message.splitlines()) == 1 and len(message) < 1000
    return message


DAMAGED = {
    "longer than the file": ({"a": tensor([1], 0, 4)}, b"\0" * 4, 2**20),
    "longer than any memory": ({"a": tensor([1], 0, 4)}, b"\0" * 4, 2**63),
    "as long as can be": ({"a": tensor([1], 0, 4)}, b"\0" * 4, 2**64 - 1),
    "no header": (b"", b"", None),
    "not JSON": (b"{'a': 1}", b"", None),
    "not UTF-8": (b'{"\xff\xfe": 1}', b"", None),
    "deep": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"", None),
    "a deep shape": (b'{"a":{"dtype":"F32","data_offsets":[0,4],"shape":' + b"[" * 100_000, b"", None),
    "no object": ([1, 2], b"", None),
    "beyond the end": ({"a": tensor([2], 0, 8)}, b"\0" * 4, None),
    "overlapping": ({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, b"\0" * 12, None),
    "the same bytes": ({"a": tensor([1], 0, 4), "b": tensor([1], 0, 4)}, b"\0" * 4, None),
    "a hole": ({"a": tensor([1], 4, 8)}, b"\0" * 8, None),
    "bytes of nobody": ({"a": tensor([1], 0, 4)}, b"\0" * 8, None),
    "backwards": ({"a": tensor([1], 4, 0)}, b"\0" * 4, None),
    "negative": ({"a": tensor([1], -4, 0)}, b"\0" * 4, None),
    "infinite": (b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}', b"\0" * 4, None),
    "not a number": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"\0" * 4, None),
    "a huge shape": ({"a": tensor([2**40], 0, 4)}, b"\0" * 4, None),
    "a shape that wraps round": ({"a": tensor([2**32, 2**32], 0, 0)}, b"", None),
    "too large a number": ({"a": tensor([10**40], 0, 4)}, b"\0" * 4, None),
    "another dtype": ({"a": tensor([1], 0, 4, "PICKLE")}, b"\0" * 4, None),
    "metadata that is no text": ({"__metadata__": {"cuttlefish_plan": {}}}, b"", None),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_cannot_be_is_refused_when_it_is_opened(name, tmp_path):
    header, data, length = DAMAGED[name]
    message = refusal(raw(tmp_path / "model.safetensors", header, data, length))
    assert "is truncated, or not a safetensors file: " in message


def test_a_tensor_that_numpy_has_no_array_for(tmp_path):
    path = raw(tmp_path / "model.safetensors", {"a": tensor([0, 2**62, 2], 0, 0)})
    with open_checkpoint([path]) as checkpoint, pytest.raises(ValueError) as error:
        checkpoint.read("a")
    assert str(error.value).startswith(f"{path}: cannot read the tensor 'a': ")
    assert "cannot read the tensor 'a'" in refusal(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a..kernel", "the name of the tensor 'a..kernel' has an empty part"),
        ("../../etc/passwd/", "has an empty part"),
        ("/etc/passwd", "the name of the tensor '/etc/passwd' has an empty part"),
        ("", "the name of the tensor '' has an empty part"),
        (".".join("a" * 100_000), "has 100000 parts, more than 64"),
    ],
)
def test_names_that_make_no_tree(name, message, tmp_path):
    path = raw(tmp_path / "model.safetensors", {name: tensor([1], 0, 4)}, b"\0" * 4)
    assert message in refusal(path)


def test_names_that_look_like_paths_are_keys_and_nothing_more(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    header = {"../../x": tensor([1], 0, 4), "~/y": tensor([1], 4, 8), "z\n\0": tensor([1], 8, 12)}
    tree, _ = serving.load_safetensors(raw(folder / "model.safetensors", header, b"\0" * 12))
    assert tree == {"..": {"..": {"x": np.zeros(1)}}, "~": {"y": np.zeros(1)}, "z\n\0": np.zeros(1)}
    assert [file.name for file in tmp_path.rglob("*")] == ["in", "model.safetensors"]


def test_the_same_name_twice_is_one_tensor_or_refused(tmp_path):
    one = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    header = b"{" + one % (0, 4) + b"," + one % (4, 8) + b"}"
    assert "is truncated, or not a safetensors file" in refusal(
        raw(tmp_path / "m.safetensors", header, b"\0" * 8)
    )


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("[" * 100_000, "it is not JSON"),
        ('{"format": 1, "format": 1}', "an object has the same key twice: 'format'"),
        ('{"format": 1e999}', "1e999 is too large a number"),
        ('{"format": -Infinity}', "-Infinity is not a number"),
        ("\0", "it is not JSON"),
    ],
)
def test_plans_in_the_metadata(plan, message, tmp_path):
    header = {"__metadata__": {"cuttlefish_plan": plan}, "a": tensor([1], 0, 4)}
    said = refusal(raw(tmp_path / "model.safetensors", header, b"\0" * 4))
    assert "not a factorization plan: " in said and message in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            b'{"weight_map": {"a": "../model.safetensors"}}',
            "'../model.safetensors', which is not a file beside",
        ),
        (b'{"weight_map": {"a": "/etc/passwd"}}', "'/etc/passwd', which is not a file beside it"),
        (b'{"weight_map": {"a": ".."}}', "'..', which is not a file beside it"),
        (b'{"weight_map": {"a": "x\\u0000y"}}', "which is not a file beside it"),
        (b'{"weight_map": {"a": ["x"]}}', "['x'], which is not a file beside it"),
        (b'{"weight_map": {"a": {"x": 1}}}', "which is not a file beside it"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "the same key twice: 'a'"),
        (b'{"weight_map": ["a"]}', "'weight_map' is ['a'], expected dict"),
        (b'{"weight_map": ' + b"[" * 100_000, "it is not JSON"),
        (b'{"weight_map": {"\xff": "x"}}', "it is not JSON"),
        (b"\xff\xfe\xfd", "it is not JSON"),
        (b'{"weight_map": 1e999}', "1e999 is too large a number"),
    ],
)
def test_lists_of_files(text, message, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(text)
    with pytest.raises(ValueError) as error:
        files_of(tmp_path)
    assert str(index) in str(error.value) and message in str(error.value)
    assert len(str(error.value).splitlines()) == 1
