"""Applies a function to many matrices in one program: traced once for each shape, one matrix at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# Of float32. Compilers divide by a number by multiplying with its reciprocal, taken for zero where that
# is subnormal. Entries that are divided by no more than this are still below 4.
LARGEST_DIVISOR = 2.0**126


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
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, matrix in enumerate(matrices):
        groups.setdefault(matrix.shape[-2:], []).append(index)
    results: dict[int, Any] = {}
    # One group after the other, and the first after all that makes the matrices. LAPACK calls that the CPU
    # backend of jaxlib 0.10 starts side by side, one on each thread of its pool, all wait for a free thread
    # of that pool: for ever, with two cores often.
    before: Any = sum(jnp.ravel(matrix)[0] for matrix in matrices)
    for shape, members in groups.items():
        stacks = [matrices[i].shape[:-2] for i in members]
        flat = jnp.concatenate([matrices[i].reshape(-1, *shape) for i in members])
        # No number is greater than infinity, but the compiler orders the groups by it.
        flat += jnp.ravel(before)[0] > jnp.inf
        # Not vmap: XLA's CPU backend is up to twice as fast with one matrix after the other, each of which
        # stays in the cache for all of its steps, as with batched matrix-vector products.
        mapped = jax.lax.map(fn, flat)
        before, start = jax.tree.leaves(mapped)[0], 0
        for index, stack in zip(members, stacks, strict=True):
            stop = start + math.prod(stack)
            here = slice(start, stop)
            results[index] = jax.tree.map(lambda x: x[here].reshape(*stack, *x.shape[1:]), mapped)  # noqa: B023
            start = stop
    return [results[index] for index in range(len(matrices))]
