r"""Truncation in the metric of a layer's inputs: whitened SVD.

Of all matrices :math:`W_r` of rank :math:`r`, the truncated SVD of :math:`W` has the smallest
:math:`\|W - W_r\|_F`. What counts in a network is what happens to the layer's outputs, the mean of
:math:`\|x^T (W - W_r)\|^2` over its inputs :math:`x`. With :math:`S = E[x x^T] = L L^T`, that is
:math:`\|L^T (W - W_r)\|_F^2`, and it is smallest for :math:`W_r = W Q_r Q_r^T`, where :math:`Q_r` are the
leading eigenvectors of :math:`G = W^T S W`, the second moments of the outputs. The square roots of their
eigenvalues are the whitened singular values, those of :math:`L^T W`.

What is measured is :math:`S W`, which has the shape of the kernel (:mod:`cuttlefish_jax.calibration`). A few
batches do not show all inputs that there are, so a thousandth of the moments are those of white inputs.

References:
  Yuan et al., `ASVD <https://arxiv.org/abs/2312.05821>`_, 2023; Wang et al., `SVD-LLM
  <https://arxiv.org/abs/2403.07378>`_, ICLR 2025: truncation in the metric of the inputs.
  Zhang et al., `Accelerating Very Deep Convolutional Networks <https://arxiv.org/abs/1505.06798>`_, TPAMI
  2016, section 3.1: by the eigenvectors of the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import jax.numpy as jnp

from cuttlefish_jax.kernels import Kernel
from cuttlefish_jax.matrices import gram, matmul, scaled, tensordot

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# The share of white inputs in the moments: directions that no batch had are not given up for nothing.
RIDGE = 1e-3


def checked_calibration(calibration: Mapping[str, Array], kernels: Iterable[Kernel]) -> tuple[Array, ...]:
    """What was measured of each of the kernels.

    Raises:
      ValueError: if it was of other kernels; the message names the first difference.
    """
    found = []
    for kernel in kernels:
        if kernel.path not in calibration:
            raise ValueError(f"the calibration has no {kernel.path!r}: calibrate all kernels of the plan")
        shape = jnp.shape(calibration[kernel.path])
        if shape != kernel.shape:
            raise ValueError(
                f"the calibration of {kernel.path!r} has shape {shape}, expected {kernel.shape}: "
                "it is of another model"
            )
        found.append(calibration[kernel.path].astype(jnp.float32))
    return tuple(found)


def whitened_spectrum(
    w: Float[Array, "*m *n"], rows: int, measured: Float[Array, "*m *n"]
) -> Float[Array, " k"]:
    """The whitened singular values, ``k = min(m, n)``, the largest first.

    Args:
      w: a matrix in its kernel's own axes.
      rows: how many of them are those of the rows.
      measured: ``S W``.
    """
    return _whitened(w, rows, measured)[2]


def whitened_projection(
    w: Float[Array, "*m *n"], rows: int, measured: Float[Array, "*m *n"], rank: Array
) -> tuple[Array, Array]:
    """The best matrix of rank ``rank``, as a product ``b c`` whose second factor has orthonormal rows.

    Args:
      w: a matrix in its kernel's own axes.
      rows: how many of them are those of the rows.
      measured: ``S W``.
      rank: ``i32[]``.

    Returns:
      ``b f32[*m, k]``, all but ``rank`` of whose ``k = min(m, n)`` columns are zeros, and ``c f32[k, *n]``.
    """
    a, basis, _, vectors = _whitened(w, rows, measured)
    # Zeros in place of a shape that depends on the rank: kernels of one shape are one computation.
    b = matmul(a, vectors) * (jnp.arange(a.shape[-1]) < rank)
    return b, tensordot(vectors.T, basis, 1)


def _whitened(w: Array, rows: int, measured: Array) -> tuple[Array, Array, Array, Array]:
    """``w`` as ``a basis``, and the eigenvectors of its outputs' moments in this basis.

    Returns:
      ``a f32[*m, k]`` and ``basis f32[k, *n]`` with orthonormal rows; the whitened singular values
      ``f32[k]``, descending; and the eigenvectors ``f32[k, k]``, in columns.
    """
    n, columns = math.prod(w.shape[rows:]), w.shape[rows:]
    w, scale = scaled(w)
    measured, measured_scale = scaled(measured)
    if math.prod(w.shape[:rows]) >= n:
        a, basis = w.reshape(*w.shape[:rows], n), jnp.eye(n).reshape(n, *columns)
        of_basis = measured.reshape(a.shape)
    else:
        # The moments of m x n have no other eigenvectors than those in the span of the rows of w.
        squares, p = jnp.linalg.eigh(gram(w, range(rows, w.ndim)))
        # Rows below the Gram matrix's rounding (s < 3e-4 s_max) come out too short: they mean nothing.
        floor = jnp.maximum(1e-7 * squares[-1:], jnp.finfo(w.dtype).tiny)
        s = jnp.sqrt(jnp.maximum(squares, floor))
        p = p.reshape(*w.shape[:rows], -1)
        basis = tensordot(jnp.moveaxis(p, -1, 0) / s.reshape(-1, *[1] * rows), w, rows)
        a = p * s
        of_basis = tensordot(measured, jnp.moveaxis(basis, 0, -1), len(columns))
    axes = list(range(rows))
    moments, white = tensordot(a, of_basis, (axes, axes)), gram(a, axes)
    moments = (moments + moments.T) / 2
    total, of_white = jnp.trace(moments), jnp.trace(white)
    # Of a layer that no input has reached, nothing is known: its inputs are taken for white.
    known = (total > 0) & jnp.isfinite(total) & (of_white > 0)
    share = white * (RIDGE * total / jnp.where(of_white > 0, of_white, 1))
    squares, vectors = jnp.linalg.eigh(jnp.where(known, moments + share, white))
    unit = jnp.where(known, jnp.sqrt(measured_scale), jnp.sqrt(scale)) * jnp.sqrt(scale)
    sigmas = jnp.sqrt(jnp.maximum(squares[::-1], 0)) * unit
    return a * scale, basis, sigmas, vectors[:, ::-1]
