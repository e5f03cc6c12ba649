"""The switch of an NNX model, its optimizer, and moving averages of its params."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax
from flax import nnx

from cuttlefish_jax.factorize import factorize
from cuttlefish_jax.moments import project_average
from cuttlefish_jax.nnx.params import check_values, to_dict
from cuttlefish_jax.params import find_leaf
from cuttlefish_jax.plan.plan import FactorizationPlan
from cuttlefish_jax.switch import carry_opt_state, switch


@switch.register
def _switch_nnx(
    state: tuple,
    plan: FactorizationPlan,
    tx: optax.GradientTransformation,
    *,
    calibration: Mapping[str, Any] | None = None,
) -> tuple[Any, ...]:
    expected = (nnx.Module, nnx.Optimizer, *(nnx.EMA,) * (len(state) - 2))
    if len(state) < 2 or not all(map(isinstance, state, expected)) or type(state[1]) is not nnx.Optimizer:
        kinds = ", ".join(type(part).__name__ for part in state)
        raise ValueError(f"switch needs (model, nnx.Optimizer), and nnx.EMAs if there are any, got ({kinds})")
    model, optimizer, *averages = state
    check_values(to_dict(nnx.state(model, nnx.Param)))
    low = factorize(model, plan, calibration=calibration)
    return low, _carried(model, optimizer, low, plan, tx), *(_projected(ema, low, plan) for ema in averages)


def _carried(
    model: nnx.Module,
    optimizer: nnx.Optimizer,
    low: nnx.Module,
    plan: FactorizationPlan,
    tx: optax.GradientTransformation,
) -> nnx.Optimizer:
    wrt, graph = optimizer.wrt, optimizer.graph
    params, params_low = (to_dict(nnx.state(module, wrt, graph=graph)) for module in (model, low))
    fresh = nnx.Optimizer(low, tx, wrt=wrt, graph=graph)
    # As nnx.Optimizer made it of Variables: masks and the like may look at these.
    init = optax.GradientTransformation(lambda params: _plain(fresh.opt_state), tx.update)
    opt_state = _plain(optimizer.opt_state)
    _fill(fresh.opt_state, carry_opt_state(opt_state, params, params_low, init, _restricted(plan, params)))
    fresh.step.set_value(optimizer.step.get_value())
    return fresh


def _projected(ema: nnx.EMA, low: nnx.Module, plan: FactorizationPlan) -> nnx.EMA:
    """The average of the factorized model's params; extra batch norms start from these."""
    params = to_dict(ema.params)
    fresh = nnx.EMA(low, ema.decay, only=ema.filter, graph=ema.graph)
    _fill(fresh.params, project_average(params, to_dict(fresh.params), _restricted(plan, params)))
    return fresh


@switch.register
def _switch_optimizer(state: nnx.Optimizer, *args: Any, **kwargs: Any) -> None:
    raise ValueError("an nnx.Optimizer does not hold its model: use switch((model, optimizer), plan, tx)")


def _plain(opt_state: Any) -> Any:
    """An optimizer's state without Variables, its params-like parts nested dicts."""

    def convert(node: Any) -> Any:
        if isinstance(node, nnx.State):
            return to_dict(node)
        return node.get_value() if isinstance(node, nnx.Variable) else node

    return jax.tree.map(convert, opt_state, is_leaf=lambda node: isinstance(node, (nnx.State, nnx.Variable)))


def _fill(variables: Any, tree: Any) -> None:
    """Gives Variables the values at their paths in ``tree``."""
    values = dict(_named(tree))
    for name, variable in _named(variables):
        if name in values:  # not those around an optax.MaskedNode
            variable.set_value(values[name])


def _named(tree: Any) -> list[tuple[tuple[str, ...], Any]]:
    """Leaves (Variables whole) with their paths, the indices of lists as strings."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, nnx.Variable))[
        0
    ]
    return [(tuple(jax.tree_util.keystr((key,), simple=True) for key in path), leaf) for path, leaf in leaves]


def _restricted(plan: FactorizationPlan, params: Mapping[str, Any]) -> FactorizationPlan:
    """The plan for those layers alone whose kernels the optimizer sees."""
    seen = [path for path in plan.ranks if find_leaf(params, plan.kernels[path]) is not None]
    return plan.restricted(seen, "not optimized")
