"""Layers of an NNX model taken out of it, one by one: what profiling measures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from cuttlefish_jax.flops import count_marked, mark
from cuttlefish_jax.kernels import Kernels
from cuttlefish_jax.nnx.find import Observer, shapes_of, trace
from cuttlefish_jax.profiling import LayerCall, as_function, layer_calls


@layer_calls.register
def _layer_calls_nnx(
    model: nnx.Module, kernels: Kernels, inputs: tuple, kwargs: dict[str, Any]
) -> tuple[LayerCall, ...]:
    seen: list[tuple[str, Any, jax.ShapeDtypeStruct, int]] = []
    equal: dict[tuple[Any, Any], nnx.Module] = {}

    def called(path: str, layer: Any, method: str, given: list[Any], result: Any) -> Any:
        if method != "__call__":
            return result
        # Modules are equal only to themselves: of equal layers, one stands for all.
        graphdef, state = nnx.split(layer)
        shapes = shapes_of(state)
        key = graphdef, tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(shapes))
        alone = equal.setdefault(key, nnx.merge(graphdef, shapes))
        (x,) = jax.tree.leaves(given)
        seen.append((path, alone, jax.ShapeDtypeStruct(x.shape, x.dtype), result.size))
        return mark(str(len(seen) - 1), result)

    # Elements of all turns of a loop and all mapped copies, by those of the one that was seen. Calls that a
    # transformation traced, but does not run, have none.
    marked = count_marked(trace(model, inputs, kwargs, kernels.keys(), Observer(called)))
    calls = defaultdict(list)
    for i, (path, layer, x, size) in enumerate(seen):
        count = marked[str(i)] // max(size, 1)
        calls[path].append(LayerCall(path=path, layer=layer, input=x, count=count))
    chosen = []
    for path in kernels:
        run = [call for call in calls[path] if call.count]
        # In a branch that another one outweighs, say.
        chosen += run or [
            LayerCall(path=path, layer=c.layer, input=c.input, count=1) for c in calls[path][-1:]
        ]
    return tuple(chosen)


@as_function.register
def _as_function_nnx(model: nnx.Module, x: jax.ShapeDtypeStruct) -> tuple[Callable[[Any, Any], Any], Any]:
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return lambda params, x: nnx.merge(graphdef, params, rest)(x), shapes_of(params)
