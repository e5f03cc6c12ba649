"""Finds the kernels of an NNX model: an abstract run of a copy whose layers report their calls."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeAlias

import jax
from flax import nnx
from jax.extend import core

from cuttlefish_jax.flops import count_marked, mark
from cuttlefish_jax.kernels import Kernel, Kernels, find_kernels, insert_axes
from cuttlefish_jax.layer_types import LAYER_TYPES, refuse_dtype

# Their parameters are vectors, whatever axes scan and vmap have given them.
_NORMS = (nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.InstanceNorm)


@dataclasses.dataclass(eq=False)
class Observer:
    """What an abstract run of a model reports to; told apart by identity, as NNX wants it of static fields.

    Attributes:
      called: of a layer's path, the layer (its params as they are inside ``scan`` and ``vmap``), the name of
        the method, all that it was called with, and its result; returns the result.
      read: of a layer's path and the name of an attribute that was read from outside.
    """

    called: Callable[[str, Any, str, list[Any], Any], Any]
    read: Callable[[str, str], None] = lambda path, name: None


class _Watched(nnx.Module):
    """Stands in a layer's place, and reports its calls."""

    def __init__(self, layer: Any, path: str, observer: Observer):
        self.layer, self.path, self.observer = layer, path, observer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call("__call__", args, kwargs)

    def attend(self, *args: Any, **kwargs: Any) -> Any:
        return self._call("attend", args, kwargs)

    def _call(self, method: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        result = getattr(self.layer, method)(*args, **kwargs)
        given = (*args, *(value for name, value in kwargs.items() if name != "out_sharding"))
        return self.observer.called(
            self.path, self.layer, method, [value for value in given if value is not None], result
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("layer", "path", "observer"):
            raise AttributeError(name)
        value = getattr(self.layer, name)
        if not is_setting(name, value):
            self.observer.read(self.path, name)
        return value


def is_setting(name: str, value: Any) -> bool:
    """Whether an attribute of a layer is one of its settings, as its number of features is, and no data."""
    return not name.startswith("_") and not nnx.is_data(value)


def trace(
    model: nnx.Module,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    paths: Collection[str],
    observer: Observer,
) -> core.Jaxpr:
    """The traced program of a call of the :func:`watched` model. Nothing is computed.

    Args:
      model: any NNX module, abstract ones included; it is not changed.
      inputs: arrays or ``jax.ShapeDtypeStruct``, and whatever else it is called with.
      kwargs: the same; ``method`` is the name of one of the model's methods, or a function of the model.
      paths: of the layers to watch.
      observer: told of their calls.
    """
    graphdef, state = nnx.split(watched(model, paths, observer))
    # Flags (train=False) and the method must stay Python values; only arrays are traced.
    leaves, treedef = jax.tree.flatten((inputs, dict(kwargs)))
    traced = [i for i, leaf in enumerate(leaves) if is_array(leaf)]

    def run(state: Any, *arrays: Any) -> Any:
        filled = {**dict(enumerate(leaves)), **dict(zip(traced, arrays, strict=True))}
        args, options = jax.tree.unflatten(treedef, [filled[i] for i in range(len(leaves))])
        call = bound(nnx.merge(graphdef, state), options.pop("method", None))
        output = call(*args, **options)
        # With the output, lest JAX drops from the program what nothing depends on.
        return [leaf for leaf in jax.tree.leaves(output) if isinstance(leaf, jax.Array)]

    return jax.make_jaxpr(run)(shapes_of(state), *(leaves[i] for i in traced)).jaxpr


def watched(model: nnx.Module, paths: Collection[str], observer: Observer) -> nnx.Module:
    """A copy of the model in which the layers at ``paths`` report; each is now at its path and ``layer``."""

    def watch(keys: tuple[Any, ...], node: Any) -> Any:
        is_layer = isinstance(node, nnx.Module) and join(keys) in paths
        return _Watched(node, join(keys), observer) if is_layer else node

    return nnx.recursive_map(watch, nnx.clone(model))


def bound(model: Any, method: Any) -> Callable[..., Any]:
    """What is called of a model: itself, or the method of a name, or one given as a function."""
    if method is None:
        return model
    if isinstance(method, str):
        return getattr(model, method)
    return functools.partial(getattr(method, "__func__", method), model)


def shapes_of(tree: Any) -> Any:
    """The tree with shapes and dtypes for its arrays."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def join(path: tuple[Any, ...]) -> str:
    """A path in an NNX model as one string."""
    return "/".join(map(str, path))


def is_array(leaf: Any) -> bool:
    """Whether ``leaf`` is an array or the shape and dtype of one."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


_Shapes: TypeAlias = Mapping[str, tuple[int, ...]]  # param -> its shape


@find_kernels.register
def _find_kernels_nnx(
    model: nnx.Module, *inputs: Any, include_embeddings: bool = False, **kwargs: Any
) -> Kernels:
    graph = _Graph(model)
    reasons = {path: reason for path in graph.layers if (reason := graph.refuse(path)) is not None}
    watched = {path for path, layer in graph.layers.items() if path not in reasons or _is_lookup(layer)}
    calls: list[str] = []
    shapes: dict[str, _Shapes] = {}  # of a layer's params as it sees them inside scan and vmap

    def called(path: str, layer: Any, method: str, given: list[Any], result: Any) -> Any:
        calls.append(path)
        if path in reasons:
            return result
        if len(given) > 1:
            reasons[path] = "it is called with more than one argument"
        shapes.setdefault(path, _shapes(layer))
        return mark(f"{path}:{method}", result)

    def read(path: str, name: str) -> None:
        reasons.setdefault(path, f"its {name} is read outside of its calls")

    jaxpr = trace(model, inputs, kwargs, watched, Observer(called, read))
    arrays = [leaf for leaf in jax.tree.leaves((inputs, kwargs)) if is_array(leaf)]
    batch = arrays[0].shape[0] if arrays and arrays[0].ndim else 1
    elements = count_marked(jaxpr)
    entries = []
    for path, layer in graph.layers.items():
        if path not in shapes and path not in reasons:
            reasons[path] = f"{type(layer).__name__} that is not called"
        elif _is_lookup(layer) and not include_embeddings:
            reasons.setdefault(path, "an embedding: found with include_embeddings=True")
    is_leading = _copies_lead(graph.layers, shapes)
    for path, seen in shapes.items():
        if path in reasons:
            continue
        try:
            kernel = _kernel(path, graph.layers[path], seen, is_leading=is_leading)
        except ValueError as error:
            reasons[path] = str(error)
            continue
        copies = max(batch, 1) * math.prod(kernel.stack_shape)
        applied = elements[f"{path}:__call__"] // (copies * kernel.n)
        if _is_lookup(graph.layers[path]):
            attended = elements[f"{path}:attend"] // (copies * kernel.m)
            kernel = dataclasses.replace(kernel, positions=attended, lookups=applied)
        else:
            kernel = dataclasses.replace(kernel, positions=max(1, applied))
        entries.append(kernel)
    found = {kernel.path for kernel in entries}
    first = next((path for path in calls if path in found or _is_lookup(graph.layers[path])), None)
    return Kernels(
        entries=tuple(entries),
        skipped_entries=tuple(dict(graph.skipped(found, reasons)).items()),
        num_params=sum(math.prod(leaf.shape) for leaf in graph.params.values()),
        embedding_first=first is not None and first not in found,
    )


def _is_lookup(layer: Any) -> bool:
    layer_type = LAYER_TYPES.get(type(layer))
    return layer_type.lookup if layer_type else isinstance(layer, nnx.Embed)


def _shapes(layer: Any) -> _Shapes:
    """The shapes of a layer's own params."""
    return {name: tuple(value.shape) for name, value in vars(layer).items() if isinstance(value, nnx.Param)}


def _kernel(path: str, layer: Any, seen: _Shapes, *, is_leading: bool) -> Kernel:
    """The kernel of a layer whose calls see its params in the shapes ``seen``.

    Raises:
      ValueError: if the axes that ``scan`` and ``vmap`` take away cannot be told.
    """
    layer_type = LAYER_TYPES[type(layer)]
    shapes = _shapes(layer)
    shape = shapes[layer_type.param]
    stack = _removed(layer_type.param, shapes, seen, is_leading=is_leading)
    final, _ = insert_axes(len(seen[layer_type.param]), stack)
    axes = layer_type.axes(layer)
    batch = tuple(final[a] for a in axes.batch)
    return Kernel(
        path=path,
        layer=layer_type.name_of(layer),
        shape=shape,
        reduction_axes=tuple(final[a] for a in axes.reduction),
        output_axes=tuple(final[a] for a in axes.output),
        stack_axes=tuple(sorted((*stack, *batch))),
        stack_indices=(*axes.batch, *stack),
        param=layer_type.param,
    )


def _removed(param: str, shapes: _Shapes, seen: _Shapes, *, is_leading: bool) -> tuple[int, ...]:
    """The axes of a layer's ``param`` that are missing where the layer sees it.

    Where its sizes do not tell, those of the layer's other params may, which the same copies have been made
    of: an axis is the same one counted from the front, or from the back. Where these do not either, they are
    the leading ones, as ``nnx.vmap`` and ``nnx.scan`` have it by default, if ``is_leading``.
    """

    def from_back(axes: tuple[int, ...], name: str) -> tuple[int, ...]:
        return tuple(a - len(shapes[name]) for a in axes)

    found = _candidates(shapes[param], seen[param])
    for name in seen.keys() - {param}:
        others = _candidates(shapes[name], seen[name])
        backwards = [from_back(axes, name) for axes in others]
        found = [axes for axes in found if axes in others or from_back(axes, param) in backwards]
    leading = tuple(range(len(shapes[param]) - len(seen[param])))
    if len(found) > 1 and is_leading and leading in found:
        return leading
    if len(found) != 1:
        raise ValueError(
            f"its {param} of shape {shapes[param]} is called as {seen[param]}: which axes are copies?"
        )
    return found[0]


def _candidates(shape: tuple[int, ...], seen: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Which axes may be the missing ones, by the sizes of all others."""
    return [
        axes
        for axes in itertools.combinations(range(len(shape)), len(shape) - len(seen))
        if tuple(size for a, size in enumerate(shape) if a not in axes) == seen
    ]


def _copies_lead(layers: Mapping[str, Any], seen: Mapping[str, _Shapes]) -> bool:
    """Whether no param of a layer has its copies, for sure, anywhere but on the leading axes."""
    for path, of_layer in seen.items():
        shapes = _shapes(layers[path])
        for name, inside in of_layer.items():
            leading = tuple(range(len(shapes[name]) - len(inside)))
            if leading not in _candidates(shapes[name], inside):
                return False
    return True


class _Graph:
    """What a model is made of.

    Attributes:
      layers: path -> layer, of every layer of a registered type, and every embedding.
      params: path -> ``nnx.Param``.
    """

    def __init__(self, model: nnx.Module):
        self.params = {join(path): leaf for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
        self.layers: dict[str, Any] = {}
        self._types: dict[str, str] = {}
        self._norms: set[str] = set()
        self._holders: defaultdict[int, set[str]] = defaultdict(set)
        for keys, node in nnx.iter_graph(model):
            if not isinstance(node, nnx.Module):
                continue
            path = join(keys)
            self._types[path] = type(node).__name__
            if type(node) in LAYER_TYPES or isinstance(node, nnx.Embed):
                self.layers[path] = node
            if isinstance(node, _NORMS):
                self._norms.add(path)
            for value in vars(node).values():
                if isinstance(value, nnx.Variable):
                    self._holders[id(value)].add(path)

    def refuse(self, path: str) -> str | None:
        """Why the layer at ``path`` cannot be factorized, as far as the graph tells."""
        layer = self.layers[path]
        if type(layer) not in LAYER_TYPES:
            return f"{type(layer).__name__} is not a type that can be factorized"
        layer_type = LAYER_TYPES[type(layer)]
        for around, other in self.layers.items():
            if not f"{path}/".startswith(f"{around}/".lstrip("/")) or type(other) not in LAYER_TYPES:
                continue
            if (reason := LAYER_TYPES[type(other)].refuse(other)) is not None:
                return reason
        kernel = getattr(layer, layer_type.param)
        if others := self._holders[id(kernel)] - {path}:
            return f"its {layer_type.param} is also that of {min(others)!r}"
        if not isinstance(kernel, nnx.Param):
            return f"its {layer_type.param} is no nnx.Param, but a {type(kernel).__name__}"
        return refuse_dtype(layer_type.param, kernel.dtype)

    def skipped(self, found: Collection[str], reasons: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        """``(path, reason)`` of all else that has two or more axes."""
        for name, leaf in self.params.items():
            path, _, key = name.rpartition("/")
            if len(leaf.shape) < 2 or path in found or path in self._norms:
                continue
            owner = self._types.get(path, "the model")
            if path in reasons:
                yield path, reasons[path]
            elif key == "kernel":
                yield path, f"{owner} is not a type that can be factorized"
            elif key != "bias" or f"{path}/kernel".lstrip("/") not in self.params:
                yield name, f"not a kernel, but a parameter of {owner}"
