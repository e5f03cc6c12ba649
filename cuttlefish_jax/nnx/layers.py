"""The NNX layer types that can be factorized; with Linen's names, so that one plan serves both."""

from __future__ import annotations

from typing import Any

from flax import nnx

from cuttlefish_jax.einsum import einsum_factors, read_einsum
from cuttlefish_jax.kernels import KernelAxes
from cuttlefish_jax.layer_types import LAYER_TYPES, LayerType


def _refuse_conv(layer: Any) -> str | None:
    if getattr(layer, "feature_group_count", 1) != 1:
        return f"grouped convolution ({layer.feature_group_count} groups)"
    return "convolution with a mask" if layer.mask is not None else None


def _conv_axes(layer: Any) -> KernelAxes:
    window = len(layer.kernel_size)
    into, out = (window + 1, window) if getattr(layer, "transpose_kernel", False) else (window, window + 1)
    return KernelAxes(reduction=(*range(window), into), output=(out,))


def _first_conv(layer: Any, rank: int) -> dict[str, Any]:
    channels = (rank, layer.in_features)
    if not getattr(layer, "transpose_kernel", False):
        channels = channels[::-1]
    return dict(out_features=rank, kernel_shape=(*layer.kernel_size, *channels))


def _pointwise(layer: Any, rank: int) -> dict[str, Any]:
    window = (1,) * len(layer.kernel_size)
    shape = (*window, rank, layer.out_features)
    fields = dict(in_features=rank, kernel_size=window, kernel_shape=shape, kernel_dilation=1)
    own = dict(input_dilation=1) if isinstance(layer, nnx.Conv) else dict(transpose_kernel=False)
    return dict(strides=1, padding="VALID", **fields, **own)


def _general_axes(layer: nnx.LinearGeneral) -> KernelAxes:
    batch, split = len(layer.batch_axis), len(layer.batch_axis) + len(layer.in_features)
    ndim = split + len(layer.out_features)
    return KernelAxes(
        batch=tuple(range(batch)), reduction=tuple(range(batch, split)), output=tuple(range(split, ndim))
    )


def _refuse_einsum(layer: nnx.Einsum) -> str | None:
    try:
        read_einsum(layer.einsum_str)
    except ValueError as error:
        return str(error)
    return None


def _einsum_factor(layer: nnx.Einsum, rank: int, index: int) -> dict[str, Any]:
    equation, shape = einsum_factors(layer.einsum_str, layer.kernel_shape, rank)[index]
    return dict(einsum_str=equation, kernel_shape=shape) | ({} if index else dict(bias_shape=None))


LAYER_TYPES.update(
    {
        nnx.Linear: LayerType(
            axes=lambda layer: KernelAxes(reduction=(0,), output=(1,)),
            first=lambda layer, rank: dict(out_features=rank),
            second=lambda layer, rank: dict(in_features=rank),
            name="Dense",
        ),
        nnx.LinearGeneral: LayerType(
            axes=_general_axes,
            first=lambda layer, rank: dict(out_features=(rank,)),
            second=lambda layer, rank: dict(in_features=(rank,), axis=(-1,)),
            name="DenseGeneral",
        ),
        nnx.Conv: LayerType(axes=_conv_axes, first=_first_conv, second=_pointwise, refuse=_refuse_conv),
        nnx.ConvTranspose: LayerType(
            axes=_conv_axes, first=_first_conv, second=_pointwise, refuse=_refuse_conv
        ),
        nnx.Einsum: LayerType(
            axes=lambda layer: read_einsum(layer.einsum_str),
            first=lambda layer, rank: _einsum_factor(layer, rank, 0),
            second=lambda layer, rank: _einsum_factor(layer, rank, 1),
            refuse=_refuse_einsum,
        ),
        nnx.Embed: LayerType(
            axes=lambda layer: KernelAxes(reduction=(0,), output=(1,)),
            first=lambda layer, rank: dict(features=rank),
            second=lambda layer, rank: dict(
                in_features=rank,
                out_features=layer.features,
                use_bias=False,
                dtype=layer.dtype,
                param_dtype=layer.param_dtype,
                promote_dtype=layer.promote_dtype,
            ),
            second_type=nnx.Linear,
            param="embedding",
            lookup=True,
        ),
        nnx.WeightNorm: LayerType.refused("its kernel is computed by WeightNorm"),
        nnx.SpectralNorm: LayerType.refused("its kernel is computed by SpectralNorm"),
    }
)
