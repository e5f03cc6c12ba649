"""Puts two layers in the place of one in an NNX model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cuttlefish_jax.factorize import factorize, factorize_params
from cuttlefish_jax.kernels import Kernel, subtree
from cuttlefish_jax.layer_types import LAYER_TYPES
from cuttlefish_jax.nnx.find import is_setting, join
from cuttlefish_jax.nnx.params import from_boxes, is_abstract, run, to_boxes
from cuttlefish_jax.plan.plan import FactorizationPlan, check_plan


class Factorized(nnx.Module):
    """A layer replaced by two, or three with an extra batch norm; made by :func:`cuttlefish_jax.factorize`.

    Attributes:
      u: maps the layer's input to ``rank`` features.
      v: maps these to the layer's output; it has the bias.
      norm: between the two, if the plan has extra batch norms; otherwise ``None``.
      settings: the layer's own, ``(name, value)``, which can be read as its attributes could be.
    """

    def __init__(
        self, u: Any, v: Any, norm: nnx.BatchNorm | None = None, settings: tuple[tuple[str, Any], ...] = ()
    ):
        self.u, self.v, self.norm, self.settings = u, v, norm, settings

    def __getattr__(self, name: str) -> Any:
        for setting, value in vars(self).get("settings", ()):
            if setting == name:
                return value
        raise AttributeError(f"a factorized layer has no {name!r}")

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """As the layer's own call; ``out_sharding``, if given, is that of the output."""
        hidden = self.u(inputs)
        if self.norm is not None:
            hidden = self.norm(hidden)
        return self.v(hidden, **kwargs)


class FactorizedEmbed(Factorized):
    """The same of an embedding."""

    def attend(self, query: Any, **kwargs: Any) -> Any:
        """``query`` times the transpose of the table, as tied heads do: ``(query V^T) U^T``."""
        query, kernel = self.v.promote_dtype((query, self.v.kernel[...]), dtype=self.v.dtype)
        return self.u.attend(query @ kernel.T, **kwargs)


@factorize.register
def _factorize_nnx(
    model: nnx.Module, plan: FactorizationPlan, *, calibration: Mapping[str, Any] | None = None
) -> Any:
    check_plan(plan)
    copy = nnx.clone(model)
    layers = {join(keys): node for keys, node in nnx.iter_graph(copy) if isinstance(node, nnx.Module)}
    kernels: dict[str, Any] = {}
    for path in plan.ranks:
        _insert(kernels, path, _kernel_of(layers.get(path), plan.kernels[path]))
    low = from_boxes(run(factorize_params, to_boxes(kernels), plan, calibration=calibration), {})
    evaluates = any(
        getattr(layer, name, False)
        for kind, name in ((nnx.BatchNorm, "use_running_average"), (nnx.Dropout, "deterministic"))
        for layer in layers.values()
        if isinstance(layer, kind)
    )

    def replace(keys: tuple[Any, ...], node: Any) -> Any:
        path = join(keys)
        if path not in plan.ranks or not isinstance(node, nnx.Module):
            return node
        return _factors(node, subtree(low, path), plan.ranks[path], evaluates)

    return nnx.recursive_map(replace, copy)


def _kernel_of(layer: Any, kernel: Kernel) -> dict[str, Any]:
    other = "the plan was made for another model"
    if layer is None:
        raise ValueError(f"{other}: this one has no layer {kernel.path!r}")
    if isinstance(layer, Factorized):
        raise ValueError(f"the layer {kernel.path!r} is factorized already: merge its params first")
    layer_type = LAYER_TYPES.get(type(layer))
    name = layer_type.name_of(layer) if layer_type else type(layer).__name__
    if layer_type is None or name != kernel.layer:
        raise ValueError(f"{other}: {kernel.path!r} is a {name}, in the plan a {kernel.layer}")
    variable = getattr(layer, kernel.param)
    if tuple(variable.shape) != kernel.shape:
        has = f"the {kernel.param} at {kernel.path!r} has shape {tuple(variable.shape)}"
        raise ValueError(f"{other}: {has}, expected {kernel.shape}")
    return {kernel.param: variable}


def _insert(tree: dict[str, Any], path: str, value: Mapping[str, Any]) -> None:
    for key in path.split("/") if path else ():
        tree = tree.setdefault(key, {})
    tree.update(value)


def _factors(layer: Any, low: Mapping[str, Any], rank: int, evaluates: bool) -> Factorized:
    layer_type = LAYER_TYPES[type(layer)]
    # Copies that share the layer's own Variables: its bias, for one, which may be that of another layer, too.
    u = _changed(layer, layer_type.first(layer, rank))
    if hasattr(u, "use_bias"):
        u.use_bias = False
    if hasattr(u, "bias"):
        u.bias = nnx.data(None)
    setattr(u, layer_type.param, low["u"][layer_type.param])
    second = layer_type.second(layer, rank)
    make: Any = layer_type.second_type
    v = nnx.eval_shape(lambda: make(**second, rngs=nnx.Rngs(0))) if make else _changed(layer, second)
    v.kernel = low["v"]["kernel"]
    norm = None
    if "norm" in low:
        norm = _norm(low["norm"], rank, getattr(layer, "dtype", None))
        norm.use_running_average = evaluates  # as .eval() has left the model, or .train()
    settings = tuple((name, value) for name, value in vars(layer).items() if is_setting(name, value))
    return (FactorizedEmbed if layer_type.lookup else Factorized)(u, v, norm, settings)


def _changed(layer: Any, fields: Mapping[str, Any]) -> Any:
    copy = nnx.clone(layer, variables=False)
    for name, value in fields.items():
        setattr(copy, name, value)
    return copy


def _norm(params: Mapping[str, Any], rank: int, dtype: Any) -> nnx.BatchNorm:
    norm = nnx.eval_shape(lambda: nnx.BatchNorm(rank, momentum=0.9, dtype=dtype, rngs=nnx.Rngs(0)))
    scale = params["scale"]
    norm.scale, norm.bias = nnx.Param(scale), nnx.Param(params["bias"])
    for name, make in (("mean", jnp.zeros_like), ("var", jnp.ones_like)):
        fresh = jax.eval_shape(make, scale) if is_abstract(scale) else make(scale)
        setattr(norm, name, nnx.BatchStat(fresh))
    return norm
