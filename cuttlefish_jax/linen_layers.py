"""Layers of a Linen model taken out of it, one by one: what profiling measures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from cuttlefish_jax.flops import count_marked, mark
from cuttlefish_jax.kernels import Kernels
from cuttlefish_jax.linen import LAYER_TYPES, trace
from cuttlefish_jax.profiling import LayerCall, as_function, layer_calls

# One for all layers: how its params were drawn does not make a layer another one.
_INITS = {"kernel_init": nn.initializers.lecun_normal(), "bias_init": nn.initializers.zeros_init()}


@layer_calls.register
def _layer_calls_linen(
    model: nn.Module, kernels: Kernels, inputs: tuple, kwargs: dict[str, Any]
) -> tuple[LayerCall, ...]:
    seen: list[tuple[str, Any, jax.ShapeDtypeStruct, int]] = []

    def intercept(next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext):
        layer = context.module
        result = next_fun(*args, **kwargs)
        if context.method_name != "__call__" or type(layer) not in LAYER_TYPES or layer.scope is None:
            return result
        if (path := "/".join(layer.path)) not in kernels:
            return result
        (x,) = jax.tree.leaves((args, kwargs))
        alone = layer.clone(name=None, parent=None, **_INITS)
        seen.append((path, alone, jax.ShapeDtypeStruct(x.shape, x.dtype), result.size))
        return mark(str(len(seen) - 1), result)

    # Elements of all turns of a loop and all mapped copies, by those of the one that was seen. Calls that a
    # transformation traced, but does not run, have none.
    marked = count_marked(trace(model, inputs, kwargs, intercept)[0])
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
def _as_function_linen(model: nn.Module, x: jax.ShapeDtypeStruct) -> tuple[Callable[[Any, Any], Any], Any]:
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    return lambda params, x: model.apply({"params": params}, x), params
