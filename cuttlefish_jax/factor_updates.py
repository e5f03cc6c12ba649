"""What transformations of an optax chain that know of factors have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import optax

from cuttlefish_jax.factorize import factor_matrices
from cuttlefish_jax.kernels import reboxed, subtree, unboxed
from cuttlefish_jax.params import unwrap
from cuttlefish_jax.plan.plan import FactorizationPlan

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    # path -> the two matrices of a factorized layer
    Pairs: TypeAlias = Mapping[str, tuple[Float[Array, "*stack m r"], Float[Array, "*stack r n"]]]


def transform_factors(
    name: str, plan: FactorizationPlan, change: Callable[[Pairs, Pairs], Pairs]
) -> optax.GradientTransformation:
    """A stateless transformation that changes the updates of factors and passes all others.

    Args:
      name: of the transformation, for its errors.
      plan: the plan that the params were factorized with.
      change: ``(factors, updates) -> updates``, of all layers, as matrices.

    Returns:
      A transformation of updates of Linen's params or of an ``nnx.State``; its ``update`` needs ``params``.
    """

    def update(updates: Any, params: Any = None) -> Any:
        if params is None:
            raise ValueError(f"{name} needs params: call tx.update(updates, state, params)")
        params, (updates, rewrap) = unwrap(params)[0], unwrap(updates)
        changed = change(factor_matrices(params, plan), factor_matrices(updates, plan))
        for path, pair in changed.items():
            for kernel, matrix in zip(plan.kernels[path].factors(plan.ranks[path]), pair, strict=True):
                box = subtree(updates, kernel.path)[kernel.param]
                new = kernel.from_matrix(matrix).astype(unboxed(box).dtype)
                updates = _with_leaf(updates, [*kernel.path.split("/"), kernel.param], reboxed(box, new))
        return rewrap(updates)

    return optax.stateless(update)


def _with_leaf(tree: Any, keys: list[str], value: Any) -> Any:
    key, *inner = keys
    return {**tree, key: _with_leaf(tree[key], inner, value) if inner else value}
