r"""Carries what an optimizer remembers of a kernel into factor space.

With the factors frozen at their values at the switch, :math:`W = U V`, the gradients of the factors are
linear in the kernel's: :math:`g_U = G V^T`, :math:`g_V = U^T G`. So :math:`M V^T` and :math:`U^T M` are
exactly the momenta that would have gathered, had the model been factorized all along. Second moments map
approximately, by the squares of the factors, and as much larger as the first moment shows entries of one
gradient to be correlated; a moving average of parameters is projected on the rows that
the new factor :math:`V` spans, so that it and the parameters are coordinates in one basis.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from optax import MaskedNode

from cuttlefish_jax.factorize import factor_arrays, factor_sides, factor_specs, shape_factors, split_layers
from cuttlefish_jax.kernels import Kernel, kernel_array
from cuttlefish_jax.matrices import gram, map_matrices, tensordot
from cuttlefish_jax.meshes import on_any_mesh, spec_of
from cuttlefish_jax.plan.plan import FactorizationPlan

Params = Mapping[str, Any]


def project_momentum(tree: Params, params_low: Params, plan: FactorizationPlan) -> dict[str, Any]:
    """Maps a tree that is linear in the gradient: ``M -> (M V^T, U^T M)``; exact for frozen factors."""
    return _project(tree, params_low, plan, _momenta)


def project_second_moment(
    tree: Params, params_low: Params, plan: FactorizationPlan, *, momentum: Params | None = None
) -> dict[str, Any]:
    r"""Maps a mean of squared gradients: ``S -> (S (V^2)^T, (U^2)^T S)``, exact for uncorrelated entries.

    The entries of one gradient are correlated, and what the factors see of them adds up: along the leading
    singular vectors to many times that, and Adam's steps would be as much too large until its average has
    forgotten. The first moment :math:`M`, which maps exactly, shows by how much: column ``j`` of
    :math:`S (V^2)^T` is multiplied by :math:`\|M V_j^T\|^2 / \sum M^2 (V_j^2)^T`, rows of the other factor
    alike. As ``M`` is but one sum of gradients, whose chance must not make steps large, the outcome is no
    less than what follows from the mean alone, :math:`(S - M^2)(V^2)^T + (M V^T)^2` (LDAdam).

    Args:
      tree: means of squared gradients in the structure of the full-rank params.
      params_low: the factorized params.
      plan: the plan.
      momentum: means of the gradients themselves, of any decay; None takes the entries as uncorrelated.

    Returns:
      The tree in the structure of ``params_low``.

    References:
      Robert et al., `LDAdam <https://arxiv.org/abs/2410.16103>`_, ICLR 2025: the mean apart.
    """
    if momentum is None:
        return _project(tree, params_low, plan, _second_moments)
    return _project(tree, params_low, plan, _correlated_second_moments, momentum)


def project_average(tree: Params, params_low: Params, plan: FactorizationPlan) -> dict[str, Any]:
    """Maps an average of params, ``W -> (W V^+, V)``: the nearest product that has the params' own ``V``."""
    return _project(tree, params_low, plan, _averages)


# Of one matrix in its own axes: w and m ``[*rows, *columns]``, u ``[*rows, r]``, v ``[r, *columns]``.


def _momentum(w, u, v):
    rows, columns = range(u.ndim - 1), range(1, v.ndim)
    return tensordot(w, v, (range(u.ndim - 1, w.ndim), columns)), tensordot(u, w, (rows, rows))


def _second_moment(w, u, v):
    return _momentum(w, jnp.square(u), jnp.square(v))


def _correlated_second_moment(w, u, v, m):
    square = jnp.square(m)
    apart = _second_moment(jnp.maximum(w - square, 0), u, v)

    def corrected(axes, uncorrelated, of_mean, expected, apart):
        found, expected = (jnp.sum(x, axes, keepdims=True) for x in (jnp.square(of_mean), expected))
        ratio = found / jnp.where(expected > 0, expected, jnp.inf)
        return jnp.maximum(uncorrelated * ratio, apart + jnp.square(of_mean))

    parts = _second_moment(w, u, v), _momentum(m, u, v), _second_moment(square, u, v), apart
    of_u, of_v = zip(*parts, strict=True)
    return corrected(range(u.ndim - 1), *of_u), corrected(range(1, v.ndim), *of_v)


def _average(w, inverse, v):
    return tensordot(w, inverse, v.ndim - 1), v


# Of all layers: path -> (w, u, v, what else there is), all in float32 and stacked.


def _of_each(split: Callable) -> Callable:
    return lambda sides, plan: {
        path: _each(split, plan.kernels[path])(*arrays) for path, arrays in sides.items()
    }


_momenta = _of_each(_momentum)
_second_moments = _of_each(_second_moment)
_correlated_second_moments = _of_each(_correlated_second_moment)


def _averages(sides, plan: FactorizationPlan):
    rows = {path: v for path, (_, _, v) in sides.items()}
    inverses = _pseudo_inverses(rows, plan)
    return _of_each(_average)({path: (sides[path][0], inverses[path], v) for path, v in rows.items()}, plan)


def _pseudo_inverses(rows, plan: FactorizationPlan):
    """``V^+`` of every ``V``, ``[*stack, *columns, r]``."""
    # Rows of V that stand for vanishing singular values, or were rounded to bfloat16, are not orthogonal.
    invert = functools.partial(jnp.linalg.pinv, rtol=1e-6, hermitian=True)
    grams = [_each(lambda v: gram(v, range(1, v.ndim)), plan.kernels[path])(v) for path, v in rows.items()]
    found = zip(rows.items(), map_matrices(invert, grams), strict=True)
    return {
        path: _each(lambda v, inverse: tensordot(v, inverse, ([0], [0])), plan.kernels[path])(v, inverse)
        for (path, v), inverse in found
    }


def _each(fn: Callable, kernel: Kernel) -> Callable:
    """A function of one copy's matrices as one of all that a layer has."""
    for _ in kernel.stack_axes:
        fn = jax.vmap(fn)
    return fn


def _project(
    tree: Params, params_low: Params, plan: FactorizationPlan, split: Callable, *others: Params
) -> dict[str, Any]:
    """Every kernel's place in ``tree`` split by ``split``; what is masked in it is so in ``others``, too."""
    factors, given = factor_arrays(params_low, plan), {}
    for path, pair in factors.items():
        leaf, *more = (kernel_array(other, plan.kernels[path]) for other in (tree, *others))
        if not isinstance(leaf, MaskedNode):
            given[path] = (leaf, *pair, *more)
    halves = _split_all(given, plan, split)
    return split_layers(tree, plan, lambda path, leaf: halves.get(path, (leaf, leaf)))


@functools.partial(jax.jit, static_argnames=("plan", "split"))
def _split_all(given, plan: FactorizationPlan, split: Callable):
    def run(given):
        sides = {}
        for path, (leaf, u, v, *more) in given.items():
            kernel = plan.kernels[path]
            arrays = (
                kernel.to_sides(leaf),
                *factor_sides(u, v, kernel, plan.ranks[path]),
                *map(kernel.to_sides, more),
            )
            sides[path] = tuple(array.astype(jnp.float32) for array in arrays)
        return {
            path: shape_factors(halves, plan.kernels[path], given[path][0].dtype)
            for path, halves in split(sides, plan).items()
        }

    specs = {path: factor_specs(plan.kernels[path], spec_of(leaf)) for path, (leaf, *_) in given.items()}
    return on_any_mesh(run, given, out_specs=specs)
