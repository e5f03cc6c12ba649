"""Prints the table of docs/layers.md: what find_kernels says of a layer of each kind, in both front ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx

import cuttlefish_jax as cf
from cuttlefish_jax.layer_types import LAYER_TYPES

VECTOR, TOKENS = jnp.ones((2, 8)), jnp.ones((2, 5, 8))
SEQUENCE, IMAGE, VOLUME = jnp.ones((2, 6, 8)), jnp.ones((2, 6, 6, 8)), jnp.ones((2, 4, 4, 4, 8))
IDS = jnp.ones((2, 5), int)
RNGS = nnx.Rngs(0)
MASK = jnp.ones((3, 3, 8, 4))


class Wide(nn.Dense):
    """A subclass, which may do anything."""


class WideLinear(nnx.Linear):
    """The same in NNX."""


class Normed(nn.Module):
    """A layer inside a wrapper that computes its kernel."""

    wrapper: Any

    @nn.compact
    def __call__(self, x):
        """Runs it."""
        wrapped = self.wrapper(nn.Dense(4))
        return wrapped(x, update_stats=False) if self.wrapper is nn.SpectralNorm else wrapped(x)


def recurrent(cell: type) -> Callable[[], nn.Module]:
    """A cell in its loop over the sequence."""
    return lambda: nn.RNN(cell(4))


# Kind of layer, Linen, NNX (None: there is no such layer), input, and whether embeddings are asked for.
ROWS: list[tuple[str, Callable[[], Any] | None, Callable[[], Any] | None, Any, bool]] = [
    ("dense", lambda: nn.Dense(4), lambda: nnx.Linear(8, 4, rngs=RNGS), VECTOR, False),
    (
        "dense over several axes",
        lambda: nn.DenseGeneral((2, 3), axis=(-2, -1)),
        lambda: nnx.LinearGeneral((5, 8), (2, 3), axis=(-2, -1), rngs=RNGS),
        TOKENS,
        False,
    ),
    (
        "dense with batch axes",
        lambda: nn.DenseGeneral(4, batch_dims=(0,)),
        lambda: nnx.LinearGeneral(8, 4, batch_axis={0: 2}, rngs=RNGS),
        TOKENS,
        False,
    ),
    (
        "attention",
        lambda: nn.MultiHeadDotProductAttention(num_heads=2),
        lambda: nnx.MultiHeadAttention(2, 8, decode=False, rngs=RNGS),
        TOKENS,
        False,
    ),
    (
        "Einsum, if it is a matrix product",
        lambda: nn.Einsum((8, 4), "btd,df->btf"),
        lambda: nnx.Einsum("btd,df->btf", (8, 4), rngs=RNGS),
        TOKENS,
        False,
    ),
    (
        "Einsum of another kind",
        lambda: nn.Einsum((8, 4), "btd,df->btdf"),
        lambda: nnx.Einsum("btd,df->btdf", (8, 4), rngs=RNGS),
        TOKENS,
        False,
    ),
    (
        "convolution, 1-D",
        lambda: nn.Conv(4, (3,)),
        lambda: nnx.Conv(8, 4, (3,), rngs=RNGS),
        SEQUENCE,
        False,
    ),
    (
        "convolution, 2-D, strided, padded",
        lambda: nn.Conv(4, (3, 3), strides=2, padding=((1, 1), (1, 1))),
        lambda: nnx.Conv(8, 4, (3, 3), strides=2, padding=((1, 1), (1, 1)), rngs=RNGS),
        IMAGE,
        False,
    ),
    (
        "convolution, 2-D, dilated",
        lambda: nn.Conv(4, (3, 3), kernel_dilation=2),
        lambda: nnx.Conv(8, 4, (3, 3), kernel_dilation=2, rngs=RNGS),
        IMAGE,
        False,
    ),
    (
        "convolution, 3-D",
        lambda: nn.Conv(4, (2, 2, 2)),
        lambda: nnx.Conv(8, 4, (2, 2, 2), rngs=RNGS),
        VOLUME,
        False,
    ),
    (
        "transposed convolution",
        lambda: nn.ConvTranspose(4, (3, 3), strides=(2, 2)),
        lambda: nnx.ConvTranspose(8, 4, (3, 3), strides=(2, 2), rngs=RNGS),
        IMAGE,
        False,
    ),
    (
        "grouped convolution",
        lambda: nn.Conv(4, (3, 3), feature_group_count=2),
        lambda: nnx.Conv(8, 4, (3, 3), feature_group_count=2, rngs=RNGS),
        IMAGE,
        False,
    ),
    (
        "depthwise convolution",
        lambda: nn.Conv(8, (3, 3), feature_group_count=8),
        lambda: nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=RNGS),
        IMAGE,
        False,
    ),
    (
        "convolution with a mask",
        lambda: nn.Conv(4, (3, 3), mask=MASK),
        lambda: nnx.Conv(8, 4, (3, 3), mask=MASK, rngs=RNGS),
        IMAGE,
        False,
    ),
    ("ConvLocal", lambda: nn.ConvLocal(4, (3, 3)), None, IMAGE, False),
    ("embedding", lambda: nn.Embed(16, 8), lambda: nnx.Embed(16, 8, rngs=RNGS), IDS, False),
    (
        "embedding, with `include_embeddings=True`",
        lambda: nn.Embed(16, 8),
        lambda: nnx.Embed(16, 8, rngs=RNGS),
        IDS,
        True,
    ),
    (
        "LSTMCell",
        recurrent(nn.LSTMCell),
        lambda: nnx.RNN(nnx.LSTMCell(8, 4, rngs=RNGS), rngs=RNGS),
        SEQUENCE,
        False,
    ),
    (
        "OptimizedLSTMCell",
        recurrent(nn.OptimizedLSTMCell),
        lambda: nnx.RNN(nnx.OptimizedLSTMCell(8, 4, rngs=RNGS), rngs=RNGS),
        SEQUENCE,
        False,
    ),
    (
        "GRUCell",
        recurrent(nn.GRUCell),
        lambda: nnx.RNN(nnx.GRUCell(8, 4, rngs=RNGS), rngs=RNGS),
        SEQUENCE,
        False,
    ),
    (
        "WeightNorm",
        lambda: Normed(nn.WeightNorm),
        lambda: nnx.WeightNorm(nnx.Linear(8, 4, rngs=RNGS), rngs=RNGS),
        VECTOR,
        False,
    ),
    (
        "SpectralNorm",
        lambda: Normed(nn.SpectralNorm),
        lambda: nnx.SpectralNorm(nnx.Linear(8, 4, rngs=RNGS), rngs=RNGS),
        VECTOR,
        False,
    ),
    (
        "a subclass of a layer",
        lambda: Wide(4),
        lambda: WideLinear(8, 4, rngs=RNGS),
        VECTOR,
        False,
    ),
]


def answer(build: Callable[[], Any] | None, x: Any, include_embeddings: bool) -> str:
    """What the front end says of a layer."""
    if build is None:
        return "—"
    kernels = cf.find_kernels(build(), x, include_embeddings=include_embeddings)
    if kernels and not kernels.skipped:
        return "yes"
    reasons = sorted({*kernels.skipped.values()})
    return "no: " + "; ".join(reasons) if not kernels else "in part: " + "; ".join(reasons)


def check_rows() -> None:
    """Raises an AssertionError if a layer type is registered that no row has."""
    shown = {type(build()) for _, *builds, _, _ in ROWS for build in builds if build is not None}
    # Those that are inside another module of their row.
    shown |= {nn.OptimizedLSTMCell, nn.WeightNorm, nn.SpectralNorm}
    missing = [f"{kind.__module__}.{kind.__name__}" for kind in LAYER_TYPES.keys() - shown if _is_stock(kind)]
    assert not missing, f"docs/support_table.py has no row of {', '.join(sorted(missing))}"


def _is_stock(kind: type) -> bool:
    return kind.__module__.startswith("flax.")


def main() -> None:
    """Prints the table in Markdown."""
    check_rows()
    print("| layer | Linen | NNX |\n| --- | --- | --- |")
    for name, linen, nnx_, x, embeddings in ROWS:
        print(f"| {name} | {answer(linen, x, embeddings)} | {answer(nnx_, x, embeddings)} |")


if __name__ == "__main__":
    main()
