"""Products in full precision, and functions of many matrices in one program: traced once for each shape."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from cuttlefish_jax.kernels import Kernel

# Of float32. Compilers divide by a number by multiplying with its reciprocal, taken for zero where that
# is subnormal. Entries that are divided by no more than this are still below 4.
LARGEST_DIVISOR = 2.0**126


# In full precision, which products of float32 do not have everywhere.
matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def tensordot(a: Array, b: Array, axes: int | tuple[Sequence[int], Sequence[int]]) -> Array:
    """``jnp.tensordot`` in full precision."""
    axes = axes if isinstance(axes, int) else (tuple(axes[0]), tuple(axes[1]))
    return jnp.tensordot(a, b, axes, precision=jax.lax.Precision.HIGHEST)


def gram(w: Float[Array, "*m *n"], contracted: Sequence[int]) -> Float[Array, "k k"]:
    """The scalar products of a matrix's columns, if its axes of rows are contracted, or of its rows."""
    k = math.prod(size for axis, size in enumerate(w.shape) if axis not in contracted)
    return tensordot(w, w, (contracted, contracted)).reshape(k, k)


def scaled(w: Array) -> tuple[Array, Float[Array, ""]]:
    """``w`` with its largest entry scaled to 1, that no square overflows or vanishes; and the scale."""
    scale = jnp.max(jnp.abs(w))
    scale = jnp.minimum(jnp.where(scale > 0, scale, 1), LARGEST_DIVISOR)
    return w / scale, scale


def map_matrices(
    fn: Callable[[Float[Array, "m n"]], Any], matrices: Sequence[Float[Array, "*stack m n"]]
) -> list[Any]:
    """``fn`` of every matrix.

    Args:
      fn: takes one matrix and returns an array or a pytree of arrays.
      matrices: of any shapes, stacked or not, all of one dtype.

    Returns:
      For each of ``matrices`` what ``fn`` returned, its arrays stacked by ``*stack``.

    Example:
      >>> import jax.numpy as jnp
      >>> [x.tolist() for x in map_matrices(jnp.trace, [jnp.eye(2), jnp.ones((2, 3, 3))])]
      [2.0, [3.0, 3.0]]
    """
    return _map(lambda matrix, _: fn(matrix), matrices, [(2, 1)] * len(matrices))


def map_sides(
    fn: Callable[..., Any], arrays: Sequence[Array], kernels: Sequence[Kernel], *others: Sequence[Array]
) -> list[Any]:
    """``fn`` of every kernel's matrix in its own axes, which a kernel that is split over devices needs.

    Args:
      fn: takes one matrix as ``[*rows, *columns]``, the number of its axes of rows, and what there is of
        ``others``; returns an array or a pytree of arrays.
      arrays: the kernels as :meth:`Kernel.to_sides` gives them, ``[*stack, *rows, *columns]``, all of one
        dtype.
      kernels: what their axes are.
      *others: more arrays for each, ``[*stack, ...]``, whose shapes follow from the kernel's.

    Returns:
      For each of ``arrays`` what ``fn`` returned, its arrays stacked by ``*stack``.
    """
    sides = [(len(k.reduction_axes) + len(k.output_axes), len(k.reduction_axes)) for k in kernels]
    return _map(fn, arrays, sides, *others)


def _map(
    fn: Callable[..., Any],
    matrices: Sequence[Array],
    sides: Sequence[tuple[int, int]],
    *others: Sequence[Array],
) -> list[Any]:
    """``fn(matrix, row axes, *others)`` of all, one after the other; ``sides``: their axes, and row axes."""
    groups: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for index, (matrix, (axes, rows)) in enumerate(zip(matrices, sides, strict=True)):
        groups.setdefault((matrix.shape[matrix.ndim - axes :], rows), []).append(index)
    results: dict[int, Any] = {}
    # One group after the other, and the first after all that makes the matrices. LAPACK calls that the CPU
    # backend of jaxlib 0.10 starts side by side, one on each thread of its pool, all wait for a free thread
    # of that pool: for ever, with two cores often.
    before: Any = sum(_first(matrix) for matrix in matrices)
    for (shape, rows), members in groups.items():
        stacks = [matrices[i].shape[: matrices[i].ndim - len(shape)] for i in members]
        flat = jnp.concatenate([matrices[i].reshape(-1, *shape) for i in members])
        # No number is greater than infinity, but the compiler orders the groups by it.
        flat += _first(before) > jnp.inf
        more = [
            jnp.concatenate(
                [
                    other[i].reshape(-1, *other[i].shape[len(s) :])
                    for i, s in zip(members, stacks, strict=True)
                ]
            )
            for other in others
        ]
        # Not vmap: XLA's CPU backend is up to twice as fast with one matrix after the other, each of which
        # stays in the cache for all of its steps, as with batched matrix-vector products.
        mapped = jax.lax.map(lambda given: fn(given[0], rows, *given[1:]), (flat, *more))  # noqa: B023
        before, start = jax.tree.leaves(mapped)[0], 0
        for index, stack in zip(members, stacks, strict=True):
            stop = start + math.prod(stack)
            here = slice(start, stop)
            results[index] = jax.tree.map(lambda x: x[here].reshape(*stack, *x.shape[1:]), mapped)  # noqa: B023
            start = stop
    return [results[index] for index in range(len(matrices))]


def _first(array: Array) -> Array:
    # Not of a reshaped array: all of it would be gathered.
    return array[(0,) * array.ndim]
