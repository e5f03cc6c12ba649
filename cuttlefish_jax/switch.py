"""The switch: a training state of the full-rank model becomes one of the factorized model."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import MaskedNode

from cuttlefish_jax import moments
from cuttlefish_jax.factorize import copied, factorize, factorize_batch_stats, factorize_params
from cuttlefish_jax.kernels import kernel_array
from cuttlefish_jax.plan.plan import FactorizationPlan

# What the fields of optax's states that have the structure of the params mean: there is no other mark of it.
_LINEAR = ("trace", "mu", "ema", "acc_grads", "momentum", "m", "m1", "m2", "exp_avg", "grad_sum")
_SQUARES = ("nu", "nu_max", "sum_of_squares", "v", "e_g", "exp_avg_sq", "grad_sum_sq")
_AVERAGES = ("z", "params", "slow", "fast", "x0", "params0", "init_params", "cache")
_PROJECTIONS = {
    **dict.fromkeys((*_LINEAR, "previous_gradient"), moments.project_momentum),
    **dict.fromkeys(_SQUARES, moments.project_second_moment),
    **dict.fromkeys(_AVERAGES, moments.project_average),
}
# Where they mean something else.
_OF_TYPE = {
    "ScaleByAdanState": {
        **dict.fromkeys(("v", "g"), moments.project_momentum),
        "n": moments.project_second_moment,
    },
    "ScaleBySimplifiedAdEMAMixState": {"n": moments.project_second_moment},
    "MadgradState": {"s": moments.project_momentum},
}


@functools.singledispatch
def switch(
    state: Any,
    plan: FactorizationPlan,
    tx: optax.GradientTransformation,
    *,
    apply_fn: Callable[..., Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
) -> Any:
    """Turns a training state into the factorized model's, losing nothing that can be kept.

    Params are factorized; the optimizer's state is carried into factor space (:func:`carry_opt_state`);
    whatever else has the structure of the params, a field or a part of one, is taken for a moving average of
    them and projected; ``batch_stats`` get entries for extra batch norms; step, random keys and all else
    stay.

    Args:
      state: a ``flax.training.train_state.TrainState``, or any dataclass with ``params``, ``opt_state``,
        ``tx``, ``apply_fn`` and ``replace``. Of an NNX model, the tuple ``(model, optimizer)`` with its
        ``nnx.Optimizer``; ``nnx.EMA`` objects may follow.
      plan: made for the model.
      tx: the optimizer of the low-rank phase, usually the same chain.
      apply_fn: the factorized model's apply function; by default ``factorize(model, plan).apply`` of the
        model whose bound ``apply`` is ``state.apply_fn``.
      calibration: see :func:`factorize_params`.

    Returns:
      ``state.replace(...)``; of a tuple, a tuple of new objects: the factorized model, its optimizer, the
      averages.

    Raises:
      ValueError: if ``state`` is no such state, if ``state.apply_fn`` is not a model's bound ``apply`` and
        ``apply_fn`` is not given, or if the params do not fit the plan.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax, cuttlefish_jax as cf
      >>> from flax.training.train_state import TrainState
      >>> model, x, tx = nn.Dense(6), jnp.ones((1, 8)), optax.sgd(0.1, momentum=0.9)
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
      >>> plan = cf.FactorizationPlan.from_ranks(cf.find_kernels(model, x), {"": 2})
      >>> state = cf.switch(state, plan, tx)
      >>> state.apply_fn({"params": state.params}, x).shape
      (1, 6)
      >>> from flax import nnx
      >>> model = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> model, optimizer = cf.switch((model, optimizer), plan, tx)
      >>> model.u.kernel.shape
      (8, 2)
    """
    _check_state(state)
    if apply_fn is None:
        model = getattr(state.apply_fn, "__self__", None)
        if model is None:
            raise ValueError(
                "state.apply_fn is not a model's bound apply: pass switch(..., apply_fn=low.apply)"
            )
        apply_fn = factorize(model, plan).apply
    params = factorize_params(state.params, plan, calibration=calibration)
    changes: dict[str, Any] = dict(params=params, tx=tx, apply_fn=apply_fn)
    changes["opt_state"] = carry_opt_state(state.opt_state, state.params, params, tx, plan)
    for field in dataclasses.fields(state):
        value = getattr(state, field.name)
        if field.name == "batch_stats":
            changes[field.name] = factorize_batch_stats(value, plan)
        elif field.name not in changes:
            changes[field.name] = _averages(value, field.name, state.params, params, plan)
    return state.replace(**changes)


def _check_state(state: Any) -> None:
    needed = ("params", "opt_state", "tx", "apply_fn", "replace")
    missing = [name for name in needed if not hasattr(state, name)]
    if missing or not dataclasses.is_dataclass(state):
        lacks = f"it has no {missing[0]}" if missing else "it is no dataclass"
        raise ValueError(
            f"switch needs a training state, or (model, nnx.Optimizer), got {type(state).__name__}: {lacks}"
        )


def carry_opt_state(
    opt_state: Any,
    params: Any,
    params_low: Any,
    tx: optax.GradientTransformation,
    plan: FactorizationPlan,
) -> Any:
    """The optimizer's state at the switch, in factor space.

    Every part of the state that has the structure of the params is mapped, first moments exactly, second
    moments approximately (:mod:`cuttlefish_jax.moments`); counters and hyper-parameters are kept. ``tx`` may
    differ from the optimizer that made ``opt_state``: parts are matched by the type of their transformation
    and their order, so transformations can be added or dropped. Constants of ``optax.inject_hyperparams`` are
    the old ones, then. The norms of ``optax.adamax``, in a state of Adam's type, are taken for mean squares.

    Args:
      opt_state: the state of any optax chain over ``params``.
      params: the full-rank params; for ``optax.lookahead``, its pair of them.
      params_low: ``factorize_params(params, plan)``; or the pair of these.
      tx: the low-rank phase's optimizer. Its masks and labels are functions of the params, or one value for
        each layer: trees made for the full-rank params do not fit.
      plan: the plan.

    Returns:
      A state of the structure of ``tx.init(params_low)``. What could not be mapped is as ``tx.init`` made it,
      and a warning names it.
    """

    def is_params_like(node: Any) -> bool:
        return _as_params(node, params) is not None

    def can_project(node: Any) -> bool:
        # Not the rows' sums of a factored second moment, or one number for a layer.
        kernels = [(path, kernel_array(node, plan.kernels[path])) for path in plan.ranks]
        return all(
            isinstance(leaf, MaskedNode) or jnp.shape(leaf) == plan.kernels[path].shape
            for path, leaf in kernels
        )

    given = params_low
    if isinstance(params, optax.LookaheadParams):  # whose fast half the optimizer inside sees
        params, params_low = params.fast, params_low.fast
    nodes = dict(_named_leaves((opt_state,), is_params_like))
    old: dict[tuple[str, ...], Any] = {}
    for name, node in nodes.items():
        if (part := _as_params(node, params)) is None:
            old[name] = node
            continue
        if (projection := _projection(name)) and can_project(part):
            if projection is moments.project_second_moment:
                # Adam's: the mean of the same gradients, which tells how they are correlated. AdaBelief's
                # squares are of what the gradients have beside it.
                is_around_mean = name[-2:-1] and name[-2].startswith("ScaleByBeliefState")
                mean = None if is_around_mean else _as_params(nodes.get((*name[:-1], "mu")), params)
                projection = functools.partial(projection, momentum=mean)
            part = projection(part, params_low, plan)
        old.update(_named_leaves(part, prefix=name))  # unprojected: what belongs to unchanged layers is kept

    fresh, treedef = jax.tree.flatten(tx.init(given))
    names = [name for name, _ in _named_leaves((jax.tree.unflatten(treedef, fresh),))]
    fits = [
        name in old and jnp.shape(old[name]) == jnp.shape(leaf)
        for name, leaf in zip(names, fresh, strict=True)
    ]
    _warn_of_lost(["/".join(name) for name, fit in zip(names, fits, strict=True) if not fit], plan)
    return jax.tree.unflatten(
        treedef,
        [
            _as_dtype_of(leaf, old[name]) if fit else leaf
            for name, leaf, fit in zip(names, fresh, fits, strict=True)
        ],
    )


def _averages(value: Any, name: str, params: Any, params_low: Any, plan: FactorizationPlan) -> Any:
    """A field of a training state, in which all that is like the params is an average of them."""
    params = copied(params)

    def is_like_params(node: Any) -> bool:
        return isinstance(node, Mapping) and jax.tree.structure(copied(node)) == jax.tree.structure(params)

    leaves, treedef = jax.tree.flatten(value, is_leaf=is_like_params)
    for index, node in enumerate(leaves):
        if not is_like_params(node):
            continue
        if _kinds(node) != _kinds(params):
            warnings.warn(
                f"state.{name} is left as it is, for the full-rank params: it has their structure, but not "
                "their shapes and types",
                stacklevel=4,  # beyond singledispatch
            )
            continue
        average = moments.project_average(copied(node), params_low, plan)
        # Of extra batch norms no average has seen anything: it starts from the params' own.
        leaves[index] = _with_missing(average, params_low) if plan.extra_batch_norm else average
    return jax.tree.unflatten(treedef, leaves)


def _kinds(tree: Any) -> list[tuple[tuple[int, ...], bool]]:
    """The shape of every leaf, and whether it has floats."""
    leaves = jax.tree.leaves(tree)
    return [(jnp.shape(leaf), jnp.issubdtype(jnp.result_type(leaf), jnp.floating)) for leaf in leaves]


def _projection(name: tuple[str, ...]) -> Callable[..., Any] | None:
    """How a part of an optimizer's state that has the structure of the params is mapped, if at all."""
    *_, kind, field = ("", "", *name)
    return _OF_TYPE.get(kind.partition("#")[0], {}).get(field) or _PROJECTIONS.get(field)


def _named_leaves(
    node: Any, is_leaf: Callable[[Any], bool] = lambda _: False, prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The leaves of an optimizer state in tree order, with names that survive a change of the chain.

    A part of a chain is named by its type (and the type of what it wraps) and its place among those of its
    type, however the chain is nested; fields and keys by their names.
    """
    if is_leaf(node):
        yield prefix, node
    elif isinstance(node, tuple) and not hasattr(node, "_fields"):
        seen: Counter[str] = Counter()
        for part in _parts(node):
            kind = _kind(part)
            yield from _named_leaves(part, is_leaf, (*prefix, f"{kind}#{seen[kind]}"))
            seen[kind] += 1
    elif isinstance(node, tuple):
        for field in node._fields:  # pyright: ignore[reportAttributeAccessIssue]
            value = getattr(node, field)
            inner = (value,) if isinstance(value, tuple) else value
            yield from _named_leaves(inner, is_leaf, (*prefix, field))
    elif isinstance(node, dict):
        for key in sorted(node):
            yield from _named_leaves(node[key], is_leaf, (*prefix, str(key)))
    else:
        for path, leaf in jax.tree_util.tree_flatten_with_path(node)[0]:
            yield (*prefix, *map(str, path)), leaf


def _parts(chain: tuple[Any, ...]) -> Iterator[Any]:
    for part in chain:
        if isinstance(part, tuple) and not hasattr(part, "_fields"):
            yield from _parts(part)
        else:
            yield part


def _kind(state: Any) -> str:
    parts = [_kind(part) for part in _parts((getattr(state, "inner_state", ()),))]
    return type(state).__name__ + (f"({','.join(parts)})" if parts else "")


def _as_dtype_of(leaf: Any, old: Any) -> Any:
    dtype = jnp.result_type(leaf)
    return old if jnp.issubdtype(dtype, jax.dtypes.extended) else jnp.asarray(old, dtype)


def _as_params(node: Any, params: Mapping[str, Any]) -> Any:
    """``node`` with a leaf for every param, if it has their structure; else ``None``.

    A mask may be a prefix of the params: one ``MaskedNode`` then stands for all params of a layer.
    """

    def is_masked(node: Any) -> bool:
        return isinstance(node, MaskedNode)

    def spread(leaf: Any, part: Any) -> Any:
        return jax.tree.map(lambda _: leaf, part) if is_masked(leaf) else leaf

    if not isinstance(node, Mapping):
        return None
    try:
        tree = jax.tree.map(spread, node, params, is_leaf=is_masked)
    except ValueError:
        return None
    unmasked = jax.tree.map(lambda _: 0, tree, is_leaf=is_masked)
    return tree if jax.tree.structure(unmasked) == jax.tree.structure(params) else None


def _warn_of_lost(lost: list[str], plan: FactorizationPlan) -> None:
    # Extra batch norms are new at the switch: there is no state of theirs to lose.
    norms = [f"/{path}/norm/" for path in plan.ranks] if plan.extra_batch_norm else []
    lost = [name for name in lost if not any(norm in name for norm in norms)]
    if lost:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        warnings.warn(
            f"optimizer state re-initialised at the switch: {', '.join(lost[:5])}{more}", stacklevel=3
        )


def _with_missing(tree: Mapping[str, Any], template: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _with_missing(tree.get(key, {}), value)
        if isinstance(value, Mapping)
        else tree[key]
        if key in tree
        else jnp.copy(value)  # a train step that donates its state needs every array to be there once
        for key, value in template.items()
    }
