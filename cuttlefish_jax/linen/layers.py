"""The layer types of Flax Linen."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import numpy as np

# register_layer knows Flax modules by this front end.
import cuttlefish_jax.linen.finding  # noqa: F401
from cuttlefish_jax.einsum import einsum_factors, read_einsum
from cuttlefish_jax.kernels import KernelAxes
from cuttlefish_jax.layer_types import LayerType, register_layer


def _features(layer: Any, rank: int) -> dict[str, Any]:
    return {"features": rank, "use_bias": False}


def _refuse_mask(layer: Any) -> str | None:
    return "convolution with a mask" if layer.mask is not None else None


def _refuse_conv(layer: nn.Conv) -> str | None:
    if layer.feature_group_count != 1:
        return f"grouped convolution ({layer.feature_group_count} groups)"
    return _refuse_mask(layer)


def _conv_axes(layer: Any) -> KernelAxes:
    window = np.size(layer.kernel_size)
    features = (window, window + 1)
    reduction, output = reversed(features) if getattr(layer, "transpose_kernel", False) else features
    return KernelAxes(reduction=(*range(window), reduction), output=(output,))


def _pointwise(layer: Any, rank: int) -> dict[str, Any]:
    window = (1,) * np.size(layer.kernel_size)
    return {"kernel_size": window, "strides": 1, "padding": "VALID", "kernel_dilation": 1}


def _general_axes(layer: nn.DenseGeneral) -> KernelAxes:
    batch, reduction, output = (np.size(x) for x in (layer.batch_dims, layer.axis, layer.features))
    return KernelAxes(
        batch=tuple(range(batch)),
        reduction=tuple(range(batch, batch + reduction)),
        output=tuple(range(batch + reduction, batch + reduction + output)),
    )


def _refuse_einsum(layer: nn.Einsum) -> str | None:
    if layer.einsum_str is None:
        return "its equation is an argument of the call"
    try:
        read_einsum(layer.einsum_str)
    except ValueError as error:
        return str(error)
    return None


def _einsum_factor(layer: nn.Einsum, rank: int, which: int) -> dict[str, Any]:
    equation, shape = einsum_factors(str(layer.einsum_str), layer.shape, rank)[which]
    return {"einsum_str": equation, "shape": shape}


def _embedding_second(layer: nn.Embed, rank: int) -> dict[str, Any]:
    # An Einsum, since that also multiplies by the transpose: its equation is an argument of the call.
    return {
        "shape": (rank, layer.features),
        "use_bias": False,
        "dtype": layer.dtype,
        "param_dtype": layer.param_dtype,
    }


def _refuse_embedding(layer: nn.Embed) -> str | None:
    own = layer.promote_dtype is not nn.Embed.promote_dtype
    return "an embedding with a promote_dtype of its own" if own else None


register_layer(
    nn.Dense,
    LayerType(
        axes=lambda layer: KernelAxes(reduction=(0,), output=(1,)),
        first=_features,
        second=lambda layer, rank: {},
    ),
)
register_layer(
    nn.Conv,
    LayerType(
        axes=_conv_axes,
        first=_features,
        second=lambda layer, rank: {**_pointwise(layer, rank), "input_dilation": 1},
        refuse=_refuse_conv,
    ),
)
register_layer(
    nn.ConvTranspose,
    LayerType(
        axes=_conv_axes,
        first=_features,
        second=lambda layer, rank: {**_pointwise(layer, rank), "transpose_kernel": False},
        refuse=_refuse_mask,
    ),
)
register_layer(
    nn.DenseGeneral,
    LayerType(
        axes=_general_axes,
        first=_features,
        # Batch axes lead, in what the first factor gives as in what it takes.
        second=lambda layer, rank: {"axis": -1},
    ),
)
register_layer(
    nn.Einsum,
    LayerType(
        axes=lambda layer: read_einsum(str(layer.einsum_str)),
        first=lambda layer, rank: {**_einsum_factor(layer, rank, 0), "use_bias": False},
        second=lambda layer, rank: _einsum_factor(layer, rank, 1),
        refuse=_refuse_einsum,
    ),
)
register_layer(
    nn.Embed,
    LayerType(
        axes=lambda layer: KernelAxes(reduction=(0,), output=(1,)),
        first=lambda layer, rank: {"features": rank},
        second=_embedding_second,
        second_type=nn.Einsum,
        param="embedding",
        initializer="embedding_init",
        lookup=True,
        refuse=_refuse_embedding,
    ),
)
register_layer(nn.ConvLocal, LayerType.refused("ConvLocal has another kernel at every position"))
register_layer(
    nn.OptimizedLSTMCell,
    LayerType.refused("OptimizedLSTMCell multiplies by the kernels of all gates at once: use LSTMCell"),
)
