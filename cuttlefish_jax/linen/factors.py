"""The two layers that stand in the place of one, inside its scope."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax

from cuttlefish_jax.kernels import Kernel, insert_axes, is_box, reboxed
from cuttlefish_jax.layer_types import LAYER_TYPES, LayerType

# Fresh factors get the default initializer: the layer's own may be of a fixed shape, or zeros.
_INIT = nn.initializers.lecun_normal()


def make_factors(layer: Any, kernel: Kernel, rank: int) -> tuple[Any, Any]:
    """The factors of a layer, in scopes of its own: of what it is called with, nothing else is known.

    Args:
      layer: bound.
      kernel: its kernel in the model, stack axes included.
      rank: of the factors.
    """
    layer_type = LAYER_TYPES[type(layer)]
    u_init, v_init = _initializers(layer, layer_type, kernel)
    fresh = {layer_type.initializer: u_init} if layer_type.initializer else {}
    u_scope, v_scope = (layer.scope.push(name, reuse=True) for name in "uv")
    u = layer.clone(name="u", parent=u_scope, **fresh, **layer_type.first(layer, rank))
    second = dict(name="v", parent=v_scope, **layer_type.second(layer, rank))
    if layer_type.second_type is not None:
        return u, layer_type.second_type(kernel_init=v_init, **second)
    fresh = {layer_type.initializer: v_init} if layer_type.initializer else {}
    return u, layer.clone(**fresh, **second)


def call_factors(
    layer: Any, factors: tuple[Any, Any], extra_batch_norm: bool, args: tuple, kwargs: dict
) -> Any:
    """What the layer gives, by its factors."""
    u, v = factors
    hidden = u(*args, **kwargs)
    if extra_batch_norm:
        if LAYER_TYPES[type(layer)].axes(layer).batch:
            raise _no_norm(layer, "it has batch axes")
        # A layer is not told whether it trains; that its statistics may change says the same.
        norm = nn.BatchNorm(
            use_running_average=not layer.is_mutable_collection("batch_stats"),
            momentum=0.9,
            dtype=getattr(layer, "dtype", None),
            name="norm",
            parent=layer.scope.push("norm", reuse=True),
        )
        hidden = norm(hidden)
    if LAYER_TYPES[type(layer)].lookup:
        return v(hidden, "...r,rd->...d")
    return v(hidden)


def attend(layer: Any, factors: tuple[Any, Any], extra_batch_norm: bool, query: Any) -> Any:
    """``query`` times the transpose of the table, as tied heads do: ``(query V^T) U^T``."""
    if extra_batch_norm:
        raise _no_norm(layer, "it is also a head (attend)")
    u, v = factors
    return u.attend(v(query, "...d,rd->...r"))


def _no_norm(layer: Any, reason: str) -> ValueError:
    return ValueError(f"{'/'.join(layer.path)!r} cannot have an extra batch norm: {reason}")


def _initializers(layer: Any, layer_type: LayerType, kernel: Kernel) -> tuple[Callable, Callable]:
    """Those of the factors: with the sharding metadata that the layer's own gives, the rank unsharded."""
    if layer_type.initializer is None or not layer.is_mutable_collection("params"):
        return _INIT, _INIT
    one = _one_copy(kernel, len(layer_type.axes(layer).batch))
    init = getattr(layer, layer_type.initializer)
    box = jax.eval_shape(lambda: init(jax.random.key(0), one.shape, layer.param_dtype))
    if not is_box(box):
        return _INIT, _INIT
    names = (*box.names, *(None,) * (len(one.shape) - len(box.names)))
    u_names, v_names = one.factor_names(names)
    return _in_box(box, u_names), _in_box(box, v_names)


def _in_box(box: Any, names: Sequence[Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: reboxed(box, _INIT(*args, **kwargs), names)


def _one_copy(kernel: Kernel, num_batch_axes: int) -> Kernel:
    """The kernel without the axes that transformations of the layer added."""
    indices = kernel.stack_axes if kernel.stack_indices is None else kernel.stack_indices
    added = insert_axes(len(kernel.shape) - len(indices), indices)[1][num_batch_axes:]
    own = [a for a in range(len(kernel.shape)) if a not in added]
    return dataclasses.replace(
        kernel,
        shape=tuple(kernel.shape[a] for a in own),
        reduction_axes=tuple(own.index(a) for a in kernel.reduction_axes),
        output_axes=tuple(own.index(a) for a in kernel.output_axes),
        stack_axes=tuple(own.index(a) for a in kernel.stack_axes if a not in added),
        stack_indices=indices[:num_batch_axes],
    )
