"""Finds the kernels of a Linen model, in an abstract run of its ``init``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.core import meta

from cuttlefish_jax.flops import count_marked, mark
from cuttlefish_jax.kernels import Kernel, Kernels, find_kernels, insert_axes, subtree
from cuttlefish_jax.layer_types import LAYER_TYPES, refuse_dtype
from cuttlefish_jax.linen.tracing import is_array, trace

_PROBE = "cuttlefish_probe"
_ATTEND = ":attend"
# Collections that say nothing of how a layer computes: its params, and what looks at it.
_OBSERVED = ("params", "intermediates", "perturbations")
_REPARAMETERISED = (nn.WeightNorm, nn.SpectralNorm)


@struct.dataclass
class _Stacked(meta.AxisMetadata):
    """A box that notes the axes which ``scan`` and ``vmap`` add to what is in it."""

    value: Any
    added: tuple[int, ...] = struct.field(pytree_node=False, default=())

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> Any:
        return dataclasses.replace(self, value=val)

    def add_axis(self, index: int, params: Mapping[Any, Any]) -> Any:
        return dataclasses.replace(self, added=(*self.added, index))

    def remove_axis(self, index: int, params: Mapping[Any, Any]) -> Any:
        return dataclasses.replace(self, added=self.added[:-1])


@dataclasses.dataclass
class _Findings:
    """What one abstract run of the model saw."""

    include_embeddings: bool
    layers: dict[str, Any] = dataclasses.field(default_factory=dict)  # path -> layer, in call order
    refused: dict[str, str] = dataclasses.field(default_factory=dict)  # path -> reason
    owners: dict[str, type] = dataclasses.field(default_factory=dict)  # path -> type of any module
    ndims: dict[str, int] = dataclasses.field(default_factory=dict)  # param -> its axes, in one copy
    wrappers: list[str] = dataclasses.field(default_factory=list)  # reparameterising modules now running
    embedding_first: bool = False  # an embedding ran before any of the layers

    def intercept(self, next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext):
        layer, method = context.module, context.method_name
        if layer.scope is None:
            return next_fun(*args, **kwargs)
        path = "/".join(layer.path)
        self.owners.setdefault(path, type(layer))
        is_wrapper = isinstance(layer, _REPARAMETERISED)
        if is_wrapper:
            self.wrappers.append(type(layer).__name__)
        if isinstance(layer, nn.Embed) and method == "__call__" and not self.layers:
            self.embedding_first = True
        result = next_fun(*args, **kwargs)
        if is_wrapper:
            self.wrappers.pop()
        own = layer.variables.get("params", {})
        for name, leaf in own.items():
            if not isinstance(leaf, Mapping):
                self.ndims[f"{path}/{name}"] = jnp.ndim(meta.unbox(leaf))
        layer_type = LAYER_TYPES.get(type(layer))
        if layer_type is None or method not in ("__call__", "attend" if layer_type.lookup else ""):
            return result
        if reason := self._reason(layer, layer_type, (args, kwargs)):
            self.refused[path] = reason
            return result
        if layer_type.param not in own:
            return result  # factorized already: its factors have the kernels
        self.layers.setdefault(path, layer)
        # Beside the kernel, and of its shape, in a box that tells which axes are added on the way out.
        # In every call: a transformation may throw away what its first trace made.
        probe = _Stacked(jnp.zeros(meta.unbox(own[layer_type.param]).shape))
        layer.scope.push(_PROBE, reuse=True).param("probe", lambda key: probe, unbox=False)
        return mark(path if method == "__call__" else path + _ATTEND, result)

    def _reason(self, layer: Any, layer_type: Any, arguments: Any) -> str | None:
        if self.wrappers:
            return f"its kernel is computed by {self.wrappers[-1]}"
        if reason := layer_type.refuse(layer):
            return reason
        if layer_type.lookup and not self.include_embeddings:
            return "an embedding: find_kernels(..., include_embeddings=True) finds it"
        if len(jax.tree.leaves(arguments)) > 1:
            return "called with more than one array"
        if layer_type.param not in (own := layer.variables.get("params", {})):
            return None  # factorized already
        for collection, variables in layer.variables.items():
            if collection not in _OBSERVED and jax.tree.leaves(variables):
                return f"it has variables of its own in {collection!r}"
        return refuse_dtype(layer_type.param, meta.unbox(own[layer_type.param]).dtype)

    def why_not(self, path: str) -> str:
        """Why the layer at a path, which has a kernel, is not among those found."""
        keys = path.split("/")
        for depth in range(len(keys), 0, -1):  # or a layer that it is inside of
            if reason := self.refused.get("/".join(keys[:depth])):
                return reason
        owner = self.owners.get(path)
        if owner is None:
            return "not a layer of a type that can be factorized"
        base = next((base.__name__ for base in owner.__mro__[1:] if base in LAYER_TYPES), None)
        if base is not None:
            return f"{owner.__name__} may do more than {base}: cf.register_layer says what it does"
        return f"{owner.__name__} is not a type that can be factorized"


@find_kernels.register
def _find_kernels_linen(
    model: nn.Module, *inputs: Any, include_embeddings: bool = False, **kwargs: Any
) -> Kernels:
    found = _Findings(include_embeddings)
    jaxpr, params = trace(model, inputs, kwargs, found.intercept)
    arrays = [leaf for leaf in jax.tree.leaves((inputs, kwargs)) if is_array(leaf)]
    batch = arrays[0].shape[0] if arrays and arrays[0].ndim else 1
    elements = {name: number // max(batch, 1) for name, number in count_marked(jaxpr).items()}
    entries = []
    for path, layer in found.layers.items():
        box = subtree(params, f"{path}/{_PROBE}".lstrip("/"))["probe"]
        entries.append(_kernel(path, layer, box, elements))
    own = {name: leaf for name, leaf in _named_params(params) if _PROBE not in name.split("/")}
    return Kernels(
        entries=tuple(entries),
        skipped_entries=tuple(dict(_skipped(own, found)).items()),
        num_params=sum(leaf.size for leaf in own.values()),
        embedding_first=found.embedding_first,
    )


def _named_params(params: Any) -> Iterator[tuple[str, Any]]:
    for keys, leaf in jax.tree.leaves_with_path(params):
        # The keys that are not of dicts are those of boxes.
        yield "/".join(str(key.key) for key in keys if hasattr(key, "key")), leaf


def _kernel(path: str, layer: Any, box: _Stacked, elements: Mapping[str, int]) -> Kernel:
    layer_type = LAYER_TYPES[type(layer)]
    shape = tuple(box.value.shape)
    own, stack = insert_axes(len(shape) - len(box.added), box.added)
    axes = layer_type.axes(layer)
    kernel = Kernel(
        path=path,
        layer=layer_type.name_of(layer),
        shape=shape,
        reduction_axes=tuple(own[a] for a in axes.reduction),
        output_axes=tuple(own[a] for a in axes.output),
        stack_axes=tuple(sorted((*(own[a] for a in axes.batch), *stack))),
        stack_indices=(*axes.batch, *box.added),
        param=layer_type.param,
    )
    copies = math.prod(kernel.stack_shape)
    outputs = elements.get(path, 0) // (kernel.n * copies)
    attended = elements.get(path + _ATTEND, 0) // (kernel.m * copies)
    if layer_type.lookup:
        return dataclasses.replace(kernel, positions=attended, lookups=outputs or (attended == 0))
    return dataclasses.replace(kernel, positions=max(1, outputs))


def _skipped(params: Mapping[str, Any], found: _Findings) -> Iterator[tuple[str, str]]:
    kernels = {f"{path}/{LAYER_TYPES[type(layer)].param}".lstrip("/") for path, layer in found.layers.items()}
    for name, leaf in params.items():
        path, _, key = name.rpartition("/")
        if found.ndims.get(f"{path}/{key}", jnp.ndim(leaf)) < 2 or name in kernels:
            continue
        if key == "bias" and (path in found.layers or f"{path}/kernel".lstrip("/") in params):
            continue  # of [heads, features], for one: it goes with its kernel
        if key == "kernel" or path in found.refused:
            yield path, found.why_not(path)
        else:
            owner = found.owners.get(path)
            yield name, f"not a kernel, but a parameter of {owner.__name__ if owner else 'the model'}"
