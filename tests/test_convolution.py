"""The convolutions of factors against lax.conv_general_dilated."""

from __future__ import annotations

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import cuttlefish_jax as cf
from cuttlefish_jax.convolution import conv_general_dilated


def layer_and_input(kernel_size, **options):
    own = {"conv_general_dilated": conv_general_dilated}
    x = jax.random.normal(jax.random.key(0), (2, *(9, 7, 5)[: len(kernel_size)], 4))
    return nn.Conv(6, kernel_size, **options), nn.Conv(6, kernel_size, **own, **options), x


def primitives(fn, *args):
    return {eqn.primitive.name for eqn in jax.make_jaxpr(fn)(*args).eqns}


PRODUCTS = {
    "three axes": ((1, 1, 1), {}),
    "strides": ((1, 1), {"strides": (2, 3)}),
    "explicitly no padding": ((1, 1), {"padding": 0}),
    "dilated window": ((1, 1), {"kernel_dilation": 2}),
    "wrapped": ((1, 1), {"padding": "CIRCULAR"}),
}
CONVOLUTIONS = {
    "window": ((3, 3), {}),
    "padded": ((1, 1), {"padding": 1}),
    "dilated input": ((1, 1), {"input_dilation": 2, "padding": 0}),
    "groups": ((1, 1), {"feature_group_count": 2}),
}


CASES = {**PRODUCTS, **CONVOLUTIONS}


def test_a_product_is_what_the_convolution_computes():
    layers = {case: layer_and_input(size, **options) for case, (size, options) in PRODUCTS.items()}

    def output_and_gradients(which):
        def one(layers):
            layer, x = layers[which], layers[2]
            variables = layers[0].init(jax.random.key(1), x)
            loss = lambda variables, x: jnp.sum(jnp.sin(layer.apply(variables, x)))  # noqa: E731
            return jax.value_and_grad(loss, argnums=(0, 1))(variables, x)

        return {case: one(of_case) for case, of_case in layers.items()}

    expected, found = jax.jit(lambda: (output_and_gradients(0), output_and_gradients(1)))()
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_it_is_a_product_where_the_window_is_one_pixel_and_nothing_is_padded(case):
    kernel_size, options = CASES[case]
    _, layer, x = layer_and_input(kernel_size, **options)
    found = primitives(layer.apply, jax.eval_shape(layer.init, jax.random.key(1), x), x)
    assert ("dot_general" in found) == (case in PRODUCTS)
    assert ("conv_general_dilated" in found) == (case in CONVOLUTIONS)


def test_the_precision_is_that_of_the_layer():
    _, layer, x = layer_and_input((1, 1), precision="highest")
    jaxpr = jax.make_jaxpr(layer.apply)(jax.eval_shape(layer.init, jax.random.key(0), x), x)
    products = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert [eqn.params["precision"] for eqn in products] == [(jax.lax.Precision.HIGHEST,) * 2]


def factor_primitives(model, x):
    kernels = cf.find_kernels(model, x)
    low = cf.factorize(model, cf.FactorizationPlan.from_ranks(kernels, dict.fromkeys(kernels, 2)))
    if isinstance(model, nnx.Module):
        return [eqn.primitive.name for eqn in jax.make_jaxpr(low)(x).eqns]
    variables = jax.eval_shape(low.init, jax.random.key(0), x)
    return [eqn.primitive.name for eqn in jax.make_jaxpr(low.apply)(variables, x).eqns]


def make_conv(front_end, kernel_size, **options):
    if front_end == "linen":
        return nn.Conv(6, kernel_size, **options)
    return nnx.Conv(4, 6, kernel_size, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("front_end", ["linen", "nnx"])
def test_factors_of_one_pixel_are_products(front_end):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 4)), jnp.float32)
    found = factor_primitives(make_conv(front_end, (3, 3)), x)
    assert (found.count("conv_general_dilated"), found.count("dot_general")) == (1, 1)
    found = factor_primitives(make_conv(front_end, (1, 1), strides=2), x)
    assert (found.count("conv_general_dilated"), found.count("dot_general")) == (0, 2)


@pytest.mark.parametrize("front_end", ["linen", "nnx"])
def test_a_convolution_of_ones_own_is_kept(front_end):
    calls = []

    def own(*args, **kwargs):
        calls.append(args[1].shape)
        return jax.lax.conv_general_dilated(*args, **kwargs)

    x = jnp.ones((2, 8, 8, 4))
    model = make_conv(front_end, (3, 3), conv_general_dilated=own)
    kernels = cf.find_kernels(model, x)
    low = cf.factorize(model, cf.FactorizationPlan.from_ranks(kernels, dict.fromkeys(kernels, 2)))
    calls.clear()
    low(x) if front_end == "nnx" else jax.eval_shape(low.init, jax.random.key(0), x)
    assert calls == [(3, 3, 4, 2), (1, 1, 2, 6)]
