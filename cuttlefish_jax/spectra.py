"""Spectra of a model's kernels: stable ranks, singular values and accumulative ranks over a params tree.

Each function is one jitted call over the whole tree. Kernels whose matrices have one shape are stacked and go
through one traced computation, so a network of a hundred layers compiles a handful. All arithmetic is float32
at ``precision=HIGHEST``, whatever the dtype of the params: the default matmul precision of TPUs and recent
GPUs would spoil a Gram matrix. Matrices are scaled by their largest entry first, so that no square overflows
or vanishes.

No SVD is taken: it is several times slower than what is here, and ``jnp.linalg.svd`` can take minutes to
compile on a TPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from cuttlefish_jax.kernels import Kernel, check_kernel, kernel_array, kernel_sides
from cuttlefish_jax.lanczos import largest_gram_eigenvalue
from cuttlefish_jax.lobpcg import BLOCK, leading_eigenvalues, start_block
from cuttlefish_jax.matrices import LARGEST_DIVISOR, gram, map_sides
from cuttlefish_jax.meshes import on_any_mesh
from cuttlefish_jax.params import unwrap
from cuttlefish_jax.whitening import checked_calibration, whitened_spectrum

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    Params = Mapping[str, Any]


def stable_ranks(
    params: Any, kernels: Mapping[str, Kernel], *, method: Literal["exact", "lanczos"] = "exact"
) -> dict[str, Float[Array, "*stack"]]:
    r"""Stable rank of every kernel's matrix.

    .. math:: \mathrm{sr}(W) = \|W\|_F^2 / \sigma_1^2 = \sum_i \sigma_i^2 / \sigma_1^2

    a real number in ``[1, min(m, n)]`` (up to float32 rounding); it is not truncated to an integer.

    ``"exact"`` takes :math:`\sigma_1^2` from all eigenvalues of the Gram matrix of the smaller side.
    ``"lanczos"`` takes it from 32 Lanczos steps, with full reorthogonalisation and one fixed start vector: 64
    passes over the weights and no Gram matrix. Its :math:`\sigma_1` is a lower bound, so the stable rank can
    only come out too high: for Gaussian weights, the worst case known, by more than 1 % in fewer than one
    matrix of a hundred, and by nothing visible for trained weights (``python benchmarks/rank_estimation.py``
    measures both).

    Args:
      params: the model's params tree, or an NNX model or its state; the kernels may have any real dtype and
        any sharding.
      kernels: ``path -> Kernel``, as :func:`~cuttlefish_jax.find_kernels` returns it. It is static: a second
        call with equal kernels and params of the same shapes does not recompile.
      method: ``"exact"`` or ``"lanczos"``.

    Returns:
      ``path -> f32[]``, or ``f32[*stack]`` for layers stacked by ``scan`` or ``vmap``, in the order of
      ``kernels``. A matrix of zeros has stable rank 0; one with a NaN or an infinity has NaN.

    Raises:
      ValueError: if ``method`` is unknown, or ``params`` are not those that ``kernels`` were found in, or
        complex.

    Example:
      >>> import jax.numpy as jnp
      >>> from cuttlefish_jax.kernels import Kernel
      >>> from cuttlefish_jax.spectra import stable_ranks
      >>> kernel = Kernel(path="dense", layer="Dense", shape=(2, 3), reduction_axes=(0,), output_axes=(1,))
      >>> params = {"dense": {"kernel": jnp.array([[4.0, 0.0, 0.0], [0.0, 2.0, 0.0]])}}
      >>> float(stable_ranks(params, {"dense": kernel})["dense"])  # (4**2 + 2**2) / 4**2
      1.25

    References:
      Wang et al., `Cuttlefish: Low-Rank Model Training without All the Tuning
      <https://arxiv.org/abs/2305.02538>`_, MLSys 2023.
    """
    if method not in _STABLE_RANK:
        raise ValueError(f"method must be one of {sorted(_STABLE_RANK)}, got {method!r}")
    return _by_path(kernels, _stable_ranks(unwrap(params)[0], tuple(kernels.values()), method))


def initial_vectors(kernels: Mapping[str, Kernel]) -> dict[str, np.ndarray]:
    """What the first call of :func:`warm_stable_ranks` starts from: random numbers, always the same.

    Args:
      kernels: ``path -> Kernel``.

    Returns:
      ``path -> f32[*stack, 4, min(m, n)]``, on the host.

    Example:
      >>> from cuttlefish_jax.kernels import Kernel
      >>> kernel = Kernel(path="dense", layer="Dense", shape=(2, 3), reduction_axes=(0,), output_axes=(1,))
      >>> initial_vectors({"dense": kernel})["dense"].shape
      (4, 2)
    """
    vectors = {}
    for path, kernel in kernels.items():
        block = start_block(kernel.max_rank)
        vectors[path] = np.broadcast_to(block, (*kernel.stack_shape, *block.shape)).copy()
    return vectors


def warm_stable_ranks(
    params: Any, kernels: Mapping[str, Kernel], vectors: Mapping[str, Array | np.ndarray]
) -> tuple[dict[str, Float[Array, "*stack"]], dict[str, Float[Array, "*stack 4 min_mn"]]]:
    r"""Stable rank of every kernel's matrix, from the singular vectors of the last time it was measured.

    The same number as :func:`stable_ranks` to about 0.3 %, for some 25 passes over the weights at the start,
    10 after the first epoch, 5 to 7 later and 3 when they hardly change (``python
    benchmarks/rank_estimation.py --train quickstart`` measures errors and passes). The largest singular value
    is found by block LOBPCG on the Gram matrix of the smaller side, which is not formed, and stops for each
    kernel when :math:`\sigma_1^2` is good to 1 % by a bound that is itself far off. It is a lower bound, so
    the stable rank can only come out too high. If in one step a singular value that was far from the first
    overtakes it, while the old first vector stays one, this can go unnoticed for a few measurements.

    Nothing is gathered: the weights stay as they are sharded.

    Args:
      params: the model's params tree, or an NNX model or its state; the kernels may have any real dtype and
        any sharding.
      kernels: ``path -> Kernel``; static, as in :func:`stable_ranks`.
      vectors: ``path -> f32[*stack, 4, min(m, n)]``: :func:`initial_vectors` the first time, then what the
        last call returned. They are a state like any other: keep them with the params.

    Returns:
      The stable ranks, as of :func:`stable_ranks`, and the vectors for the next call.

    Raises:
      ValueError: if ``params`` are not those that ``kernels`` were found in, or complex, or ``vectors`` not
        those of ``kernels``.

    Example:
      >>> import jax.numpy as jnp
      >>> from cuttlefish_jax.kernels import Kernel
      >>> kernel = Kernel(path="dense", layer="Dense", shape=(2, 3), reduction_axes=(0,), output_axes=(1,))
      >>> params = {"dense": {"kernel": jnp.array([[4.0, 0.0, 0.0], [0.0, 2.0, 0.0]])}}
      >>> ranks, vectors = warm_stable_ranks(params, {"dense": kernel}, initial_vectors({"dense": kernel}))
      >>> print(f"{ranks['dense']:.3f}")  # (4**2 + 2**2) / 4**2
      1.250
    """
    for path, kernel in kernels.items():
        expected = (*kernel.stack_shape, BLOCK, kernel.max_rank)
        shape = np.shape(vectors[path]) if path in vectors else None
        if shape != expected:
            raise ValueError(
                f"the vectors of {path!r} have shape {shape}, expected {expected}: "
                "start again with initial_vectors(kernels)"
            )
    ranks, new = _warm_stable_ranks(
        unwrap(params)[0], tuple(kernels.values()), tuple(vectors[path] for path in kernels)
    )
    return _by_path(kernels, ranks), _by_path(kernels, new)


def singular_values(
    params: Any, kernels: Mapping[str, Kernel], *, calibration: Mapping[str, Array] | None = None
) -> dict[str, Float[Array, "*stack min_mn"]]:
    r"""All singular values of every kernel's matrix, largest first.

    They are the square roots of the eigenvalues of the smaller side's Gram matrix. Squaring costs half of
    the digits: in float32, singular values below about :math:`3 \cdot 10^{-4}\,\sigma_1` are lost in rounding
    noise of that size (they come out as anything from 0 to it). The leading ones are good to about 1e-6.

    With ``calibration`` they are those of the whitened matrix, :mod:`cuttlefish_jax.whitening`: at rank
    :math:`r` the layer's outputs lose :math:`\sum_{i > r} \sigma_i^2` of their mean square.

    Args:
      params: the model's params tree, or an NNX model or its state; the kernels may have any real dtype and
        any sharding.
      kernels: ``path -> Kernel``; static, as in :func:`stable_ranks`.
      calibration: of the same params, by :func:`cuttlefish_jax.calibrate`.

    Returns:
      ``path -> f32[*stack, min(m, n)]``, descending, in the order of ``kernels``; all NaN for a matrix with a
      NaN or an infinity.

    Raises:
      ValueError: if ``params`` are not those that ``kernels`` were found in, or complex, or ``calibration``
        is not of them.

    Example:
      >>> import jax.numpy as jnp
      >>> from cuttlefish_jax.kernels import Kernel
      >>> from cuttlefish_jax.spectra import singular_values
      >>> kernel = Kernel(path="dense", layer="Dense", shape=(2, 3), reduction_axes=(0,), output_axes=(1,))
      >>> params = {"dense": {"kernel": jnp.array([[4.0, 0.0, 0.0], [0.0, 2.0, 0.0]])}}
      >>> singular_values(params, {"dense": kernel})["dense"].tolist()
      [4.0, 2.0]
    """
    entries = tuple(kernels.values())
    found = None if calibration is None else checked_calibration(calibration, entries)
    return _by_path(kernels, _singular_values(unwrap(params)[0], entries, found))


def accumulative_ranks(
    params: Any, kernels: Mapping[str, Kernel], *, p: float = 0.8
) -> dict[str, Int[Array, "*stack"]]:
    r"""Accumulative rank of every kernel's matrix: the leading singular values that hold the share ``p``.

    .. math:: \min \{k \ge 1 : \sum_{i \le k} \sigma_i \ge p \sum_i \sigma_i\}

    up to float32 rounding of the sums. For ``p`` close to 1 the noise in the smallest singular values counts
    too (see :func:`singular_values`): this is a measure for the bulk of a spectrum, not a numerical rank.

    Args:
      params: the model's params tree, or an NNX model or its state; the kernels may have any real dtype and
        any sharding.
      kernels: ``path -> Kernel``; static, as in :func:`stable_ranks`.
      p: the share of the sum of singular values to hold, ``0 < p <= 1``.

    Returns:
      ``path -> i32[]``, or ``i32[*stack]`` for stacked layers, in the order of ``kernels``. It is 1 for a
      matrix of zeros, and 0, which is no rank, for a matrix with a NaN or an infinity.

    Raises:
      ValueError: if ``p`` is outside ``(0, 1]``, or ``params`` are not those that ``kernels`` were found in,
        or complex.

    Example:
      >>> import jax.numpy as jnp
      >>> from cuttlefish_jax.kernels import Kernel
      >>> from cuttlefish_jax.spectra import accumulative_ranks
      >>> kernel = Kernel(path="dense", layer="Dense", shape=(3, 3), reduction_axes=(0,), output_axes=(1,))
      >>> params = {"dense": {"kernel": jnp.diag(jnp.array([6.0, 3.0, 1.0]))}}
      >>> int(accumulative_ranks(params, {"dense": kernel}, p=0.8)["dense"])
      2

    References:
      Wang et al., `Cuttlefish: Low-Rank Model Training without All the Tuning
      <https://arxiv.org/abs/2305.02538>`_, MLSys 2023.
    """
    if not 0 < p <= 1:
        raise ValueError(f"p must be in (0, 1], got {p}")
    return _by_path(kernels, _accumulative_ranks(unwrap(params)[0], tuple(kernels.values()), float(p)))


def _by_path(kernels: Mapping[str, Kernel], values: tuple[Array, ...]) -> dict[str, Array]:
    return dict(zip(kernels, values, strict=True))


# The jitted functions return tuples: a dict that passes through jit comes back sorted by key.


@functools.partial(jax.jit, static_argnums=(1, 2))
def _stable_ranks(params: Params, kernels: tuple[Kernel, ...], method: str) -> tuple[Array, ...]:
    return _measure_all(_STABLE_RANK[method], params, kernels)


@functools.partial(jax.jit, static_argnums=1)
def _warm_stable_ranks(
    params: Params, kernels: tuple[Kernel, ...], vectors: tuple[Array, ...]
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    for kernel in kernels:
        check_kernel(params, kernel)

    def run(params: Params, vectors: tuple[Array, ...]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        leaves = [kernel_array(params, kernel) for kernel in kernels]
        arrays = [leaf.astype(jnp.float32) for leaf in leaves]
        largest, traces, new, _ = leading_eigenvalues(arrays, kernels, vectors)
        return tuple(_ratio(*pair, pair[0]) for pair in zip(traces, largest, strict=True)), tuple(new)

    return on_any_mesh(run, params, vectors) if kernels else ((), ())


@functools.partial(jax.jit, static_argnums=1)
def _singular_values(
    params: Params, kernels: tuple[Kernel, ...], calibration: tuple[Array, ...] | None
) -> tuple[Array, ...]:
    if calibration is None:
        return _measure_all(_spectrum, params, kernels)
    return _measure_all(_whitened_spectrum, params, kernels, calibration)


@functools.partial(jax.jit, static_argnums=1)
def _accumulative_ranks(params: Params, kernels: tuple[Kernel, ...], p: Array) -> tuple[Array, ...]:
    return _measure_all(functools.partial(_accumulative_rank, p=p), params, kernels)


def _measure_all(
    measure: Callable[..., Array], params: Params, kernels: tuple[Kernel, ...], *others: tuple[Array, ...]
) -> tuple[Array, ...]:
    """``measure`` of every kernel's matrix in float32, and of ``others`` of the kernels' shapes."""

    def run(params: Params, *others: tuple[Array, ...]) -> tuple[Array, ...]:
        matrices = [kernel_sides(params, kernel).astype(jnp.float32) for kernel in kernels]
        more = [[k.to_sides(x) for k, x in zip(kernels, other, strict=True)] for other in others]
        return tuple(map_sides(measure, matrices, kernels, *more))

    return on_any_mesh(run, params, *others)


# Of one matrix in its kernel's own axes, ``[*m, *n]``, of which the first ``rows`` are those of the rows.


def _gram(matrix: Float[Array, "*m *n"], rows: int) -> Float[Array, "k k"]:
    """Gram matrix of the smaller side, ``k = min(m, n)``."""
    is_wide = math.prod(matrix.shape[:rows]) < math.prod(matrix.shape[rows:])
    return gram(matrix, range(rows, matrix.ndim) if is_wide else range(rows))


def _scaled(matrix: Float[Array, "*m *n"]) -> tuple[Float[Array, "*m *n"], Float[Array, ""]]:
    """The matrix with its largest entry scaled to 1, and the scale: 0, NaN or inf if there is no such."""
    scale = jnp.max(jnp.abs(matrix))
    usable = (scale > 0) & jnp.isfinite(scale)
    scale = jnp.where(usable, jnp.minimum(scale, LARGEST_DIVISOR), scale)
    return jnp.where(usable, matrix / jnp.where(usable, scale, 1), 0), scale


def _ratio(numerator: Array, denominator: Array, scale: Array) -> Float[Array, ""]:
    """``numerator / denominator``, but 0 for a matrix of zeros and NaN for one that is not finite."""
    # Of a matrix that is not zero the denominator is, if what it was computed from has overflowed.
    otherwise = jnp.where(numerator > 0, jnp.nan, 0)
    ratio = jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1), otherwise)
    return jnp.where(jnp.isfinite(scale), ratio, jnp.nan)


def _exact_stable_rank(matrix: Float[Array, "*m *n"], rows: int) -> Float[Array, ""]:
    matrix, scale = _scaled(matrix)
    small = _gram(matrix, rows)
    return _ratio(jnp.trace(small), jnp.linalg.eigvalsh(small)[-1], scale)


def _lanczos_stable_rank(matrix: Float[Array, "*m *n"], rows: int) -> Float[Array, ""]:
    matrix, scale = _scaled(matrix)
    return _ratio(jnp.sum(matrix * matrix), largest_gram_eigenvalue(matrix, rows), scale)


_STABLE_RANK = {"exact": _exact_stable_rank, "lanczos": _lanczos_stable_rank}


def _relative_spectrum(
    matrix: Float[Array, "*m *n"], rows: int
) -> tuple[Float[Array, " k"], Float[Array, ""]]:
    """The singular values of the scaled matrix, and the scale."""
    matrix, scale = _scaled(matrix)
    squares = jnp.linalg.eigvalsh(_gram(matrix, rows))[::-1]
    # Rounding makes zero eigenvalues negative.
    return jnp.sqrt(jnp.maximum(squares, 0)), scale


def _spectrum(matrix: Float[Array, "*m *n"], rows: int) -> Float[Array, " k"]:
    relative, scale = _relative_spectrum(matrix, rows)
    return jnp.where(jnp.isfinite(scale), scale * relative, jnp.nan)


def _whitened_spectrum(matrix: Float[Array, "*m *n"], rows: int, calibration: Array) -> Float[Array, " k"]:
    found = jnp.max(jnp.abs(matrix))
    return jnp.where(jnp.isfinite(found), whitened_spectrum(matrix, rows, calibration), jnp.nan)


def _accumulative_rank(matrix: Float[Array, "*m *n"], rows: int, *, p: Array) -> Int[Array, ""]:
    relative, scale = _relative_spectrum(matrix, rows)
    sums = jnp.cumsum(relative)
    # The tolerance lets an exact tie, such as 4 of 5 equal values at p = 0.8, count as reached.
    below = sums < p * sums[-1] * (1 - 1e-5)
    rank = 1 + jnp.sum(below, dtype=jnp.int32)
    return jnp.where(jnp.isfinite(scale), rank, 0)
