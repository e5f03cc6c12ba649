"""The largest eigenvalue of one matrix's Gram matrix by Lanczos, from a fixed start."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from cuttlefish_jax.matrices import matmul, tensordot

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# Enough for 99 % of Gaussian matrices, the slowest to converge, to come out within 1 %; 20 are not.
LANCZOS_STEPS = 32


def largest_gram_eigenvalue(matrix: Float[Array, "*m *n"], rows: int) -> Float[Array, ""]:
    r"""Largest eigenvalue of the smaller side's Gram matrix, from below, by Lanczos.

    With orthonormal q_1, ..., q_k that span the Krylov space of a start vector, Q^T (W W^T) Q is the
    tridiagonal matrix of the coefficients alpha (diagonal) and beta (beside it); its largest eigenvalue is
    the best estimate that the space has.
    """
    m, n = math.prod(matrix.shape[:rows]), math.prod(matrix.shape[rows:])
    size, columns = min(m, n), matrix.ndim - rows
    steps = min(LANCZOS_STEPS, size)
    # Orthogonal to no singular vector of anyone's weights; fixed, so that their stable rank is.
    start = np.random.default_rng(0).standard_normal(size).astype(np.float32)

    def step(j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        basis, q, alphas, betas = carry
        basis = basis.at[j].set(q)
        # Both products read the rows of the matrix as they lie in memory; transposing it is slower.
        if m <= n:
            half = tensordot(q.reshape(matrix.shape[:rows]), matrix, rows)
            w = jnp.ravel(tensordot(matrix, half, columns))
        else:
            half = tensordot(matrix, q.reshape(matrix.shape[rows:]), columns)
            w = jnp.ravel(tensordot(half, matrix, rows))
        alpha = matmul(q, w)
        for _ in range(2):  # once leaves the noise of cancellation behind; twice is enough
            w = w - matmul(matmul(basis, w), basis)
        alphas = alphas.at[j].set(alpha)
        beta = jnp.linalg.norm(w)
        # A beta of the size of rounding: the space is exhausted (few distinct singular values), its estimate
        # is exact, and w is noise. From here on everything is zero.
        beta = jnp.where(beta > 1e-6 * jnp.max(alphas), beta, 0)
        q = w / jnp.where(beta > 0, beta, jnp.inf)
        return basis, q, alphas, betas.at[j].set(beta)

    zeros = jnp.zeros(steps, jnp.float32)
    basis = jnp.zeros((steps, size), jnp.float32)
    carry = (basis, jnp.asarray(start / np.linalg.norm(start)), zeros, zeros)
    _, _, alphas, betas = jax.lax.fori_loop(0, steps, step, carry)
    tridiagonal = jnp.diag(alphas) + jnp.diag(betas[:-1], 1) + jnp.diag(betas[:-1], -1)
    return jnp.linalg.eigvalsh(tridiagonal)[-1]
