"""What transformations of an optax chain that know of factors have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import optax
from optax import MaskedNode

from cuttlefish_jax.factorize import as_matrices, factor_arrays
from cuttlefish_jax.kernels import reboxed, subtree
from cuttlefish_jax.meshes import as_spec, on_any_mesh, spec_of
from cuttlefish_jax.params import find_leaf, unwrap
from cuttlefish_jax.plan.plan import FactorizationPlan

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    # path -> the two matrices of a factorized layer
    Pairs: TypeAlias = Mapping[str, tuple[Float[Array, "*stack m r"], Float[Array, "*stack r n"]]]
    # The same in the shapes that they have in a tree.
    Arrays: TypeAlias = Mapping[str, tuple[Array, Array]]


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
      Layers that the optimizer does not change, those that ``optax.masked`` or the ``wrt`` of an
      ``nnx.Optimizer`` leave out, are left out here.
    """

    def update(updates: Any, params: Any = None) -> Any:
        if params is None:
            raise ValueError(f"{name} needs params: call tx.update(updates, state, params)")
        given, params, (updates, rewrap) = updates, unwrap(params)[0], unwrap(updates)
        seen = _optimized(updates, plan, is_filtered=updates is not given)
        old = factor_arrays(updates, seen)
        changed = _changed(change, factor_arrays(params, seen), old, seen)
        for path, pair in changed.items():
            for kernel, new in zip(plan.kernels[path].factors(plan.ranks[path]), pair, strict=True):
                box = subtree(updates, kernel.path)[kernel.param]
                updates = _with_leaf(updates, [*kernel.path.split("/"), kernel.param], reboxed(box, new))
        return rewrap(updates)

    return optax.stateless(update)


def _changed(
    change: Callable[[Pairs, Pairs], Pairs], factors: Arrays, updates: Arrays, plan: FactorizationPlan
) -> Arrays:
    """``change`` of arrays as they are in a tree, wherever they lie; the results lie where the updates do."""

    def run(factors: Arrays, updates: Arrays) -> Arrays:
        changed = {}
        for path, pair in change(as_matrices(factors, plan), as_matrices(updates, plan)).items():
            kernels = plan.kernels[path].factors(plan.ranks[path])
            changed[path] = tuple(
                kernel.from_matrix(new).astype(old.dtype)
                for kernel, new, old in zip(kernels, pair, updates[path], strict=True)
            )
        return changed

    specs = {path: tuple(as_spec(spec_of(update)) for update in pair) for path, pair in updates.items()}
    return on_any_mesh(run, factors, updates, out_specs=specs)


def _optimized(updates: Any, plan: FactorizationPlan, *, is_filtered: bool) -> FactorizationPlan:
    """The plan for those layers alone of which there are updates; the whole one if there are of none.

    Args:
      updates: nested dicts.
      plan: the plan.
      is_filtered: whether a layer may be missing, as those of a state that an ``nnx.Optimizer`` has filtered.
        From any other tree only what is masked is left out: params that lack a layer are another model's.
    """

    def is_optimized(path: str) -> bool:
        # Of one factor alone, or of the kernel itself, there is an error to come.
        kernel = plan.kernels[path]
        leaves = [find_leaf(updates, k) for k in (kernel, *kernel.factors(plan.ranks[path]))]
        if any(leaf is not None and not isinstance(leaf, MaskedNode) for leaf in leaves):
            return True
        return not is_filtered and all(leaf is None for leaf in leaves)

    seen = [path for path in plan.ranks if is_optimized(path)]
    return plan.restricted(seen, "not optimized") if seen else plan


def _with_leaf(tree: Any, keys: list[str], value: Any) -> Any:
    key, *inner = keys
    return {**tree, key: _with_leaf(tree[key], inner, value) if inner else value}
