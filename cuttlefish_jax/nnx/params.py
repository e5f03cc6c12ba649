"""Params of NNX models: their states as the nested dicts that the core works on, and back."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from cuttlefish_jax.factorize import factorize_params, merge_params
from cuttlefish_jax.params import unwrap
from cuttlefish_jax.plan.plan import FactorizationPlan

# Where a Variable's metadata has the names of its axes.
_NAMES = "out_sharding"


@dataclasses.dataclass(eq=False)
class _Like:
    """What a Variable is besides its value and the names of its axes; compared by identity.

    Attributes:
      type: its class.
      metadata: names of the axes included.
      placement: the mesh that its value lies on, and the mesh axes by the names of its own, if it has both.
    """

    type: type[nnx.Variable]
    metadata: dict[str, Any]
    placement: tuple[Any, dict[Any, Any]] | None = None


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["names", "like"])
@dataclasses.dataclass(frozen=True)
class _Box:
    """A Variable as the core sees it: an array, and the names of its axes."""

    value: Any
    names: tuple[Any, ...]
    like: _Like

    @classmethod
    def of(cls, variable: nnx.Variable) -> _Box:
        value, metadata = variable.get_value(), variable.get_metadata()
        names = metadata.get(_NAMES) or ()
        names = tuple(names.spec if isinstance(names, NamedSharding) else names)
        names += (None,) * (len(getattr(value, "shape", ())) - len(names))
        placement = None
        if metadata.get(_NAMES) and isinstance(sharding := getattr(value, "sharding", None), NamedSharding):
            placement = sharding.mesh, dict(zip(names, sharding.spec, strict=False))
        return cls(value, names, _Like(type(variable), metadata, placement))

    def variable(self) -> nnx.Variable:
        metadata = dict(self.like.metadata)
        if old := metadata.get(_NAMES):
            new: Any = self.names
            if isinstance(old, NamedSharding):
                new = NamedSharding(old.mesh, PartitionSpec(*new))
            elif isinstance(old, PartitionSpec):
                new = PartitionSpec(*new)
            metadata[_NAMES] = new
        value = self.value
        if self.like.placement and isinstance(value, jax.Array) and not isinstance(value, Tracer):
            mesh, axes = self.like.placement
            spec = PartitionSpec(*(axes.get(name) if name else None for name in self.names))
            value = jax.device_put(value, NamedSharding(mesh, spec))
        return self.like.type.from_metadata(value, metadata)


def to_dict(state: Mapping[Any, Any], leaf: Callable[[Any], Any] | None = None) -> dict[str, Any]:
    """A state as nested dicts of arrays; the indices of lists become strings, as they are in paths."""
    convert = leaf or _value
    return {
        str(key): to_dict(value, convert) if isinstance(value, Mapping) else convert(value)
        for key, value in state.items()
    }


def _value(leaf: Any) -> Any:
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def to_boxes(state: Mapping[Any, Any]) -> dict[str, Any]:
    """As :func:`to_dict`, but with Variables in boxes from which :func:`from_boxes` makes them again."""
    return to_dict(state, lambda leaf: _Box.of(leaf) if isinstance(leaf, nnx.Variable) else leaf)


def from_boxes(tree: Mapping[str, Any], old: Mapping[Any, Any]) -> dict[Any, Any]:
    """The inverse of :func:`to_boxes`, of a tree with some layers changed since it was made of ``old``."""
    names = {str(key): key for key in old}
    return {
        names.get(key, key): from_boxes(value, _mapping(old.get(names.get(key, key))))
        if isinstance(value, Mapping)
        else (value.variable() if isinstance(value, _Box) else value)
        for key, value in tree.items()
    }


def _mapping(node: Any) -> Mapping[Any, Any]:
    return node if isinstance(node, Mapping) else {}


def is_abstract(leaf: Any) -> bool:
    """Whether a param has a shape and a dtype, but no value yet."""
    return isinstance(leaf, jax.ShapeDtypeStruct)


def check_values(params: Mapping[str, Any], prefix: str = "") -> None:
    """Raises a ValueError for a param without a value."""
    for name, leaf in params.items():
        path = f"{prefix}/{name}".lstrip("/")
        if isinstance(leaf, Mapping):
            check_values(leaf, path)
        elif is_abstract(leaf):
            raise ValueError(f"the param {path!r} has no value: the model is abstract, initialise it first")


def run(
    transform: Callable[..., Any], params: dict[str, Any], plan: FactorizationPlan, **options: Any
) -> dict[str, Any]:
    """``transform(params, plan)``, of shapes and dtypes alone if ``params`` are abstract."""
    if any(map(is_abstract, jax.tree.leaves(params))):
        return jax.eval_shape(lambda params: transform(params, plan, **options), params)
    return transform(params, plan, **options)


@unwrap.register
def _unwrap_state(params: nnx.State) -> tuple[Mapping[str, Any], Callable[[Mapping[str, Any]], Any]]:
    plain = to_dict(params)
    check_values(plain)
    return plain, lambda tree: nnx.State(from_boxes(tree, params))


@unwrap.register
def _unwrap_model(params: nnx.Module) -> tuple[Mapping[str, Any], Callable[[Mapping[str, Any]], Any]]:
    return unwrap(nnx.state(params, nnx.Param))


def _register(transform: Any) -> None:
    def of_state(params: nnx.State, plan: FactorizationPlan, **options: Any) -> nnx.State:
        return nnx.State(from_boxes(run(transform, to_boxes(params), plan, **options), params))

    def of_model(model: nnx.Module, plan: FactorizationPlan, **options: Any) -> nnx.State:
        return of_state(nnx.state(model, nnx.Param), plan, **options)

    transform.register(nnx.State, of_state)
    transform.register(nnx.Module, of_model)


_register(factorize_params)
_register(merge_params)
