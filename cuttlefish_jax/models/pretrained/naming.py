"""What a checkpoint calls a parameter, and how its tensor becomes ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

# Works on arrays of NumPy, and of JAX under eval_shape.
Conversion = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a checkpoint has a parameter.

    Attributes:
      names: what it may be called, the usual name first.
      convert: makes the parameter of the tensor.
    """

    names: tuple[str, ...]
    convert: Conversion


@dataclasses.dataclass(frozen=True, kw_only=True)
class Naming:
    """The names of one family of networks in one library.

    Attributes:
      title: library and network, for messages.
      signature: pattern of a tensor's name that only this family's checkpoints have.
      locate: where the checkpoint has the parameter at a path of ours; None if it has no place for it.
      buffers: patterns of tensors that are no parameters.
    """

    title: str
    signature: str
    locate: Callable[[str], Tensor | None]
    buffers: tuple[str, ...] = ()


def as_is(tensor: Any) -> Any:
    """Biases, norms, embeddings and tokens."""
    return tensor


def dense_kernel(tensor: Any) -> Any:
    """torch has ``[out, in]``, Flax ``[in, out]``."""
    return tensor.transpose(1, 0)


def conv_kernel(tensor: Any) -> Any:
    """torch has ``[out, in, h, w]``, Flax ``[h, w, in, out]``; patch embeddings are convolutions, too."""
    return tensor.transpose(2, 3, 1, 0)


def vector(tensor: Any) -> Any:
    """``[1, 1, d]`` to ``[d]``."""
    return tensor.reshape(tensor.shape[-1])


def _layer(name: str, leaf: str, parts: Mapping[str, tuple[str, Conversion]]) -> Tensor | None:
    if leaf not in parts:
        return None
    suffix, convert = parts[leaf]
    return Tensor((f"{name}.{suffix}",), convert)


def dense(name: str, leaf: str) -> Tensor | None:
    """The parameter ``leaf`` of a dense layer that is called ``name``."""
    return _layer(name, leaf, {"kernel": ("weight", dense_kernel), "bias": ("bias", as_is)})


def conv(name: str, leaf: str) -> Tensor | None:
    """The parameter ``leaf`` of a two-dimensional convolution that is called ``name``."""
    return _layer(name, leaf, {"kernel": ("weight", conv_kernel), "bias": ("bias", as_is)})


def norm(name: str, leaf: str) -> Tensor | None:
    """The parameter or statistic ``leaf`` of a batch or layer norm that is called ``name``."""
    parts = dict(
        scale=("weight", as_is),
        bias=("bias", as_is),
        mean=("running_mean", as_is),
        var=("running_var", as_is),
    )
    return _layer(name, leaf, parts)


def affine(name: str, leaf: str) -> Tensor | None:
    """The parameter ``leaf`` of ResMLP's affine layer, ``[1, 1, d]`` in timm."""
    return _layer(name, leaf, {"scale": ("alpha", vector), "bias": ("beta", vector)})


def number(layer: str, kind: str) -> int | None:
    """The number of a layer: 3 for ``"block3"`` of kind ``"block"``; None if it is not one of that kind."""
    digits = layer.removeprefix(kind)
    return int(digits) if layer.startswith(kind) and digits.isdecimal() else None
