"""Small Linen models in every form that the front end supports, for test_linen.py and others."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linen_modules import (
    Ensemble,
    Experts,
    JitBlock,
    OverBatch,
    Projection,
    Recurrent,
    Refused,
    Repeated,
    Setup,
    Stacked,
    StackedLast,
    Tied,
    Tokens,
    Trained,
    Weighted,
    Wrapped,
)

import cuttlefish_jax as cf
from cuttlefish_jax.kernels import subtree

KEY = jax.random.key(0)

cf.register_layer(
    Weighted,
    cf.LayerType(
        axes=lambda layer: cf.KernelAxes(reduction=(1,), output=(0,)),
        first=lambda layer, rank: {"features": rank},
        second=lambda layer, rank: {"features": layer.features, "use_bias": False, "dtype": layer.dtype},
        second_type=nn.Dense,
        param="weight",
        initializer=None,
    ),
)
cf.register_layer(
    Projection,
    cf.LayerType(
        axes=lambda layer: cf.KernelAxes(reduction=(0,), output=(1,)),
        first=lambda layer, rank: {"features": rank, "scaled": False},
        second=lambda layer, rank: {"in_features": rank},
        initializer=None,
    ),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, what to call it with, and the kernels (path -> positions) and refused layers to expect."""

    model: Callable[..., nn.Module]  # of the compute dtype
    shape: tuple[int, ...]
    positions: dict[str, int]
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    input_dtype: Any = jnp.float32
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    collections: tuple[str, ...] = ("params",)
    lookups: dict[str, int] = dataclasses.field(default_factory=dict)  # of embeddings, which are included

    def inputs(self) -> tuple[Any, ...]:
        rng = np.random.default_rng(1)
        integers = jnp.issubdtype(self.input_dtype, jnp.integer)
        values = rng.integers(0, 7, self.shape) if integers else rng.standard_normal(self.shape)
        return (jnp.asarray(values, self.input_dtype), *self.args)

    def find(self, model: nn.Module, *inputs: Any) -> cf.Kernels:
        return cf.find_kernels(model, *inputs, include_embeddings=bool(self.lookups), **self.kwargs)


def conv(*args: Any, **kwargs: Any) -> Callable[..., nn.Module]:
    return functools.partial(nn.Conv, *args, **kwargs)


def transposed(*args: Any, **kwargs: Any) -> Callable[..., nn.Module]:
    return functools.partial(nn.ConvTranspose, *args, **kwargs)


def wrapped(transform: Callable[[Any], Any], depth: int = 0) -> Callable[..., nn.Module]:
    return functools.partial(Wrapped, transform, depth=depth)


def mlp(dtype: Any = None) -> nn.Module:
    return nn.Sequential([nn.Dense(8, dtype=dtype), nn.relu, nn.Dense(6, dtype=dtype)])


STACK = {"stem": 4, "blocks/Block_0/up": 4, "blocks/Block_0/down": 4, "head": 4}
IMAGE, VOLUME, SEQUENCE = (2, 6, 6, 3), (2, 4, 4, 4, 2), (2, 7, 3)

CASES: dict[str, Case] = {
    "dense": Case(functools.partial(nn.Dense, 6), (2, 4, 8), {"": 4}),
    "dense_no_bias": Case(functools.partial(nn.Dense, 9, use_bias=False), (2, 8), {"": 1}),
    "conv_1d": Case(conv(4, (3,), strides=2), SEQUENCE, {"": 4}),
    "conv_1d_integer": Case(conv(4, 3), SEQUENCE, {"": 7}),
    "conv_1d_causal": Case(conv(4, (3,), padding="CAUSAL", kernel_dilation=2), SEQUENCE, {"": 7}),
    "conv_2d": Case(conv(5, (3, 3)), IMAGE, {"": 36}),
    "conv_2d_pointwise": Case(conv(5, (1, 1), strides=(2, 2)), IMAGE, {"": 9}),
    "conv_2d_valid": Case(conv(5, (3, 2), padding="VALID", use_bias=False), IMAGE, {"": 20}),
    "conv_2d_explicit": Case(conv(5, (3, 3), strides=2, padding=((1, 1), (1, 1))), IMAGE, {"": 9}),
    "conv_2d_circular": Case(conv(5, (3, 3), padding="CIRCULAR", strides=(1, 2)), IMAGE, {"": 18}),
    "conv_2d_dilated": Case(conv(5, (3, 3), kernel_dilation=(2, 1)), IMAGE, {"": 36}),
    "conv_2d_input_dilated": Case(
        conv(5, (3, 3), input_dilation=2, padding=((1, 1), (1, 1))), IMAGE, {"": 121}
    ),
    "conv_3d": Case(conv(3, (2, 3, 2), strides=(1, 2, 1)), VOLUME, {"": 32}),
    "general": Case(functools.partial(nn.DenseGeneral, (2, 3), axis=(-2, -1)), (2, 5, 2, 4), {"": 5}),
    "general_apart": Case(functools.partial(nn.DenseGeneral, 6, axis=(1, 3)), (2, 3, 5, 4), {"": 5}),
    "general_one": Case(functools.partial(nn.DenseGeneral, (2, 2), use_bias=False), (2, 5, 6), {"": 5}),
    "attention": Case(
        functools.partial(nn.MultiHeadDotProductAttention, num_heads=2),
        (2, 5, 8),
        {"query": 5, "key": 5, "value": 5, "out": 5},
    ),
    "sequential": Case(mlp, (2, 4, 5), {"layers_0": 4, "layers_2": 4}),
    "setup_shared": Case(Setup, (2, 5), {"encode_layer": 1, "shared": 2, "out": 1}),
    "method": Case(Setup, (2, 5), {"encode_layer": 1, "shared": 1}, kwargs={"method": "encode"}),
    "remat": Case(wrapped(nn.remat), (2, 4, 6), {"block/up": 4, "block/down": 4}),
    "jit": Case(wrapped(nn.jit), (2, 4, 6), {"block/up": 4, "block/down": 4}),
    "jit_itself": Case(JitBlock, (2, 4, 6), {"up": 4, "down": 4}),
    "jit_repeated": Case(
        Repeated,
        (2, 4, 6),
        {"first/up": 4, "first/down": 4, "second/up": 4, "second/down": 4},
    ),
    "rnn": Case(Recurrent, (2, 5, 3), {"SimpleCell_0/i": 5, "SimpleCell_0/h": 5}),
    "nested": Case(
        wrapped(nn.remat, depth=2),
        (2, 4, 6),
        {"inner/inner/block/up": 4, "inner/inner/block/down": 4, "inner/side": 4, "side": 4},
    ),
    "scan": Case(Stacked, (2, 4, 5), STACK),
    "scan_last": Case(functools.partial(Stacked, axis=-1), (2, 4, 5), STACK),
    "scan_remat": Case(functools.partial(Stacked, wrap=nn.remat), (2, 4, 5), STACK),
    "scan_jit": Case(functools.partial(Stacked, wrap=nn.jit), (2, 4, 5), STACK),
    "scan_shared": Case(
        functools.partial(Stacked, broadcast=True),
        (2, 4, 5),
        {path: 12 if "blocks" in path else 4 for path in STACK},
    ),
    "vmap": Case(Ensemble, (2, 4, 6), {"members/up": 4, "members/down": 4}),
    "vmap_last": Case(functools.partial(Ensemble, axis=-1), (2, 4, 6), {"members/up": 4, "members/down": 4}),
    "vmap_scan": Case(
        functools.partial(Ensemble, member=Stacked),
        (2, 4, 5),
        {f"members/{path}": 4 for path in STACK},
    ),
    "vmap_scan_axes": Case(
        functools.partial(Ensemble, member=StackedLast, axis=0),
        (2, 4, 5),
        {f"members/{path}": 4 for path in STACK},
    ),
    "over_batch": Case(OverBatch, (2, 4, 6), {"mapped/up": 4, "mapped/down": 4}),
    "lstm": Case(
        functools.partial(Recurrent, cell=nn.LSTMCell),
        (2, 5, 3),
        {f"LSTMCell_0/{layer}": 5 for layer in ("ii", "hi", "if", "hf", "ig", "hg", "io", "ho")},
    ),
    "gru": Case(
        functools.partial(Recurrent, cell=nn.GRUCell),
        (2, 5, 3),
        {f"GRUCell_0/{layer}": 5 for layer in ("ir", "hr", "iz", "hz", "in", "hn")},
    ),
    "transposed": Case(transposed(5, (3, 2), strides=(2, 1)), IMAGE, {"": 72}),
    "transposed_kernel": Case(
        transposed(4, (2, 3), strides=(2, 2), padding="VALID", kernel_dilation=(1, 2), transpose_kernel=True),
        IMAGE,
        {"": 180},
    ),
    "einsum": Case(functools.partial(nn.Einsum, (8, 2, 4), "bsd,dhk->bhsk"), (2, 5, 8), {"": 5}),
    "einsum_ellipsis": Case(
        functools.partial(nn.Einsum, (6, 8), "...d,ed->...e", use_bias=False), (2, 3, 5, 8), {"": 15}
    ),
    "experts": Case(Experts, (2, 2, 3, 4, 5), {"general": 1, "einsum": 3}),
    "experts_vmap_last": Case(
        functools.partial(Ensemble, member=Experts, axis=-1),
        (2, 2, 3, 4, 5),
        {"members/general": 1, "members/einsum": 3},
    ),
    "weighted": Case(functools.partial(Weighted, 6), (2, 4, 8), {"": 4}),
    "projection": Case(
        functools.partial(Projection, 8, 6), (2, 8), {"": 1}, {"scale": "a parameter of Projection"}
    ),
    "tied": Case(
        Tied,
        (2, 5),
        {"table": 5, "block/up": 5, "block/down": 5},
        input_dtype=jnp.int32,
        lookups={"table": 5},
    ),
    "tokens_embedded": Case(
        Tokens,
        (2, 5),
        {"embed": 0} | {f"attention/{name}": 5 for name in ("query", "key", "value", "out")} | {"head": 1},
        {"positions": "a parameter of Tokens"},
        input_dtype=jnp.int32,
        lookups={"embed": 5},
    ),
    "tokens": Case(
        Tokens,
        (2, 5),
        {f"attention/{name}": 5 for name in ("query", "key", "value", "out")} | {"head": 1},
        {
            "embed": "an embedding: find_kernels(..., include_embeddings=True) finds it",
            "positions": "a parameter of Tokens",
        },
        input_dtype=jnp.int32,
    ),
    "trained": Case(
        Trained,
        (2, 6, 6, 3),
        {"conv": 36, "conv_1": 9, "head": 1},
        args=(False,),
        collections=("params", "batch_stats"),
    ),
    "refused": Case(
        Refused,
        (2, 6, 4),
        {"head": 4},
        {
            "grouped": "grouped convolution (2 groups)",
            "depthwise": "grouped convolution (4 groups)",
            "masked": "convolution with a mask",
            "transposed": "convolution with a mask",
            "local": "ConvLocal has another kernel at every position",
            "einsum": "its equation 'bsd,ds->bsd' contracts no axis of the kernel",
            "equation": "its equation is an argument of the call",
            "normed": "computed by WeightNorm",
            "spectral": "computed by SpectralNorm",
            "standardized": "StandardizedConv may do more than Conv: cf.register_layer says what it does",
        }
        | {
            f"OptimizedLSTMCell_0/{a}{b}": "OptimizedLSTMCell multiplies by the kernels of all gates at once"
            for a in "ih"
            for b in "ifgo"
        },
        collections=("params", "sn"),
    ),
}


@functools.cache
def prepared(name: str, dtype: Any = None) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], cf.Kernels]:
    """A case's model, inputs, variables (random, made without compiling anything) and kernels."""
    case = CASES[name]
    model, inputs = case.model(dtype=dtype), case.inputs()
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, **case.kwargs))
    rng = np.random.default_rng(0)

    def fill(leaf: Any) -> Any:
        values = rng.standard_normal(leaf.shape) / np.sqrt(
            max(1, leaf.size // max(leaf.shape[-1:], default=1))
        )
        return jnp.asarray(values + (leaf.ndim < 2), leaf.dtype)

    variables = {
        key: jax.tree.map(fill if key == "params" else lambda leaf: jnp.ones(leaf.shape, leaf.dtype), tree)
        for key, tree in shapes.items()
    }
    return model, inputs, variables, case.find(model, *inputs)


def plan_at(kernels: cf.Kernels, ratio: float = 1.0, **options: Any) -> cf.FactorizationPlan:
    """A plan that factorizes every kernel, at a share of its full rank."""
    ranks = {path: max(1, int(kernel.max_rank * ratio)) for path, kernel in kernels.items()}
    return cf.FactorizationPlan.from_ranks(kernels, ranks, **options)


def once(fn: Callable[..., Any], *args: Any) -> Any:
    """A call of a jitted function that runs once: most of its time would go into XLA's optimisations."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})(*args)


def relative_error(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.max(np.abs(actual - expected)) / np.max(np.abs(expected))


def best_approximation(params, plan):
    """The original tree with every planned kernel replaced by its truncated SVD, in float64."""
    params = jax.tree.map(lambda leaf: leaf, params)
    for path, rank in plan.ranks.items():
        kernel, layer = plan.kernels[path], subtree(params, path)
        p, s, q = np.linalg.svd(
            np.asarray(kernel.to_matrix(layer[kernel.param]), np.float64), full_matrices=False
        )
        s[..., rank:] = 0
        layer[kernel.param] = kernel.from_matrix(((p * s[..., None, :]) @ q).astype(np.float32))
    return params


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def apply(model, variables, *args, **kwargs):
    return once(lambda variables: model.apply(variables, *args, **kwargs), variables)


def init(model, *args, **kwargs):
    return once(lambda key: model.init(key, *args, **kwargs), KEY)


def made_by_init(model, *args, **kwargs):
    return jax.eval_shape(lambda: model.init(KEY, *args, **kwargs))


def message_of(fn):
    with pytest.raises(ValueError) as error:
        fn()
    message = str(error.value)
    assert "\n" not in message
    return message
