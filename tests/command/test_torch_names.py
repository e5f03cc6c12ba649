"""A checkpoint of PyTorch goes through the command and back into PyTorch."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from cuttlefish_jax import serving
from cuttlefish_jax.command.torch_names import is_of_torch

torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
EXAMPLE = Path(__file__).parents[2] / "examples" / "torch_factorized.py"


def test_a_checkpoint_of_torch_is_factorized_and_runs_there_again(tmp_path, cuttlefish):
    from safetensors.torch import save_model

    torch.manual_seed(0)
    body = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3), torch.nn.Conv2d(16, 24, (3, 5)), torch.nn.Flatten(),
        torch.nn.Linear(24 * 4 * 2, 32), torch.nn.Linear(32, 10),
    )  # fmt: skip
    words = torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(50, 8), "body": body})
    save_model(words, str(tmp_path / "torch.safetensors"))
    out = tmp_path / "low.safetensors"
    options = ("--factorize", "body/1=12", "--factorize", "body/3=20", "--keep", "*")
    status, printed, _ = cuttlefish("factorize", tmp_path / "torch.safetensors", "--out", out, *options)
    assert status == 0 and "named as in PyTorch" in printed
    _, plan = serving.load_safetensors(out)
    assert plan.ranks == {"body/1": 12, "body/3": 20}
    assert plan.kept["embed_tokens"] == "an embedding"

    spec = importlib.util.spec_from_file_location("torch_factorized", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    weights, images = example.Weights(out), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        hidden = weights.conv("body/1")(weights.conv("body/0")(images)).flatten(1)
        low = weights.linear("body/4")(weights.linear("body/3")(hidden))
        for layer, rank in ((body[1], 12), (body[3], 20)):
            matrix = layer.weight.flatten(1).double()
            u, s, v = torch.linalg.svd(matrix, full_matrices=False)
            layer.weight.copy_(((u[:, :rank] * s[:rank]) @ v[:rank]).reshape(layer.weight.shape))
        np.testing.assert_allclose(low, body(images), rtol=1e-3, atol=1e-4)


def test_flax_is_not_taken_for_torch():
    assert is_of_torch({"a": {"weight": np.ones((2, 3))}})
    assert not is_of_torch({"a": {"weight": np.ones(3)}})
    assert not is_of_torch({"a": {"weight": np.ones((2, 3))}, "b": {"kernel": np.ones((2, 3))}})
