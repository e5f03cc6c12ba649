"""Small Linen models in every form that the front end supports, for test_linen.py and test_kernels.py."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import cuttlefish_jax as cf

STACK_RNGS = {"params": True, "dropout": True}


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

    def inputs(self) -> tuple[Any, ...]:
        rng = np.random.default_rng(1)
        integers = jnp.issubdtype(self.input_dtype, jnp.integer)
        values = rng.integers(0, 7, self.shape) if integers else rng.standard_normal(self.shape)
        return (jnp.asarray(values, self.input_dtype), *self.args)


class Setup(nn.Module):
    """Layers made in setup, one of them shared."""

    dtype: Any = None

    def setup(self):
        self.encode_layer = nn.Dense(6, dtype=self.dtype)
        self.shared = nn.Dense(6, use_bias=False, dtype=self.dtype)
        self.out = nn.Dense(3, dtype=self.dtype)

    def encode(self, x):
        return self.shared(nn.tanh(self.encode_layer(x)))

    def __call__(self, x):
        return self.out(self.shared(nn.tanh(self.encode(x))))


class Block(nn.Module):
    """A residual block of two layers, for the transformations that stack it."""

    width: int = 6
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = nn.relu(nn.Dense(8, dtype=self.dtype, name="up")(y))
        return x + nn.Dense(self.width, dtype=self.dtype, name="down")(y)


class Step(nn.Module):
    """A block with the signature that nn.scan wants."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x, _):
        return Block(dtype=self.dtype)(x), None


class Stacked(nn.Module):
    """A stem, three scanned blocks, a head."""

    dtype: Any = None
    axis: int = 0
    wrap: Callable[[Any], Any] = lambda step: step
    broadcast: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, dtype=self.dtype, name="stem")(x)
        axes = {} if self.broadcast else {"params": self.axis, "batch_stats": self.axis}
        scanned = nn.scan(
            self.wrap(Step),
            variable_axes=axes,
            variable_broadcast="params" if self.broadcast else False,
            split_rngs={"params": not self.broadcast},
            length=3,
        )
        x, _ = scanned(dtype=self.dtype, name="blocks")(x, None)
        return nn.Dense(2, dtype=self.dtype, name="head")(x)


class StackedLast(Stacked):
    """As Stacked, with the stack axis of the params at the end."""

    axis: int = -1


class Ensemble(nn.Module):
    """Two copies of a network, by vmap; `member` makes a module."""

    dtype: Any = None
    member: Callable[..., nn.Module] = Block
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        copies = nn.vmap(
            self.member, variable_axes={"params": self.axis}, split_rngs=STACK_RNGS, in_axes=None, axis_size=2
        )
        return copies(dtype=self.dtype, name="members")(x)


class OverBatch(nn.Module):
    """One set of params, mapped over the batch by nn.vmap."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        mapped = nn.vmap(Block, variable_axes={"params": None}, split_rngs={"params": False})
        return mapped(dtype=self.dtype, name="mapped")(x)


class Wrapped(nn.Module):
    """A block under a transformation that adds no axes, nested three deep."""

    transform: Callable[[Any], Any]
    dtype: Any = None
    depth: int = 0

    @nn.compact
    def __call__(self, x):
        if self.depth:
            inner = Wrapped(self.transform, self.dtype, self.depth - 1, name="inner")
            return inner(x) + nn.Dense(6, dtype=self.dtype, name="side")(x)
        return self.transform(Block)(dtype=self.dtype, name="block")(x)


JitBlock = nn.jit(Block)


class Repeated(nn.Module):
    """Equal blocks, which nn.jit takes for one."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        return JitBlock(dtype=self.dtype, name="second")(JitBlock(dtype=self.dtype, name="first")(x))


class Recurrent(nn.Module):
    """A cell made of ordinary layers, scanned over time."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        carry = jnp.zeros((len(x), 4), self.dtype or x.dtype)
        return nn.RNN(nn.SimpleCell(4, dtype=self.dtype), name="rnn")(x, initial_carry=carry)


class Tokens(nn.Module):
    """Embedded integer tokens, attention, a classifier; a free positional parameter."""

    dtype: Any = None

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(7, 8, dtype=self.dtype, name="embed")(tokens)
        x = x + self.param("positions", nn.initializers.normal(0.02), (5, 8)).astype(x.dtype)
        x = nn.MultiHeadDotProductAttention(num_heads=2, dtype=self.dtype, name="attention")(x, x)
        return nn.Dense(3, dtype=self.dtype, name="head")(x.mean(axis=-2))


class Trained(nn.Module):
    """A network with batch norm and dropout, and a flag that tells whether it trains."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3), dtype=self.dtype, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, dtype=self.dtype, name="norm")(x))
        x = nn.Conv(6, (3, 3), strides=2, use_bias=False, dtype=self.dtype, name="conv_1")(x)
        x = nn.Dropout(0.5, deterministic=not train)(x.mean(axis=(-3, -2)))
        return nn.Dense(5, dtype=self.dtype, name="head")(x)


class StandardizedConv(nn.Conv):
    """A convolution that standardises its weights."""

    def param(self, name, init_fn, *args, **kwargs):
        value = super().param(name, init_fn, *args, **kwargs)
        if name == "kernel":
            value = (value - value.mean((0, 1, 2))) / (value.std((0, 1, 2)) + 1e-5)
        return value


class Refused(nn.Module):
    """One of everything that cannot be factorized, and one layer that can."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3,), feature_group_count=2, dtype=self.dtype, name="grouped")(x)
        x = nn.Conv(4, (3,), feature_group_count=4, dtype=self.dtype, name="depthwise")(x)
        x = nn.Conv(4, (3,), mask=jnp.ones((3, 4, 4)), dtype=self.dtype, name="masked")(x)
        x = nn.ConvTranspose(4, (3,), dtype=self.dtype, name="transposed")(x)
        x = nn.ConvLocal(4, (3,), dtype=self.dtype, name="local")(x)
        x = nn.Einsum((4, 4), "bsd,de->bse", dtype=self.dtype, name="einsum")(x)
        x = nn.WeightNorm(nn.Dense(4, dtype=self.dtype, name="normed"))(x)
        x = nn.SpectralNorm(nn.Dense(4, dtype=self.dtype, name="spectral"), collection_name="sn")(
            x, update_stats=False
        )
        x = nn.RNN(nn.OptimizedLSTMCell(4, dtype=self.dtype), name="lstm")(x)
        x = nn.DenseGeneral(4, batch_dims=(0,), dtype=self.dtype, name="batched")(x)
        y = StandardizedConv(4, (3, 3), dtype=self.dtype, name="standardized")(x[..., None])
        return nn.Dense(3, dtype=self.dtype, name="head")(x) + y.mean()


def conv(*args: Any, **kwargs: Any) -> Callable[..., nn.Module]:
    return functools.partial(nn.Conv, *args, **kwargs)


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
    "tokens": Case(
        Tokens,
        (2, 5),
        {f"attention/{name}": 5 for name in ("query", "key", "value", "out")} | {"head": 1},
        {"embed": "Embed is not a type", "positions": "a parameter of Tokens"},
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
        {"head": 6},
        {
            "grouped": "grouped convolution (2 groups)",
            "depthwise": "grouped convolution (4 groups)",
            "masked": "convolution with a mask",
            "transposed": "ConvTranspose is not a type",
            "local": "ConvLocal is not a type",
            "einsum": "Einsum is not a type",
            "normed": "computed by WeightNorm",
            "spectral": "computed by SpectralNorm",
            "batched": "batch_dims",
            "standardized": "StandardizedConv is not a type",
        }
        | {f"OptimizedLSTMCell_0/{a}{b}": "DenseParams is not a type" for a in "ih" for b in "ifgo"},
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
    return model, inputs, variables, cf.find_kernels(model, *inputs, **case.kwargs)


def plan_at(kernels: cf.Kernels, ratio: float = 1.0, **options: Any) -> cf.FactorizationPlan:
    """A plan that factorizes every kernel, at a share of its full rank."""
    ranks = {path: max(1, int(kernel.max_rank * ratio)) for path, kernel in kernels.items()}
    return cf.FactorizationPlan.from_ranks(kernels, ranks, **options)


def once(fn: Callable[..., Any], *args: Any) -> Any:
    """A call of a jitted function that runs once: most of its time would go into XLA's optimisations."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})(*args)
