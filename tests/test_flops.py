"""Counted FLOPs against hand counts, and against what the kernels of a model say."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from linen_zoo import CASES, plan_at, prepared

import cuttlefish_jax as cf

A, B = jax.ShapeDtypeStruct((4, 8), jnp.float32), jax.ShapeDtypeStruct((8, 2), jnp.float32)
DOT = 2 * 4 * 8 * 2
IMAGE = jax.ShapeDtypeStruct((2, 9, 9, 4), jnp.float32)


def square(x):
    """Two products of 8 x 8 matrices."""
    return x @ x @ x


SQUARE = 2 * (2 * 8 * 8 * 8)
custom = jax.custom_vjp(square)
custom.defvjp(lambda x: (custom(x), x), lambda x, g: (g @ x,))
X = jax.ShapeDtypeStruct((8, 8), jnp.float32)


@pytest.mark.parametrize(
    ("fn", "args", "expected"),
    [
        (jnp.dot, (A, B), DOT),
        (lambda a, b: jnp.sin(a) + 3 * a, (A, B), 0),
        (lambda a, b: (a @ b) @ (a @ b).T, (A, B), 2 * DOT + 2 * 4 * 2 * 4),
        (lambda a, b: jnp.einsum("bij,bjk->bik", jnp.stack([a] * 3), jnp.stack([b] * 3)), (A, B), 3 * DOT),
        (lambda a, b: jnp.einsum("ij,ij->", a, a), (A, B), 2 * 4 * 8),
        (jax.vmap(jnp.dot, in_axes=(None, 0)), (A, jax.ShapeDtypeStruct((5, 8, 2), jnp.float32)), 5 * DOT),
        (jax.jit(jax.jit(square)), (X,), SQUARE),
        (jax.remat(square), (X,), SQUARE),
        (custom, (X,), SQUARE),
        (jax.grad(lambda x: custom(x).sum()), (X,), SQUARE // 2 * 3),
        (lambda x: lax.scan(lambda c, _: (square(c), None), x, length=7)[0], (X,), 7 * SQUARE),
        (lambda x: lax.scan(lambda c, y: (c @ x, y @ x), x, jnp.ones((5, 8, 8)))[0], (X,), 5 * SQUARE),
        (lambda x: lax.fori_loop(0, 3, lambda _, c: lax.map(square, c), x[None]), (X,), 3 * SQUARE),
        (lambda x: lax.map(jax.vmap(square), jnp.stack([x] * 6).reshape(2, 3, 8, 8)), (X,), 6 * SQUARE),
        (lambda x: lax.cond(x.sum() > 0, square, lambda x: x @ x, x), (X,), SQUARE),
        (lambda x: lax.cond(x.sum() > 0, lambda x: x, jax.jit(square), x), (X,), SQUARE),
        (lambda x: lax.switch(1, [lambda x: x, square, lambda x: x @ x], x @ x), (X,), SQUARE // 2 * 3),
        (lambda x: lax.while_loop(lambda c: (c @ c).sum() < 9, square, x), (X,), SQUARE // 2 * 3),
        # x @ w forward; of the gradient the same again for each argument that has one.
        (jax.grad(lambda a, b: (a @ b).sum(), argnums=1), (A, B), 2 * DOT),
        (jax.grad(lambda a, b: (a @ b).sum(), argnums=(0, 1)), (A, B), 3 * DOT),
        (jax.grad(lambda x: jnp.sin(x @ x).sum()), (X,), 3 * SQUARE // 2),
        (jax.grad(jax.remat(lambda x: jnp.sin(x @ x).sum())), (X,), 4 * SQUARE // 2),  # forward twice
        (
            jax.grad(lambda x: lax.scan(lambda c, _: (jnp.sin(c @ x), None), x, length=3)[0].sum()),
            (X,),
            3 * 3 * SQUARE // 2,
        ),
    ],
)  # fmt: skip
def test_hand_counts(fn, args, expected):
    assert cf.count_flops(fn, *args) == expected


@pytest.mark.parametrize(
    ("options", "kernel", "output", "expected"),
    [
        ({}, (3, 3, 4, 6), (2, 9, 9, 6), 2 * (2 * 81 * 6) * (9 * 4)),
        ({"padding": "VALID"}, (3, 2, 4, 6), (2, 7, 8, 6), 2 * (2 * 56 * 6) * (6 * 4)),
        ({"window_strides": (2, 3)}, (3, 3, 4, 6), (2, 5, 3, 6), 2 * (2 * 15 * 6) * (9 * 4)),
        ({"rhs_dilation": (2, 2), "padding": "VALID"}, (3, 3, 4, 6), (2, 5, 5, 6), 2 * (2 * 25 * 6) * 36),
        (
            {"lhs_dilation": (2, 2), "padding": [(0, 0)] * 2},
            (3, 3, 4, 6),
            (2, 15, 15, 6),
            2 * (2 * 225 * 6) * 36,
        ),
        ({"feature_group_count": 2}, (3, 3, 2, 6), (2, 9, 9, 6), 2 * (2 * 81 * 6) * (9 * 2)),
        ({"feature_group_count": 4}, (3, 3, 1, 8), (2, 9, 9, 8), 2 * (2 * 81 * 8) * 9),
        ({"batch_group_count": 2}, (3, 3, 4, 6), (1, 9, 9, 6), 2 * (81 * 6) * (9 * 4)),
    ],
    ids=["same", "valid", "strided", "dilated", "transposed", "grouped", "depthwise", "batch_grouped"],
)
def test_hand_counts_of_convolutions(options, kernel, output, expected):
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    fn = functools.partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)
    w = jax.ShapeDtypeStruct(kernel, jnp.float32)
    assert jax.eval_shape(fn, IMAGE, w).shape == output
    assert cf.count_flops(fn, IMAGE, w) == expected
    # By another way: every output element is a dot product of this many numbers.
    assert expected == 2 * math.prod(output) * math.prod(kernel[:-1])


def test_a_gradient_of_a_convolution_is_as_dear_as_the_convolution():
    def loss(x, w):
        return lax.conv_general_dilated(
            x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ).sum()

    w = jax.ShapeDtypeStruct((3, 3, 4, 6), jnp.float32)
    forward = cf.count_flops(loss, IMAGE, w)
    assert forward == 2 * (2 * 49 * 6) * 36
    # By the kernel: the same products, summed over positions instead of over inputs.
    assert cf.count_flops(jax.grad(loss, argnums=1), IMAGE, w) == 2 * forward


def test_nothing_is_computed():
    huge = jax.ShapeDtypeStruct((10**6, 10**6), jnp.float32)
    assert cf.count_flops(lambda x: x @ x, huge) == 2 * 10**18


# The products of attention and of refused layers are not those of kernels.
OTHER_PRODUCTS = {"attention": 2 * 2 * (2 * 5 * 5 * 8), "tokens": 2 * 2 * (2 * 5 * 5 * 8)}
OTHER_PRODUCTS["tokens_embedded"] = OTHER_PRODUCTS["tokens"]


@pytest.mark.parametrize("name", [name for name in CASES if name != "refused"])
def test_kernels_say_what_a_model_and_its_factorized_form_cost(name):
    model, inputs, variables, kernels = prepared(name)
    kwargs = CASES[name].kwargs
    plan = plan_at(kernels, 0.5)
    params = jax.eval_shape(lambda: cf.factorize_params(variables["params"], plan))

    def flops(model, params):
        return cf.count_flops(lambda v: model.apply(v, *inputs, **kwargs), {**variables, "params": params})

    other, batch = OTHER_PRODUCTS.get(name, 0), len(inputs[0])
    assert flops(model, variables["params"]) == other + batch * sum(k.flops() for k in kernels.values())
    expected = other + batch * sum(kernel.flops(plan.ranks[path]) for path, kernel in kernels.items())
    assert flops(cf.factorize(model, plan), params) == expected
