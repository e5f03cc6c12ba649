"""Small Linen modules for the cases of linen_zoo.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

STACK_RNGS = {"params": True, "dropout": True}


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
    cell: Callable[..., nn.Module] = nn.SimpleCell

    @nn.compact
    def __call__(self, x):
        cell = self.cell(4, dtype=self.dtype)
        carry = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, self.dtype or x.dtype),
            jax.eval_shape(lambda: cell.initialize_carry(jax.random.key(0), x[:, 0].shape)),
        )
        return nn.RNN(cell, name="rnn")(x, initial_carry=carry)


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
        x = nn.ConvTranspose(4, (3,), mask=jnp.ones((3, 4, 4)), dtype=self.dtype, name="transposed")(x)
        x = nn.ConvLocal(4, (3,), dtype=self.dtype, name="local")(x)
        x = nn.Einsum((4, 4), "bsd,ds->bsd", use_bias=False, dtype=self.dtype, name="einsum")(x[:, :4])
        x = nn.Einsum((4, 4), dtype=self.dtype, name="equation")(x, "bsd,de->bse")
        x = nn.WeightNorm(nn.Dense(4, dtype=self.dtype, name="normed"))(x)
        x = nn.SpectralNorm(nn.Dense(4, dtype=self.dtype, name="spectral"), collection_name="sn")(
            x, update_stats=False
        )
        x = nn.RNN(nn.OptimizedLSTMCell(4, dtype=self.dtype), name="lstm")(x)
        y = StandardizedConv(4, (3, 3), dtype=self.dtype, name="standardized")(x[..., None])
        return nn.Dense(3, dtype=self.dtype, name="head")(x) + y.mean()


class Experts(nn.Module):
    """Layers with batch axes: several matrices, each for its part of the input."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x):  # [batch, 2, 3, 4, 5]
        x = jnp.moveaxis(x, 0, 2)
        general = nn.DenseGeneral((3, 4), axis=(-1, -2), batch_dims=(0, 1), dtype=self.dtype, name="general")
        x = jnp.moveaxis(general(x), 2, 0)  # [batch, 2, 3, 3, 4]
        return nn.Einsum((4, 2, 6, 3), "bghod,dgeh->bhgoe", dtype=self.dtype, name="einsum")(x)


class Tied(nn.Module):
    """Embedded tokens; the head multiplies by the table."""

    dtype: Any = None

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(7, 6, dtype=self.dtype, name="table")
        return table.attend(Block(dtype=self.dtype, name="block")(table(tokens)))


class Weighted(nn.Module):
    """A layer of somebody's own: another name of the parameter, another order of its axes."""

    features: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        weight = self.param("weight", nn.initializers.lecun_normal(-1, -2), (self.features, x.shape[-1]))
        x, weight = nn.dtypes.promote_dtype(x, weight, dtype=self.dtype)
        return x @ weight.T


class Projection(nn.Module):
    """A layer of somebody's own that makes its parameters in setup."""

    in_features: int
    features: int
    scaled: bool = True
    dtype: Any = None

    def setup(self):
        shape = (self.in_features, self.features)
        self.kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        self.scale = self.param("scale", nn.initializers.ones, (1, self.features)) if self.scaled else 1.0

    def __call__(self, x):
        x, kernel, scale = nn.dtypes.promote_dtype(x, self.kernel, self.scale, dtype=self.dtype)
        return x @ kernel * scale


class Branch(nn.Module):
    """A small layer in one branch of a cond, a large one in the other."""

    @nn.compact
    def __call__(self, x):
        def small(module, x):
            return nn.Dense(6, name="small")(x)

        def large(module, x):
            return nn.Dense(6, name="large_2")(nn.Dense(50, name="large_1")(x))

        if self.is_initializing():
            small(self, x), large(self, x)
        return nn.cond(x.sum() > 0, small, large, self, x)
