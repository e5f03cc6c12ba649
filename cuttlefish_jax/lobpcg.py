r"""The largest eigenvalue of the Gram matrix of every kernel, by LOBPCG from a warm start.

A block of a few vectors per matrix is improved until its largest Ritz value is good enough: each round adds
the residuals of the block and its last change, and takes the best block in what they span (Knyazev's method,
without a preconditioner). A round reads the weights twice. More vectors in the block cost no pass more, and
save rounds: four are as near to the end of a Gaussian's spectrum after 12 rounds as one after 32 steps of
Lanczos; and when singular vectors cross from one epoch to the next, the new first one is in the block.

The arithmetic on the weights is two products per kernel in its own layout: nothing is reshaped, which would
gather the weights of sharded kernels, and only small kernels of one shape are stacked, which copies them. All
that is small is batched, over the matrices of one size or over all of them.

References:
  Knyazev, `Toward the Optimal Preconditioned Eigensolver: Locally Optimal Block Preconditioned Conjugate
  Gradient Method <https://doi.org/10.1137/S1064827500366124>`_, SIAM J. Sci. Comput. 23(2), 2001.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cuttlefish_jax.kernels import Kernel
from cuttlefish_jax.matrices import LARGEST_DIVISOR, einsum

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

    Stack = Float[Array, "*stack"]
    Vectors = Float[Array, "*stack b size"]
    Rows = Float[Array, "matrices b size"]
    Numbers = Float[Array, " matrices"]

# Vectors in a block.
BLOCK = 4
# A matrix is done when the relative error of its eigenvalue is below this by the Kato-Temple bound; errors
# measured in training are about a tenth of it (benchmarks/rank_estimation.py).
TOLERANCE = 1e-2
MAX_ROUNDS = 20
# Where there are so few dimensions, a random block may have nearly all of a singular vector in it that is not
# the first, and then seems to be done. Such matrices have at least one round, which costs next to nothing.
_TINY = 4 * BLOCK
# How much of every vector but the first is new at the next start: what none of them has must get in.
_FRESH = 0.01
# A direction of which all but this share (squared) is in the others is left out: it would be mostly rounding.
_INDEPENDENT = 1e-3
# Kernels of one shape with no more entries are stacked: copying takes less time than the operations saved.
_SMALL = 2**16


def start_block(size: int) -> np.ndarray:
    """Unit vectors ``f32[BLOCK, size]``; random, so that they are orthogonal to no one's singular vectors."""
    vectors = np.random.default_rng(0).standard_normal((BLOCK, size))
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def leading_eigenvalues(
    arrays: Sequence[Array], kernels: Sequence[Kernel], vectors: Sequence[Vectors]
) -> tuple[list[Any], ...]:
    """The largest eigenvalue of the Gram matrix of every kernel, from below, and its trace.

    Args:
      arrays: the kernels' parameters, float32, in their own layout.
      kernels: what their axes are.
      vectors: to start from, for each kernel; any but zeros.

    Returns:
      For each kernel the eigenvalue and the trace, in a unit of its own (the trace is 0 for a matrix of
      zeros, and NaN for one that is not finite), the vectors to start from next time, and the number of
      rounds after the first products. For the trace the array is read once, for the first products twice, as
      in every round.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, kernel in enumerate(kernels):
        axes = kernel.shape, kernel.reduction_axes, kernel.output_axes, kernel.stack_axes
        groups.setdefault(axes if math.prod(kernel.shape) <= _SMALL else (index,), []).append(index)
    members = list(groups.values())
    found = _leading_eigenvalues(
        [jnp.stack([arrays[i] for i in group]) if group[1:] else arrays[group[0]] for group in members],
        [_stacked(kernels[group[0]], len(group)) for group in members],
        [jnp.stack([vectors[i] for i in group]) if group[1:] else vectors[group[0]] for group in members],
    )
    unstacked = []
    for values in found:
        by_index: dict[int, Array] = {}
        for group, value in zip(members, values, strict=True):
            by_index |= zip(group, value if group[1:] else [value], strict=True)
        unstacked.append([by_index[i] for i in range(len(kernels))])
    return tuple(unstacked)


def _stacked(kernel: Kernel, copies: int) -> Kernel:
    """The kernel of so many copies, with one more stack axis in front; the kernel itself if it is one."""
    if copies == 1:
        return kernel
    return Kernel(
        path=kernel.path,
        layer=kernel.layer,
        shape=(copies, *kernel.shape),
        reduction_axes=tuple(axis + 1 for axis in kernel.reduction_axes),
        output_axes=tuple(axis + 1 for axis in kernel.output_axes),
        stack_axes=(0, *(axis + 1 for axis in kernel.stack_axes)),
    )


def _leading_eigenvalues(
    arrays: Sequence[Array], kernels: Sequence[Kernel], vectors: Sequence[Vectors]
) -> tuple[list[Stack], list[Stack], list[Vectors], list[Stack]]:
    sizes = _Sizes(kernels)
    rows = [_unit_rows(x)[0] for x in sizes.group(vectors)]
    starts = sizes.ungroup(rows)
    grams = _Gram.all(arrays, kernels, starts)
    products = sizes.group([gram @ x for gram, x in zip(grams, starts, strict=True)])
    blocks, progress = _improve(list(zip(rows, products, strict=True)), sizes)

    def next_round(carry: tuple[list[_Block], _Progress]) -> tuple[list[_Block], _Progress]:
        blocks, progress = carry
        products = [  # a kernel that is done is not read again
            jax.lax.cond(jnp.any(active), gram.__matmul__, jnp.zeros_like, r)
            for gram, r, active in zip(
                grams,
                sizes.ungroup([block.residuals for block in blocks]),
                sizes.ungroup(sizes.split(progress.is_active)),
                strict=True,
            )
        ]
        spaces = [
            (
                jnp.concatenate([block.x, block.residuals, block.change], 1),
                jnp.concatenate([block.ax, product, block.a_change], 1),
            )
            for block, product in zip(blocks, sizes.group(products), strict=True)
        ]
        return _improve(spaces, sizes, progress)

    def goes_on(carry: tuple[list[_Block], _Progress]) -> Bool[Array, ""]:
        return jnp.any(carry[1].is_active)

    blocks, progress = jax.lax.while_loop(goes_on, next_round, (blocks, progress))
    starts = [
        _next_start(block, value) for block, value in zip(blocks, sizes.split(progress.value), strict=True)
    ]
    eigenvalues = sizes.ungroup(sizes.split(progress.eigenvalue))
    rounds = sizes.ungroup(sizes.split(progress.rounds))
    return eigenvalues, [gram.trace() for gram in grams], sizes.ungroup(starts), rounds


class _Block(NamedTuple):
    """The blocks of all matrices of one size.

    Attributes:
      x: the Ritz vectors, that of the largest value first: orthonormal, or zero.
      ax: their products with the Gram matrix.
      residuals: those of the Ritz vectors, at unit norm, or zero.
      change: what the last round added to the Ritz vectors, at unit norm, or zero.
      a_change: its products with the Gram matrix.
    """

    x: Rows
    ax: Rows
    residuals: Rows
    change: Rows
    a_change: Rows


class _Progress(NamedTuple):
    """How far all matrices are.

    Attributes:
      value: the largest Ritz value.
      second: the second largest.
      residual: the norm of the residual of the first Ritz vector.
      rounds: how many there were.
      least: how many there have to be.
    """

    value: Numbers
    second: Numbers
    residual: Numbers
    rounds: Numbers
    least: Numbers

    @property
    def is_active(self) -> Bool[Array, " matrices"]:
        """Whether another round is due: the bound on the relative error is too large, or there was none."""
        # Kato-Temple, with the second Ritz value in the place of the second eigenvalue.
        gap = jnp.maximum(self.value - self.second, jnp.finfo(jnp.float32).tiny)
        error = self.residual * jnp.minimum(1, self.residual / gap)
        is_far = (error > TOLERANCE * self.value) | (self.rounds < self.least)
        return is_far & (self.rounds < MAX_ROUNDS)

    @property
    def eigenvalue(self) -> Numbers:
        """That of two Lanczos steps, if the second diagonal entry were 0, the least that it can be."""
        half = self.value / 2
        return half + jnp.sqrt(half**2 + self.residual**2)


def _improve(
    spaces: Sequence[tuple[Rows, Rows]], sizes: _Sizes, before: _Progress | None = None
) -> tuple[list[_Block], _Progress]:
    """The best blocks in what rows span; the rows are given with their products with the Gram matrix.

    A matrix that was done ``before`` keeps its block, the first rows of its space.
    """
    grams = jnp.concatenate([einsum("kis,kjs->kij", s, s) for s, _ in spaces])
    forms = jnp.concatenate([einsum("kis,kjs->kij", s, a_s) for s, a_s in spaces])
    found, value, second = _rayleigh_ritz(grams, forms)
    rounds = jnp.zeros(len(value), jnp.int32)
    least = jnp.concatenate([jnp.full(len(s), s.shape[-1] <= _TINY, jnp.int32) for s, _ in spaces])
    if before is not None:
        active = before.is_active
        found = jnp.where(active[:, None, None], found, np.eye(*found.shape[1:], dtype=np.float32))
        value = jnp.where(active, value, before.value)
        second = jnp.where(active, second, before.second)
        rounds = before.rounds + active
    blocks, residual = [], []
    for (s, a_s), coefficients in zip(spaces, sizes.split(found), strict=True):
        x, change = jnp.split(einsum("kib,kis->kbs", coefficients, s), 2, 1)
        ax, a_change = jnp.split(einsum("kib,kis->kbs", coefficients, a_s), 2, 1)
        inside = einsum("kbs,kcs->kbc", ax, x)
        residuals, norms = _unit_rows(ax - einsum("kbc,kcs->kbs", inside, x))
        blocks.append(_Block(x, ax, residuals, change, a_change))
        residual.append(norms[:, 0])
    return blocks, _Progress(value, second, jnp.concatenate(residual), rounds, least)


def _next_start(block: _Block, value: Numbers) -> Rows:
    """The Ritz vectors times the Gram matrix, with something new in all but the first."""
    fresh = start_block(block.x.shape[-1])
    value = value[:, None, None]
    mixed = block.ax / jnp.where(value > 0, value, 1) + _FRESH * (np.arange(BLOCK) > 0)[:, None] * fresh
    usable = (value > 0) & jnp.isfinite(mixed).all((1, 2), keepdims=True)
    return jnp.where(usable, mixed, fresh)


def _rayleigh_ritz(
    gram: Float[Array, "matrices i i"], form: Float[Array, "matrices i i"]
) -> tuple[Float[Array, "matrices i 2*b"], Numbers, Numbers]:
    """The Ritz vectors of the largest Ritz values, as coefficients.

    Args:
      gram: the scalar products of the vectors that span a space.
      form: their scalar products with their own products.

    Returns:
      ``BLOCK`` Ritz vectors, then their changes against the first ``BLOCK`` vectors of the space, at unit
      norm; the two largest Ritz values. All are zero where something is not finite.
    """
    finite = (jnp.isfinite(gram) & jnp.isfinite(form)).all((1, 2))
    gram, form = (jnp.where(finite[:, None, None], x, 0) for x in (gram, form))
    # One batch of decompositions for the whole network: side by side they could wait for each other for ever
    # (see matrices.py), and on a GPU each would take as long as all.
    shares, basis = jnp.linalg.eigh(gram)
    whiten = basis * jnp.where(shares > _INDEPENDENT, shares, jnp.inf)[:, None] ** -0.5
    values, vectors = jnp.linalg.eigh(einsum("kia,kij,kjb->kab", whiten, form, whiten))
    ritz = einsum("kia,kab->kib", whiten, vectors[..., : -BLOCK - 1 : -1])
    # The part that is not of the first vectors, orthogonal to the Ritz vectors.
    change = ritz.at[:, :BLOCK].set(0)
    change -= einsum("kia,kja,kjl,klb->kib", ritz, ritz, gram, change)
    norms = jnp.sqrt(jnp.maximum(einsum("kib,kij,kjb->kb", change, gram, change), 0))[:, None]
    change = jnp.where(norms > _INDEPENDENT, change / norms, 0)
    return jnp.concatenate([ritz, change], -1), values[:, -1], values[:, -2]


class _Gram:
    """The Gram matrix of the smaller side of a kernel's matrices, as an operator: it is never formed.

    It is that of the matrix times ``scale``, at which no square overflows or vanishes.
    """

    def __init__(self, array: Array, kernel: Kernel):
        self.array, self.stack = array, kernel.stack_axes
        sides = sorted(kernel.reduction_axes), sorted(kernel.output_axes)
        self.inner, self.outer = sides if kernel.m <= kernel.n else sides[::-1]
        self.scale: Stack = jnp.ones(kernel.stack_shape, jnp.float32)

    @staticmethod
    def all(arrays: Sequence[Array], kernels: Sequence[Kernel], vectors: Sequence[Vectors]) -> list[_Gram]:
        """Those of all kernels, with scales by the size of their matrices' products with some vectors."""
        grams = [_Gram(array, kernel) for array, kernel in zip(arrays, kernels, strict=True)]
        largest = []
        for gram, x in zip(grams, vectors, strict=True):
            half = jnp.abs(gram._half(x))
            largest.append(jnp.ravel(jnp.max(half, range(len(gram.stack), half.ndim))))
        ends = np.cumsum([len(x) for x in largest])[:-1]
        sizes = jnp.concatenate(largest)
        divisors = jnp.minimum(jnp.where(sizes > 0, sizes, 1), LARGEST_DIVISOR)
        scales = jnp.where(jnp.isfinite(sizes), 1 / divisors, jnp.nan)
        for gram, scale in zip(grams, jnp.split(scales, ends), strict=True):
            gram.scale = scale.reshape(gram.scale.shape)
        return grams

    def trace(self) -> Stack:
        """The sum of the squares of the entries."""
        others = [a for a in range(self.array.ndim) if a not in self.stack]
        order = [*self.stack, *others]
        scale = jnp.expand_dims(self.scale, range(len(self.stack), self.array.ndim))
        scale = jnp.transpose(scale, [order.index(a) for a in range(self.array.ndim)])
        # The sum keeps the stack axes in the array's order.
        total = jnp.sum(jnp.square(self.array * scale), others)
        return jnp.transpose(total, [sorted(self.stack).index(a) for a in self.stack])

    def __matmul__(self, vectors: Vectors) -> Vectors:
        """Products with vectors, in two passes over the array."""
        lead = len(self.stack)
        half = self._scaled(self._half(vectors))
        stack, outer = tuple(range(lead)), tuple(range(lead, lead + len(self.outer)))
        if self._inner_is_last:
            half = jnp.moveaxis(half, -1, lead)
            outer = tuple(axis + 1 for axis in outer)
            product = _dot(half, self.array, (outer, self.outer), (stack, self.stack))
            return self._scaled(product).reshape(vectors.shape)
        half = jnp.moveaxis(half, lead, -1)
        product = _dot(self.array, half, (self.outer, outer), (self.stack, stack))
        return jnp.moveaxis(self._scaled(product), -1, lead).reshape(vectors.shape)

    def _half(self, vectors: Vectors) -> Array:
        """Products with the array: ``[*stack, *outer, b]`` or ``[*stack, b, *outer]``, as they come."""
        lead = len(self.stack)
        x = vectors.reshape(*vectors.shape[:-1], *(self.array.shape[a] for a in self.inner))
        stack, inner = tuple(range(lead)), tuple(range(lead + 1, x.ndim))
        if self._inner_is_last:
            return _dot(self.array, x, (self.inner, inner), (self.stack, stack))
        return _dot(x, self.array, (inner, self.inner), (stack, self.stack))

    @property
    def _inner_is_last(self) -> bool:
        """Whether the array's last axis is an inner one: it goes to the side where products are faster."""
        return self.inner[-1] == self.array.ndim - 1

    def _scaled(self, products: Array) -> Array:
        # Always between a product and the transposition of its result: the CPU compiler would make of the two
        # one product in the other order, which is several times slower.
        return products * jnp.expand_dims(self.scale, range(len(self.stack), products.ndim))


def _dot(
    left: Array,
    right: Array,
    contracted: tuple[Sequence[int], Sequence[int]],
    batch: tuple[Sequence[int], Sequence[int]],
) -> Array:
    return jax.lax.dot_general(left, right, (contracted, batch), precision=jax.lax.Precision.HIGHEST)


class _Sizes:
    """Kernels put together by the size of their vectors."""

    def __init__(self, kernels: Sequence[Kernel]):
        self.stacks = [kernel.stack_shape for kernel in kernels]
        groups: dict[int, list[int]] = {}
        for index, kernel in enumerate(kernels):
            groups.setdefault(kernel.max_rank, []).append(index)
        self.groups = list(groups.values())

    def group(self, values: Sequence[Array]) -> list[Array]:
        """One ``[*stack, ...]`` per kernel -> one ``[matrices, ...]`` per size."""
        flat = [v.reshape(-1, *v.shape[len(stack) :]) for v, stack in zip(values, self.stacks, strict=True)]
        return [jnp.concatenate([flat[i] for i in group]) for group in self.groups]

    def split(self, values: Array) -> list[Array]:
        """One number per matrix, all together -> one ``[matrices, ...]`` per size."""
        counts = [sum(math.prod(self.stacks[i]) for i in group) for group in self.groups]
        return jnp.split(values, np.cumsum(counts)[:-1])

    def ungroup(self, values: Sequence[Array]) -> list[Array]:
        """The inverse of :meth:`group`."""
        found: dict[int, Array] = {}
        for group, value in zip(self.groups, values, strict=True):
            parts = jnp.split(value, np.cumsum([math.prod(self.stacks[i]) for i in group])[:-1])
            found |= {i: p.reshape(*self.stacks[i], *p.shape[1:]) for i, p in zip(group, parts, strict=True)}
        return [found[i] for i in range(len(self.stacks))]


def _unit_rows(rows: Rows) -> tuple[Rows, Float[Array, "matrices b"]]:
    """Rows at unit norm, and their norms; a row of zeros stays."""
    norms = jnp.linalg.norm(rows, axis=-1)
    return rows / jnp.where(norms > 0, norms, 1)[..., None], norms
