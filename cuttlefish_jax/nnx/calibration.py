"""Calibration of NNX models: a copy of the model, whose layers are watched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cuttlefish_jax.calibration import CallLog, calibrate, nothing_of, observed, of_kernels
from cuttlefish_jax.kernels import Kernel, subtree
from cuttlefish_jax.layer_types import LAYER_TYPES
from cuttlefish_jax.nnx.find import Observer, bound, join, watched
from cuttlefish_jax.nnx.params import to_dict


@calibrate.register
def _calibrate_nnx(
    model: nnx.Module, kernels: Mapping[str, Kernel], *inputs: Any, method: Any = None, **kwargs: Any
) -> dict[str, jax.Array]:
    norms = {join(keys): node for keys, node in nnx.iter_graph(model) if isinstance(node, nnx.BatchNorm)}
    log = CallLog()

    def multiplies(layer: Any, method: str) -> bool:
        return method == "__call__" and not LAYER_TYPES[type(layer)].lookup

    def watch(path: str, layer: Any, method: str, given: list[Any], result: Any) -> Any:
        if path in norms:
            log.normalised(given[0], norms[path])
        elif multiplies(layer, method):
            log.called(path, result)
        return result

    def observe(path: str, layer: Any, method: str, given: list[Any], result: Any) -> Any:
        if not multiplies(layer, method):
            return result
        kernel, offset = kernels[path], layer(jnp.zeros_like(given[0]))
        return observed(result, offset, getattr(layer, kernel.param)[...], kernel, calls)

    def function_of_params(paths: set[str], observer: Observer) -> tuple[Any, Any]:
        graphdef, params, rest = nnx.split(watched(model, paths, observer), nnx.Param, ...)

        def nothing(params: Any) -> jax.Array:
            return nothing_of(bound(nnx.merge(graphdef, params, rest), method)(*inputs, **kwargs))

        return nothing, params

    jax.eval_shape(*function_of_params({*kernels, *norms}, Observer(watch)))
    calls = log.calls()
    nothing, params = function_of_params({*kernels}, Observer(observe))
    gradients = to_dict(jax.grad(nothing, allow_int=True)(params))

    def gradient(kernel: Kernel) -> jax.Array:
        return subtree(gradients, f"{kernel.path}/layer".lstrip("/"))[kernel.param]

    return of_kernels(gradient, kernels, calls)
