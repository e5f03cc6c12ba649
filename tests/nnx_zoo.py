"""Small NNX models in every form that the front end supports, for test_nnx.py and test_nnx_switch.py."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import cuttlefish_jax as cf


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, what to call it with, and the kernels (path -> positions) and refused layers to expect."""

    model: Callable[..., nnx.Module]  # of the compute dtype and rngs
    shape: tuple[int, ...]
    positions: dict[str, int]
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    input_dtype: Any = jnp.float32
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of find_kernels

    def inputs(self) -> Any:
        rng = np.random.default_rng(1)
        integers = jnp.issubdtype(self.input_dtype, jnp.integer)
        values = rng.integers(0, 7, self.shape) if integers else rng.standard_normal(self.shape)
        return jnp.asarray(values, self.input_dtype)


class Block(nnx.Module):
    """A residual block of two layers, for the transformations that stack it."""

    def __init__(self, width: int = 6, *, dtype: Any = None, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(width, 8, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(8, width, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(self.norm(x))))


class Shared(nnx.Module):
    """A layer that is called twice, and stands in two places; a method that calls some of the layers."""

    def __init__(self, *, dtype: Any = None, rngs: nnx.Rngs):
        self.encode_layer = nnx.Linear(5, 6, dtype=dtype, rngs=rngs)
        self.shared = nnx.Linear(6, 6, use_bias=False, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([self.shared, nnx.Linear(6, 3, dtype=dtype, rngs=rngs)])

    def encode(self, x):
        return self.shared(nnx.tanh(self.encode_layer(x)))

    def __call__(self, x):
        x = nnx.tanh(self.encode(x))
        for layer in self.layers:
            x = layer(x)
        return x


class Stacked(nnx.Module):
    """A stem, three blocks made by vmap and run by scan, a head."""

    def __init__(self, *, axis: int = 0, remat: bool = False, dtype: Any = None, rngs: nnx.Rngs):
        self.axes, self.remat = nnx.StateAxes({nnx.Param: axis, ...: 0}), remat
        make = nnx.vmap(lambda rngs: Block(dtype=dtype, rngs=rngs), out_axes=self.axes)
        self.stem = nnx.Linear(5, 6, dtype=dtype, rngs=rngs)
        self.blocks = make(rngs.split(3))
        self.head = nnx.Linear(6, 2, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        def step(x, block):
            call = nnx.remat(lambda block, x: block(x)) if self.remat else (lambda block, x: block(x))
            return call(block, x)

        x = nnx.scan(step, in_axes=(nnx.Carry, self.axes), out_axes=nnx.Carry)(self.stem(x), self.blocks)
        return self.head(x)


class Ensemble(nnx.Module):
    """Two copies of a network, by vmap, and the mean of what they say."""

    def __init__(self, member: Callable[..., nnx.Module] = Block, *, dtype: Any = None, rngs: nnx.Rngs):
        self.members = nnx.vmap(lambda rngs: member(dtype=dtype, rngs=rngs))(rngs.split(2))

    def __call__(self, x):
        return nnx.vmap(lambda member, x: member(x), in_axes=(0, None))(self.members, x).mean(axis=0)


class OverBatch(nnx.Module):
    """One set of params, mapped over the batch."""

    def __init__(self, *, dtype: Any = None, rngs: nnx.Rngs):
        self.mapped = Block(dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return nnx.vmap(lambda block, x: block(x), in_axes=(None, 0))(self.mapped, x)


class Nested(nnx.Module):
    """Blocks under a transformation, nested three deep."""

    def __init__(self, transform: Callable[..., Any], depth: int = 2, *, dtype: Any = None, rngs: nnx.Rngs):
        self.transform = transform
        self.inner = (
            Nested(transform, depth - 1, dtype=dtype, rngs=rngs) if depth else Block(dtype=dtype, rngs=rngs)
        )
        self.side = nnx.Linear(6, 6, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.transform(lambda inner, x: inner(x))(self.inner, x) + self.side(x)


class Recurrent(nnx.Module):
    """A cell made of ordinary layers, scanned over time."""

    def __init__(self, *, dtype: Any = None, rngs: nnx.Rngs):
        self.rnn = nnx.RNN(nnx.SimpleCell(3, 4, dtype=dtype, rngs=rngs))

    def __call__(self, x):
        return self.rnn(x, initial_carry=jnp.zeros((len(x), 4), self.rnn.cell.dtype or x.dtype))


class Tokens(nnx.Module):
    """Embedded integer tokens, attention, the embedding as the head; a free positional parameter."""

    def __init__(self, *, dtype: Any = None, rngs: nnx.Rngs):
        self.embed = nnx.Embed(7, 8, dtype=dtype, rngs=rngs)
        self.positions = nnx.Param(jnp.zeros((5, 8)))
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, dtype=dtype, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        return self.embed.attend(self.attention(x + self.positions[...].astype(x.dtype)))


class Trained(nnx.Module):
    """A network with batch norm and dropout."""

    def __init__(self, *, dtype: Any = None, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(4, dtype=dtype, rngs=rngs)
        self.conv_1 = nnx.Conv(4, 6, (3, 3), strides=2, use_bias=False, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(6, 5, dtype=dtype, rngs=rngs)
        self.eval()

    def __call__(self, x):
        x = self.conv_1(nnx.relu(self.norm(self.conv(x))))
        return self.head(self.dropout(x.mean(axis=(-3, -2))))


class StandardizedConv(nnx.Conv):
    """A convolution that standardises its weights."""

    def __call__(self, x):
        kernel = self.kernel[...]
        self.kernel[...] = (kernel - kernel.mean((0, 1, 2))) / (kernel.std((0, 1, 2)) + 1e-5)
        return super().__call__(x)


class Frozen(nnx.Variable):
    """Not a param."""


class Refused(nnx.Module):
    """One of everything that cannot be factorized, and one layer that can."""

    def __init__(self, *, dtype: Any = None, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, 4, 4, dtype=dtype, rngs=rngs)
        conv = functools.partial(nnx.Conv, 4, 4, (3,), dtype=dtype, rngs=rngs)
        self.grouped = conv(feature_group_count=2)
        self.einsum = nnx.Einsum("bsd,de->bsd", (4, 4), dtype=dtype, rngs=rngs)
        self.normed = nnx.WeightNorm(linear(), use_scale=False, rngs=rngs)
        self.lora = nnx.LoRALinear(4, 4, lora_rank=2, dtype=dtype, rngs=rngs)
        self.tied, self.tied_too = linear(), linear()
        self.tied_too.kernel = self.tied.kernel
        self.frozen = linear()
        self.frozen.kernel = Frozen(self.frozen.kernel[...])
        self.read, self.unused = linear(), linear()
        self.standardized = StandardizedConv(1, 4, (3, 3), dtype=dtype, rngs=rngs)
        self.adapted = nnx.LoRA(4, 2, 4, base_module=linear(), dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(4, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        x = self.grouped(x)
        x = self.lora(self.normed(self.einsum(x))) + self.tied_too(self.frozen(self.tied(x)))
        y = x + self.read(x) * self.read.kernel[...].sum().astype(x.dtype)
        return self.head(self.adapted(y)) + self.standardized(y[..., None]).mean()


def tower(*, dtype: Any = None, rngs: nnx.Rngs) -> nnx.Module:
    return nnx.Sequential(
        nnx.Linear(5, 8, dtype=dtype, rngs=rngs), nnx.relu, nnx.Linear(8, 6, dtype=dtype, rngs=rngs)
    )


def layer(kind: Callable[..., nnx.Module], *args: Any, **kwargs: Any) -> Callable[..., nnx.Module]:
    return functools.partial(kind, *args, **kwargs)


STACK = {"stem": 4, "blocks/up": 4, "blocks/down": 4, "head": 4}
NESTED = {"inner/inner/inner/up": 4, "inner/inner/inner/down": 4}
NESTED |= {"inner/inner/side": 4, "inner/side": 4, "side": 4}
IMAGE, VOLUME, SEQUENCE = (2, 6, 6, 3), (2, 4, 4, 4, 2), (2, 7, 3)

CASES: dict[str, Case] = {
    "linear": Case(layer(nnx.Linear, 8, 6), (2, 4, 8), {"": 4}),
    "conv_1d": Case(layer(nnx.Conv, 3, 4, 3, padding="CAUSAL", kernel_dilation=2), SEQUENCE, {"": 7}),
    "conv_2d": Case(layer(nnx.Conv, 3, 5, (3, 3), padding="CIRCULAR", strides=(1, 2)), IMAGE, {"": 18}),
    "conv_2d_dilated": Case(
        layer(nnx.Conv, 3, 5, (3, 2), input_dilation=2, padding=1, use_bias=False), IMAGE, {"": 132}
    ),
    "conv_3d": Case(layer(nnx.Conv, 2, 3, (2, 3, 2), strides=(1, 2, 1)), VOLUME, {"": 32}),
    "transpose": Case(layer(nnx.ConvTranspose, 3, 4, (3, 3), strides=(2, 1)), IMAGE, {"": 72}),
    "transpose_flipped": Case(
        layer(nnx.ConvTranspose, 3, 4, 4, strides=2, transpose_kernel=True), SEQUENCE, {"": 14}
    ),
    "general": Case(layer(nnx.LinearGeneral, (3, 4), (2, 2), axis=(1, 3)), (2, 3, 5, 4), {"": 5}),
    "general_batch": Case(
        layer(nnx.LinearGeneral, (3, 2), (2, 2), axis=(-2, -1), batch_axis={0: 2}), (2, 5, 3, 2), {"": 2}
    ),
    "einsum": Case(layer(nnx.Einsum, "bsd,hdk->bhsk", (2, 8, 3), (2, 1, 3)), (2, 5, 8), {"": 5}),
    "einsum_batch": Case(layer(nnx.Einsum, "...gd,gde->...ge", (3, 4, 4)), (2, 5, 3, 4), {"": 5}),
    "attention": Case(
        layer(nnx.MultiHeadAttention, 2, 8, decode=False),
        (2, 5, 8),
        {"query": 5, "key": 5, "value": 5, "out": 5},
    ),
    "sequential": Case(tower, (2, 4, 5), {"layers/0": 4, "layers/2": 4}),
    "shared": Case(Shared, (2, 5), {"encode_layer": 1, "layers/0": 2, "layers/1": 1}),
    "nested_remat": Case(layer(Nested, nnx.remat), (2, 4, 6), NESTED),
    "nested_jit": Case(layer(Nested, nnx.jit), (2, 4, 6), NESTED),
    "scan": Case(Stacked, (2, 4, 5), STACK),
    "scan_remat_last": Case(layer(Stacked, axis=-1, remat=True), (2, 4, 5), STACK),
    "vmap": Case(Ensemble, (2, 4, 6), {"members/up": 4, "members/down": 4}),
    "vmap_scan": Case(
        layer(Ensemble, Stacked), (2, 4, 5), {f"members/{path}": n for path, n in STACK.items()}
    ),
    "over_batch": Case(OverBatch, (2, 4, 6), {"mapped/up": 4, "mapped/down": 4}),
    "rnn": Case(Recurrent, (2, 5, 3), {"rnn/cell/dense_i": 5, "rnn/cell/dense_h": 5}),
    "tokens": Case(
        Tokens,
        (2, 5),
        {f"attention/{name}": 5 for name in ("query", "key", "value", "out")},
        {"embed": "include_embeddings=True", "positions": "a parameter of Tokens"},
        input_dtype=jnp.int32,
    ),
    "embedding": Case(
        Tokens,
        (2, 5),
        {"embed": 5} | {f"attention/{name}": 5 for name in ("query", "key", "value", "out")},
        {"positions": "a parameter of Tokens"},
        input_dtype=jnp.int32,
        options=dict(include_embeddings=True),
    ),
    "trained": Case(Trained, IMAGE, {"conv": 36, "conv_1": 9, "head": 1}),
    "refused": Case(
        Refused,
        (2, 6, 4),
        {"adapted/base_module": 6, "head": 6},
        {
            "grouped": "grouped convolution (2 groups)",
            "einsum": "sums 'e' over the kernel alone",
            "normed/layer_instance": "computed by WeightNorm",
            "lora": "LoRALinear is not a type",
            "lora/lora/lora_a": "a parameter of LoRA",
            "lora/lora/lora_b": "a parameter of LoRA",
            "tied": "also that of 'tied_too'",
            "read": "its kernel is read outside of its calls",
            "unused": "Linear that is not called",
            "standardized": "StandardizedConv is not a type",
            "adapted/lora_a": "a parameter of LoRA",
            "adapted/lora_b": "a parameter of LoRA",
        },
    ),
}


def made(make: Callable[[nnx.Rngs], nnx.Module]) -> nnx.Module:
    """What ``make`` makes, with random params of NumPy's: initializers would have to be compiled."""
    rng = np.random.default_rng(0)

    def fill(leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(jnp.zeros((*leaf.shape, 2), jnp.uint32))
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        fan = max(1, leaf.size // max(leaf.shape[-1:], default=1))
        return jnp.asarray(rng.standard_normal(leaf.shape) / np.sqrt(fan) + (leaf.ndim < 2), leaf.dtype)

    graphdef, params, stats, rest = nnx.split(
        nnx.eval_shape(lambda: make(nnx.Rngs(0, dropout=1))), nnx.Param, nnx.BatchStat, ...
    )
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), stats)
    return nnx.merge(graphdef, jax.tree.map(fill, params), ones, jax.tree.map(fill, rest))


@functools.cache
def prepared(name: str, dtype: Any = None) -> tuple[nnx.Module, Any, cf.Kernels]:
    """A case's model, its input and kernels."""
    case = CASES[name]
    model = made(lambda rngs: case.model(dtype=dtype, rngs=rngs))
    return model, case.inputs(), cf.find_kernels(model, case.inputs(), **case.options)


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


def shapes(state):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), nnx.to_pure_dict(state))


def params_of(model):
    return nnx.state(model, nnx.Param)


def layer_at(model, path):
    for key in path.split("/") if path else ():
        model = model[int(key)] if key.isdigit() else getattr(model, key)
    return model
