"""Layers of an NNX model taken out of it, one by one: what profiling measures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from cuttlefish_jax.flops import mark
from cuttlefish_jax.kernels import Kernels
from cuttlefish_jax.nnx.find import Observer, shapes_of, trace
from cuttlefish_jax.profiling.timing import LayerCall, as_function, count_calls, layer_calls


@layer_calls.register
def _layer_calls_nnx(
    model: nnx.Module, kernels: Kernels, inputs: tuple, kwargs: dict[str, Any]
) -> tuple[LayerCall, ...]:
    seen: list[tuple[LayerCall, int]] = []  # and the elements of what it gives
    equal: dict[tuple[Any, Any], nnx.Module] = {}

    def called(path: str, layer: Any, method: str, given: list[Any], result: Any) -> Any:
        # Modules are equal only to themselves: of equal layers, one stands for all.
        graphdef, state = nnx.split(layer)
        shapes = shapes_of(state)
        key = graphdef, tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(shapes))
        alone = equal.setdefault(key, nnx.merge(graphdef, shapes))
        (x,) = jax.tree.leaves(given)
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        seen.append((LayerCall(path=path, layer=alone, input=shape, count=1, method=method), result.size))
        return mark(str(len(seen) - 1), result)

    return count_calls(kernels, seen, trace(model, inputs, kwargs, kernels.keys(), Observer(called)))


@as_function.register
def _as_function_nnx(
    model: nnx.Module, x: jax.ShapeDtypeStruct, *, method: str = "__call__"
) -> tuple[Callable[[Any, Any], Any], Any]:
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return lambda params, x: getattr(nnx.merge(graphdef, params, rest), method)(x), shapes_of(params)
