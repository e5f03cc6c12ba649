import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from network_tools import random_variables, run_once

from cuttlefish_jax.models import create_model
from cuttlefish_jax.models.resmlp import Block

TINY = dict(num_classes=5, width=6, depth=1, patch=4)


def test_paths_and_shapes():
    model = create_model("resmlp_s12", **TINY | {"depth": 2})
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 16, 3))))
    affine = {"scale": (6,), "bias": (6,)}
    block = {
        "norm1": affine,
        "token_mixing": {"kernel": (8, 8), "bias": (8,)},
        "scale1": (6,),
        "norm2": affine,
        "mlp": {"fc1": {"kernel": (6, 24), "bias": (24,)}, "fc2": {"kernel": (24, 6), "bias": (6,)}},
        "scale2": (6,),
    }
    assert set(variables) == {"params"}
    assert jax.tree.map(lambda p: p.shape, variables["params"]) == {
        "patch_embed": {"kernel": (4, 4, 3, 6), "bias": (6,)},
        "block1": block,
        "block2": block,
        "norm": affine,
        "head": {"kernel": (6, 5), "bias": (5,)},
    }


def test_token_mixing_and_head_against_numpy():
    model = create_model("resmlp_s12", **TINY)
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    params = random_variables(model, images)["params"]
    # Without the MLP, whose GELU is the library's.
    params["block1"]["scale2"] = jnp.zeros(6)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    logits, seen = run_once(lambda v: model.apply(v, images, capture_intermediates=True), {"params": params})
    x = np.asarray(seen["intermediates"]["patch_embed"]["__call__"][0], np.float64).reshape(2, 4, 6)
    block = p["block1"]
    normed = x * block["norm1"]["scale"] + block["norm1"]["bias"]
    mixed = np.einsum("btd,ts->bsd", normed, block["token_mixing"]["kernel"])
    mixed += block["token_mixing"]["bias"][:, None]
    x = x + block["scale1"] * mixed
    pooled = (x * p["norm"]["scale"] + p["norm"]["bias"]).mean(1)
    expected = pooled @ p["head"]["kernel"] + p["head"]["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "depth", "scale"),
    [("resmlp_s12", 12, 0.1), ("resmlp_s24", 24, 1e-5), ("resmlp_s36", 36, 1e-6)],
)
def test_scales_at_the_start(name, depth, scale):
    model = create_model(name, num_classes=5, width=2, patch=4)
    assert model.depth == depth
    scales = []

    def note(next_fun, args, kwargs, context):
        if isinstance(context.module, Block) and context.method_name == "__call__":
            scales.append(context.module.layer_scale)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3))))
    assert scales == [scale] * depth
    block = Block(layer_scale=scale)
    params = run_once(lambda key: block.init(key, jnp.zeros((1, 2, 3))), jax.random.key(0))["params"]
    assert params["scale1"].tolist() == params["scale2"].tolist() == [np.float32(scale)] * 3
