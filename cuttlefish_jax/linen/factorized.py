"""A Linen model with factors in the place of its layers.

The model is left alone: a wrapper shares its scope and intercepts the calls of the layers in the plan, which
then run two stock Flax layers, ``u`` and ``v``, inside the layer's own scope.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
from flax.core import freeze

from cuttlefish_jax.factorize import factorize
from cuttlefish_jax.kernels import check_kernel
from cuttlefish_jax.layer_types import LAYER_TYPES
from cuttlefish_jax.linen.factors import attend, call_factors, make_factors
from cuttlefish_jax.linen.tracing import FLAG, Unique, unbound
from cuttlefish_jax.plan.plan import FactorizationPlan, check_plan


@dataclasses.dataclass(frozen=True)
class _NotASubmodule:
    """Holds a module that Linen shall not register: it would reserve a name and change the paths below it."""

    module: nn.Module


class Factorized(nn.Module):
    """A model with some of its layers replaced by two factors each; made by :func:`cuttlefish_jax.factorize`.

    Attributes:
      full: holds :attr:`model`.
      plan: which of its layers are factorized.
    """

    full: _NotASubmodule
    plan: FactorizationPlan

    @property
    def model(self) -> nn.Module:
        """The unchanged full-rank model."""
        return self.full.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model."""
        return self._run(type(self.model).__call__, *args, **kwargs)

    @nn.nowrap
    def init_with_output(self, rngs: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """As the model's own; ``method`` is one of the model's."""
        return super().init_with_output(rngs, *args, method=self._via(method), **kwargs)

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """As the model's own; ``method`` is one of the model's."""
        return super().apply(variables, *args, method=self._via(method), **kwargs)

    @nn.nowrap
    def _via(self, method: Any) -> Callable[..., Any]:
        # Also of a method taken from an instance: it is called on the model inside this wrapper.
        function = unbound(self.model, method)
        return lambda self, *args, **kwargs: self._run(function, *args, **kwargs)

    @nn.nowrap
    def _run(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if (scope := self.scope) is None:
            raise ValueError("the model is not bound to params: use init, apply or bind")
        depth, plan, ranks = len(self.path), self.plan, self.plan.ranks

        def intercept(next_fun, args, kwargs, context):
            layer, method = context.module, context.method_name
            layer_type = LAYER_TYPES.get(type(layer))
            if layer_type is None or layer.scope is None or method not in ("__call__", "setup", "attend"):
                return next_fun(*args, **kwargs)
            path = "/".join(layer.path[depth:])
            if path not in ranks:
                return next_fun(*args, **kwargs)
            kernel, name = plan.kernels[path], layer_type.name_of(layer)
            if name != kernel.layer:
                raise ValueError(f"{path!r} is a {name}, in the plan a {kernel.layer}: another model's plan")
            if method == "setup":
                return None  # it would make the params that the factors replace
            factors = make_factors(layer, kernel, ranks[path])
            if method == "attend":
                return attend(layer, factors, plan.extra_batch_norm, *args, **kwargs)
            return call_factors(layer, factors, plan.extra_batch_norm, args, kwargs)

        # In this module's own scope, as if it were this module; afresh, so that it can be called again.
        inner = scope.rewound()
        inner.flags = freeze({**scope.flags, FLAG: Unique() if self.is_initializing() else hash(plan)})
        with nn.intercept_methods(intercept):
            result = method(self.model.clone(parent=inner), *args, **kwargs)
        if self.is_initializing() and method is type(self.model).__call__:
            self._check_factors()  # another method may leave some layers out
        return result

    @nn.nowrap
    def _check_factors(self) -> None:
        params = self.variables.get("params", {})
        for path, rank in self.plan.rank_entries:
            try:
                for factor in self.plan.kernels[path].factors(rank):
                    check_kernel(params, factor)
            except ValueError as error:
                raise ValueError(f"the plan was made for another model: {error}") from error


@factorize.register
def _factorize_linen(model: nn.Module, plan: FactorizationPlan, *, calibration: Any = None) -> Factorized:
    check_plan(plan)
    if calibration is not None:
        raise ValueError("a Linen module has no params: give the calibration to factorize_params or switch")
    if isinstance(model, Factorized):
        raise ValueError(
            "the model is factorized already: make a plan for its .model, and merge its params first"
        )
    return Factorized(full=_NotASubmodule(model.clone()), plan=plan)
