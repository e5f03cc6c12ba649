import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from network_tools import random_variables, run_once

from cuttlefish_jax.models import create_model
from cuttlefish_jax.models.layers import drop_path, embed_patches
from cuttlefish_jax.models.vit import Attention

TINY = dict(num_classes=5, width=12, depth=2, patch=4)


def dense(inputs, outputs):
    return {"kernel": (inputs, outputs), "bias": (outputs,)}


def test_paths_and_shapes():
    model = create_model("deit_tiny", **TINY)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 16, 3))))
    norm = {"scale": (12,), "bias": (12,)}
    block = {
        "norm1": norm,
        "attention": {"qkv": dense(12, 36), "proj": dense(12, 12)},
        "norm2": norm,
        "mlp": {"fc1": dense(12, 48), "fc2": dense(48, 12)},
    }
    assert set(variables) == {"params"}
    assert jax.tree.map(lambda p: p.shape, variables["params"]) == {
        "cls_token": (1, 1, 12),
        "pos_embed": (1, 9, 12),
        "patch_embed": {"kernel": (4, 4, 3, 12), "bias": (12,)},
        "block1": block,
        "block2": block,
        "norm": norm,
        "head": dense(12, 5),
    }


def float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def test_attention_against_numpy():
    attention = Attention(heads=3)
    x = jax.random.normal(jax.random.key(0), (2, 5, 12))
    params = random_variables(attention, x)["params"]
    x64, p = float64(x), float64(params)
    q, k, v = np.split(x64 @ p["qkv"]["kernel"] + p["qkv"]["bias"], 3, axis=-1)
    heads = []
    for features in (slice(0, 4), slice(4, 8), slice(8, 12)):
        scores = q[..., features] @ k[..., features].swapaxes(1, 2) / 4**0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(weights / weights.sum(-1, keepdims=True) @ v[..., features])
    expected = np.concatenate(heads, axis=-1) @ p["proj"]["kernel"] + p["proj"]["bias"]
    outputs = run_once(attention.apply, {"params": params}, x)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)


def test_the_head_reads_the_class_token_alone():
    model = create_model("deit_tiny", **TINY | {"depth": 1})
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = random_variables(model, images)
    logits, seen = run_once(lambda v: model.apply(v, images, capture_intermediates=True), variables)
    tokens, params = float64(seen["intermediates"]["block1"]["__call__"][0]), float64(variables["params"])
    token = tokens[:, 0]
    token = (token - token.mean(-1, keepdims=True)) / np.sqrt(token.var(-1, keepdims=True) + 1e-6)
    token = token * params["norm"]["scale"] + params["norm"]["bias"]
    expected = token @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_patches_are_tokens_row_by_row():
    class Patches(nn.Module):
        @nn.compact
        def __call__(self, images):
            return embed_patches(images, 2, 4, jnp.float32)

    images = np.random.default_rng(0).normal(size=(1, 8, 12, 3)).astype(np.float32)
    variables = random_variables(Patches(), images)
    tokens = run_once(Patches().apply, variables, images)
    conv = float64(variables["params"]["patch_embed"])
    squares = [images[0, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4] for i in range(2) for j in range(3)]
    expected = [np.tensordot(square, conv["kernel"], axes=3) + conv["bias"] for square in squares]
    np.testing.assert_allclose(tokens[0], expected, rtol=1e-5, atol=1e-5)


def test_drop_path_drops_whole_branches_of_examples():
    class Branch(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return drop_path(x, 0.25, train)

    x = jax.random.normal(jax.random.key(0), (4000, 2, 3))
    assert np.array_equal(Branch().apply({}, x, train=False), x)
    y = np.asarray(Branch().apply({}, x, train=True, rngs={"dropout": jax.random.key(1)}))
    dropped = np.all(y == 0, axis=(1, 2))
    np.testing.assert_allclose(y[~dropped], x[~dropped] / 0.75, rtol=1e-6)
    assert abs(dropped.mean() - 0.25) < 0.03  # more than four standard deviations


@pytest.mark.parametrize(
    ("name", "expected"),
    [("deit_tiny", [0.0, 0.0, 0.1, 0.1, 0.2, 0.2]), ("resmlp_s12", [0.2] * 6)],
)
def test_rates_of_drop_path(name, expected):
    model = create_model(name, **TINY | {"depth": 3, "drop_path": 0.2})
    rates = []

    def note(next_fun, args, kwargs, context):
        if isinstance(context.module, nn.Dropout) and context.method_name == "__call__":
            rates.append(context.module.rate)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3))))
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("name", ["deit_tiny", "resmlp_s12"])
def test_drop_path_is_for_training_alone(name):
    images = jax.random.normal(jax.random.key(0), (8, 8, 8, 3))
    model, plain = (create_model(name, **TINY, drop_path=rate) for rate in (0.5, 0.0))
    variables = random_variables(plain, images)

    def evaluate(variables):
        outputs = model.apply(variables, images), plain.apply(variables, images, train=True)
        keys = jax.random.split(jax.random.key(1))
        trained = [model.apply(variables, images, train=True, rngs={"dropout": key}) for key in keys]
        return plain.apply(variables, images), outputs, trained

    expected, unchanged, trained = run_once(evaluate, variables)
    for outputs in unchanged:
        np.testing.assert_allclose(outputs, expected, atol=1e-6)
    assert np.max(np.abs(trained[0] - expected)) > 0.01
    assert np.max(np.abs(trained[0] - trained[1])) > 0.01


@pytest.mark.parametrize("name", ["deit_tiny", "resmlp_s12"])
def test_initialization(name):
    model = create_model(name, num_classes=5, width=96, depth=1)
    params = run_once(lambda key: model.init(key, jnp.zeros((1, 32, 32, 3))), jax.random.key(0))["params"]
    for kernel in (params["block1"]["mlp"]["fc1"]["kernel"], params["patch_embed"]["kernel"]):
        np.testing.assert_allclose(jnp.std(kernel), 0.02, rtol=0.03)
    biases = [layer["bias"] for layer in (params["block1"]["mlp"]["fc1"], params["patch_embed"])]
    assert not np.any(np.concatenate(biases))
