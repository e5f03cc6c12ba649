"""Layers of a Linen model taken out of it, one by one: what profiling measures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from cuttlefish_jax.flops import mark
from cuttlefish_jax.kernels import Kernels
from cuttlefish_jax.layer_types import LAYER_TYPES
from cuttlefish_jax.linen.tracing import trace
from cuttlefish_jax.profiling.timing import LayerCall, as_function, count_calls, layer_calls

# One for all layers: how its params were drawn does not make a layer another one.
_KERNEL_INIT, _BIAS_INIT = nn.initializers.lecun_normal(), nn.initializers.zeros_init()


@layer_calls.register
def _layer_calls_linen(
    model: nn.Module, kernels: Kernels, inputs: tuple, kwargs: dict[str, Any]
) -> tuple[LayerCall, ...]:
    seen: list[tuple[LayerCall, int]] = []  # and the elements of what it gives

    def intercept(next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext):
        layer, method = context.module, context.method_name
        result = next_fun(*args, **kwargs)
        if method not in ("__call__", "attend") or type(layer) not in LAYER_TYPES or layer.scope is None:
            return result
        if (path := "/".join(layer.path)) not in kernels:
            return result
        (x,) = jax.tree.leaves((args, kwargs))
        inits = {LAYER_TYPES[type(layer)].initializer: _KERNEL_INIT, "bias_init": _BIAS_INIT}
        alone = layer.clone(
            name=None,
            parent=None,
            **{field: init for field, init in inits.items() if hasattr(layer, str(field))},
        )
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        seen.append((LayerCall(path=path, layer=alone, input=shape, count=1, method=method), result.size))
        return mark(str(len(seen) - 1), result)

    return count_calls(kernels, seen, trace(model, inputs, kwargs, intercept)[0])


@as_function.register
def _as_function_linen(
    model: nn.Module, x: jax.ShapeDtypeStruct, *, method: str = "__call__"
) -> tuple[Callable[[Any, Any], Any], Any]:
    params = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, method=method), x)["params"]
    return lambda params, x: model.apply({"params": params}, x, method=method), params
