"""Calibration of Linen models: the calls of their layers are intercepted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import core

from cuttlefish_jax.calibration import CallLog, Calls, calibrate, nothing_of, observed, of_kernels
from cuttlefish_jax.kernels import Kernel, kernel_array, unboxed
from cuttlefish_jax.layer_types import LAYER_TYPES
from cuttlefish_jax.linen.tracing import FLAG, Unique, trace, unbound


@calibrate.register
def _calibrate_linen(
    model: nn.Module, kernels: Mapping[str, Kernel], variables: Any, *inputs: Any, **kwargs: Any
) -> dict[str, jax.Array]:
    if "params" not in variables:
        raise ValueError(
            f"calibrate needs the model's variables, {{'params': params, ...}}, got {sorted(variables)}"
        )
    of_apply = ("rngs", "mutable")
    options = {name: value for name, value in kwargs.items() if name not in of_apply}
    calls = watch_calls(model, kernels, *inputs, **options)

    def nothing(params: Any) -> jax.Array:
        return observe(model, kernels, calls, {**variables, "params": params}, *inputs, **kwargs)

    gradients = jax.grad(nothing, allow_int=True)(variables["params"])
    return kernel_gradients(gradients, kernels, calls)


def watch_calls(model: nn.Module, kernels: Mapping[str, Kernel], *inputs: Any, **kwargs: Any) -> Calls:
    """What :func:`observe` has to know of a model's calls: from an abstract run, with no params."""
    log = CallLog()

    def intercept(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        if isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__" and args:
            log.normalised(args[0], context.module)
        result = next_fun(*args, **kwargs)
        if (path := _path(context, kernels)) is not None:
            log.called(path, result)
        return result

    trace(model, inputs, kwargs, intercept)
    return log.calls()


def observe(
    model: nn.Module, kernels: Mapping[str, Kernel], calls: Calls, variables: Any, *inputs: Any, **kwargs: Any
) -> jax.Array:
    """Zero; its gradient by the params is, in the places of the kernels, their calibration."""
    inside: list[str] = []  # the layer that is called once more, for its offset

    def intercept(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        result, path = next_fun(*args, **kwargs), _path(context, kernels)
        if path is None or inside:
            return result
        layer, kernel = context.module, kernels[path]
        inside.append(path)
        (x,) = jax.tree.leaves((args, kwargs))
        offset = layer.clone(parent=None, name=None).apply(layer.variables, jnp.zeros_like(x))
        inside.pop()
        return observed(result, offset, unboxed(layer.variables["params"][kernel.param]), kernel, calls)

    return nothing_of(_run(model, intercept, variables, *inputs, **kwargs))


def kernel_gradients(gradients: Any, kernels: Mapping[str, Kernel], calls: Calls) -> dict[str, jax.Array]:
    """The calibration by the gradient of :func:`observe`."""
    return of_kernels(lambda kernel: kernel_array(gradients, kernel), kernels, calls)


def _path(context: Any, kernels: Mapping[str, Kernel]) -> str | None:
    """Of the layer that is called, if it is one of the kernels' and multiplies by its kernel."""
    layer_type = LAYER_TYPES.get(type(context.module))
    if layer_type is None or layer_type.lookup or context.method_name != "__call__":
        return None
    path = "/".join(context.module.path)
    return path if path in kernels else None


def _run(model: nn.Module, intercept: Callable, variables: Any, *inputs: Any, **kwargs: Any) -> Any:
    method = unbound(model, kwargs.pop("method", None))
    rngs, mutable = kwargs.pop("rngs", None), kwargs.pop("mutable", False)
    apply = core.apply(
        lambda scope: method(model.clone(parent=scope), *inputs, **kwargs),
        mutable=mutable,
        flags={FLAG: Unique()},
    )
    with nn.intercept_methods(intercept):
        return apply(variables, rngs=rngs)
