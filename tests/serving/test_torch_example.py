"""The file of examples/torch_factorized.py computes what Flax does, and needs nothing of this package."""

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cuttlefish_jax import serving
from tests.serving.serving_tools import factorized

torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
FILE = Path(__file__).parents[2] / "examples" / "torch_factorized.py"


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("torch_factorized", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_network_computes_what_flax_does(example, tmp_path):
    low, variables, plan = factorized()
    serving.save_safetensors(tmp_path / "low.safetensors", variables, plan)
    network = example.Network(tmp_path / "low.safetensors")
    images = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = network(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    ours = jax.jit(low.apply)(variables, images)
    np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in network.parameters()) == plan.num_params
    assert [tuple(layer.weight.shape) for layer in network.conv2] == [(6, 16, 3, 3), (32, 6, 1, 1)]


def test_bfloat16_stays(example, tmp_path):
    _, variables, plan = factorized()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables["params"])
    serving.save_safetensors(tmp_path / "low.safetensors", half, plan)
    hidden = example.Weights(tmp_path / "low.safetensors").linear("hidden")
    assert hidden[0].weight.dtype == torch.bfloat16
    expected = np.asarray(half["hidden"]["u"]["kernel"].T, np.float32)
    np.testing.assert_array_equal(hidden[0].weight.detach().float().numpy(), expected)


def test_the_example_imports_torch_and_safetensors_alone():
    imports = re.findall(r"^\s*(?:from|import)\s+(\w+)", FILE.read_text(), re.MULTILINE)
    assert set(imports) == {"json", "sys", "torch", "safetensors"}
