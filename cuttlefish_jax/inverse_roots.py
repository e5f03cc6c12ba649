"""Inverse square roots of many small matrices by matrix products alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from cuttlefish_jax.matrices import matmul

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def inverse_roots(
    grams: Sequence[Float[Array, "*stack r r"]], *, damping: float
) -> list[Float[Array, "*stack r r"]]:
    r""":math:`(G + \delta \bar\lambda I)^{-1/2}` of every matrix; :math:`\bar\lambda` is its mean eigenvalue.

    By the iteration of Newton and Schulz, scaled so that each step gains as much as it can; how many it takes
    follows from the damping, below which no eigenvalue is. A Cholesky factorization is fewer operations, but
    also a call of its own for each matrix, one after the other: a train step has a hundred of them.

    Args:
      grams: symmetric, positive semidefinite, of any sizes, all of one dtype, f32 or f64.
      damping: :math:`\delta \ge 0`; as much as rounding needs if it is less. So zeros have a root, too.

    Returns:
      Symmetric matrices, in the order of ``grams``. Their relative errors are the dtype's precision times
      the condition of the damped matrix.

    References:
      Chen, Chow, *A Stable Scaling of Newton-Schulz for Improving the Sign Function Computation of a
      Hermitian Matrix*, Argonne National Laboratory, preprint P5059-0114, 2014. Higham, *Functions of
      Matrices*, SIAM 2008, section 6.3: the coupled iteration.
    """
    groups: dict[int, list[int]] = {}
    for index, gram in enumerate(grams):
        groups.setdefault(_padded_size(gram.shape[-1]), []).append(index)
    roots: dict[int, Float[Array, "*stack r r"]] = {}
    for size, members in groups.items():
        least = max(damping, 4 * size * float(jnp.finfo(grams[members[0]].dtype).eps))
        parts, scales = zip(*(_prepared(grams[i], size, least) for i in members), strict=True)
        # The largest eigenvalue is 1 at most: the trace is the size, and the norm below the trace.
        found = _newton_schulz(jnp.concatenate(parts), least / (size * (1 + least)))
        start = 0
        for index, part, scale in zip(members, parts, scales, strict=True):
            *stack, rank, _ = grams[index].shape
            own = found[start : start + len(part), :rank, :rank] / jnp.sqrt(scale)
            roots[index] = own.reshape(*stack, rank, rank)
            start += len(part)
    return [roots[index] for index in range(len(grams))]


def _padded_size(rank: int) -> int:
    """The next power of two, or one and a half of them: a few batches of products serve all ranks."""
    power = 2 ** math.ceil(math.log2(rank))
    return power * 3 // 4 if power >= 8 and rank <= power * 3 // 4 else power


def _prepared(
    gram: Float[Array, "*stack r r"], size: int, least: float
) -> tuple[Float[Array, "k p p"], Float[Array, "k 1 1"]]:
    """The damped matrices, divided so that no eigenvalue is above 1, filled up with ones; and by what."""
    rank = gram.shape[-1]
    gram = gram.reshape(-1, rank, rank)
    mean = jnp.trace(gram, axis1=-2, axis2=-1)[:, None, None] / rank
    # With a mean eigenvalue of 1 no scale of the weights is too small; the rounding is below any damping.
    mean = jnp.where(mean > 0, mean, 1)
    damped = gram / mean + least * jnp.eye(rank, dtype=gram.dtype)
    bound = jnp.linalg.norm(damped, axis=(-2, -1), keepdims=True)
    filling = jnp.diag(jnp.where(jnp.arange(size) < rank, 0, 1).astype(gram.dtype))
    padding = ((0, 0), (0, size - rank), (0, size - rank))
    return jnp.pad(damped / bound, padding) + filling, mean * bound


def _newton_schulz(matrices: Float[Array, "k p p"], least: float) -> Float[Array, "k p p"]:
    """Inverse square roots of matrices with eigenvalues between ``least`` and 1."""
    eye = jnp.eye(matrices.shape[-1], dtype=matrices.dtype)

    def step(pair: tuple[jax.Array, jax.Array], scale: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        root, inverse = pair
        change = 0.5 * scale * (3 * eye - scale**2 * matmul(inverse, root))
        return (matmul(root, change), matmul(change, inverse)), None

    scales = jnp.asarray(_scales(math.sqrt(least), float(jnp.finfo(matrices.dtype).eps)), matrices.dtype)
    start = matrices, jnp.broadcast_to(eye, matrices.shape)
    return jax.lax.scan(step, start, scales)[0][1]


def _scales(lowest: float, precision: float) -> list[float]:
    """Of each step: the one that brings singular values from ``lowest`` to 1 nearest to 1."""
    scales = []
    while 1 - lowest > 4 * precision:
        scales.append(math.sqrt(3 / (1 + lowest + lowest**2)))
        lowest = 0.5 * scales[-1] * (3 - scales[-1] ** 2)
    return scales
