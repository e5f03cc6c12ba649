"""safetensors: the same bits back, the plan with them, and errors of one line."""

import json
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from cuttlefish_jax import serving
from tests.serving.serving_tools import factorized


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_variables_and_plan_come_back_bit_for_bit(file, dtype):
    _, variables, plan = factorized()
    variables = jax.tree.map(lambda x: x.astype(dtype), variables)
    serving.save_safetensors(file, variables, plan)
    loaded, loaded_plan = serving.load_safetensors(file)
    chex.assert_trees_all_equal(loaded, jax.device_get(variables))
    chex.assert_trees_all_equal_dtypes(loaded, variables)
    assert loaded_plan == plan
    assert list(file.parent.iterdir()) == [file]


def test_others_find_the_names_and_the_plan(file):
    _, variables, plan = factorized()
    serving.save_safetensors(file, variables["params"], plan)
    with safetensors.safe_open(file, framework="numpy") as opened:
        assert {"conv2.u.kernel", "conv2.v.kernel", "hidden.v.bias", "conv1.kernel"} <= set(opened.keys())
        assert json.loads(opened.metadata()["cuttlefish_plan"])["ranks"] == {"conv2": 6, "hidden": 5}
        assert opened.metadata()["format"] == "flax"


def test_odd_trees(file):
    tree = {
        "a": np.float32(3),
        "b": {"0": np.zeros((0, 2)), "c": np.arange(6, dtype=np.int8).reshape(2, 3).T},
    }
    serving.save_safetensors(file, tree)
    loaded, plan = serving.load_safetensors(file)
    chex.assert_trees_all_equal(loaded, tree)
    assert plan is None


def test_names_joined_by_slashes_are_read(file):
    safetensors.numpy.save_file({"layer.1/kernel": np.ones(2)}, file)
    assert list(serving.load_safetensors(file)[0]) == ["layer.1"]


def test_an_older_file_is_whole_until_the_new_one_is(file, monkeypatch):
    serving.save_safetensors(file, {"a": np.ones(2)})
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        serving.save_safetensors(file, {"a": np.zeros(2)})
    np.testing.assert_array_equal(serving.load_safetensors(file)[0]["a"], np.ones(2))
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"fc": {"a.b": np.ones(2)}}, "'fc/a.b' has a key that is empty or has a dot"),
        ({"fc": {"": np.ones(2)}}, "'fc/' has a key that is empty"),
        ({"fc": {"kernel": 1.0}}, "'fc.kernel' is a float, not an array"),
        ({"fc": {"kernel": jax.random.key(0)}}, "'fc.kernel' is a random key"),
    ],
)
def test_what_is_no_tree_of_arrays_is_refused(file, tree, message):
    with pytest.raises(ValueError, match=message):
        serving.save_safetensors(file, tree)
    assert not file.exists()


def test_bad_files_are_named(file, tmp_path):
    with pytest.raises(ValueError, match=r"there is no file or folder .*model\.safetensors"):
        serving.load_safetensors(file)
    safetensors.numpy.save_file({"a": np.ones(1), "a.b": np.ones(1)}, file)
    with pytest.raises(ValueError, match=r"stands in the way of 'a\.b'"):
        serving.load_safetensors(file)
    safetensors.numpy.save_file({"a": np.ones(1)}, file, {"cuttlefish_plan": "{}"})
    with pytest.raises(ValueError, match=r"model\.safetensors: not a factorization plan"):
        serving.load_safetensors(file)
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ValueError, match="truncated, or not a safetensors file"):
        serving.load_safetensors(file)


def test_without_safetensors_the_error_names_the_extra(tmp_path):
    # In a process of its own, where it cannot be imported.
    code = """
import sys
sys.modules["safetensors"] = sys.modules["safetensors.numpy"] = None
from cuttlefish_jax import serving
try:
    serving.save_safetensors("never.safetensors", {})
except ValueError as error:
    print(error)
try:
    serving.load_safetensors("never.safetensors")
except ValueError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == [
        "saving needs safetensors: pip install 'cuttlefish-jax[serving]'",
        "reading needs safetensors: pip install 'cuttlefish-jax[serving]'",
    ]


def test_the_dtype_of_the_file_is_bfloat16s_own(file):
    serving.save_safetensors(file, {"a": np.ones(2, ml_dtypes.bfloat16)})
    with safetensors.safe_open(file, framework="numpy") as opened:
        assert opened.get_slice("a").get_dtype() == "BF16"
