"""Reads kernels off a params tree, for people who have a checkpoint and no model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from cuttlefish_jax.kernels import Kernel, Kernels
from cuttlefish_jax.layer_types import refuse_dtype

HEURISTICS = (
    "Without the network, kernels are read off the checkpoint: an array called kernel with 2 axes is a "
    "Dense, one with 3 to 5 a Conv whose last axes are in and out. A bias of several axes tells those of the "
    "output, or that layers are stacked; query, key, value and out beside each other are attention. First "
    "and last layer are guessed: what is called stem, patch_embed or conv_init, or an embedding; what is "
    "called head, classifier or logits; else the first and the last of the sorted names"
)
_ATTENTION = {"query", "key", "value"}
_FIRST = re.compile(r"(stem|patch|conv_init|embed).*")
_LAST = re.compile(r"((lm|cls|output)_)?(head|classifier|logits)(_?\d+)?")


def kernels_of_tree(params: Mapping[str, Any]) -> Kernels:
    """The kernels of a params tree, by what their names and shapes suggest.

    Exact for Dense, Conv and flax's attention; :data:`HEURISTICS` has the words for people. How often a
    kernel is applied cannot be known: its positions are 1, and its FLOPs mean nothing.

    Args:
      params: nested dicts of arrays.

    Returns:
      Kernels in the order of their names, numbers in names by their value, but for those that seem to be the
      first and the last; every other array of two or more axes is in ``.skipped`` with the reason.

    Example:
      >>> import numpy as np
      >>> kernels = kernels_of_tree({"conv": {"kernel": np.ones((3, 3, 8, 16))}, "table": np.ones((5, 4))})
      >>> [(path, kernel.layer, kernel.m, kernel.n) for path, kernel in kernels.items()]
      [('conv', 'Conv', 72, 16)]
      >>> kernels.skipped
      {'table': 'not called kernel'}
    """
    entries, skipped = [], []
    leaves = list(_leaves(params, ()))
    for path, name, leaf, layer in leaves:
        bias = (
            tuple(layer["bias"].shape) if name == "kernel" and hasattr(layer.get("bias"), "shape") else None
        )
        if len(leaf.shape) < 2 or (name == "bias" and "kernel" in layer):
            continue
        joined = "/".join(path)
        if name != "kernel":
            reason = "an embedding" if name == "embedding" else "not called kernel"
            skipped.append((joined if name == "embedding" else "/".join((*path, name)), reason))
            continue
        kernel = refuse_dtype(name, leaf.dtype) or _kernel(
            joined, tuple(leaf.shape), bias, _siblings(params, path)
        )
        if isinstance(kernel, str):
            skipped.append((joined, kernel))
        else:
            entries.append(kernel)
    entries.sort(key=_position)
    # One input channel is that of grey images in the first layer; in another it is one of many groups.
    depthwise = [kernel for kernel in entries[1:] if _has_one_channel(kernel)]
    skipped += [(kernel.path, "one input channel: a depthwise convolution") for kernel in depthwise]
    return Kernels(
        entries=tuple(kernel for kernel in entries if kernel not in depthwise),
        skipped_entries=tuple(skipped),
        num_params=sum(math.prod(leaf.shape) for _, _, leaf, _ in leaves),
        embedding_first=any(name == "embedding" for _, name, _, _ in leaves),
    )


def _leaves(
    tree: Any, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], str, Any, Mapping[str, Any]]]:
    """The path of its layer, the name, the array and the layer, of every array in the order of names."""
    for key in sorted(tree, key=_by_number):
        if isinstance(tree[key], Mapping):
            yield from _leaves(tree[key], (*path, key))
        elif hasattr(tree[key], "shape"):
            yield path, key, tree[key], tree


def _by_number(name: str) -> list[Any]:
    """Sorts layer2 before layer10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def _position(kernel: Kernel) -> int:
    """Sorts the layers that seem to be the first before the others, and the last behind them."""
    keys = kernel.path.split("/")
    ends = (keys[0], keys[-1])
    return -any(_FIRST.fullmatch(key) for key in ends) or int(any(_LAST.fullmatch(key) for key in ends))


def _siblings(params: Any, path: tuple[str, ...]) -> set[str]:
    for key in path[:-1]:
        params = params[key]
    return set(params) if path else set()


def _kernel(
    path: str, shape: tuple[int, ...], bias: tuple[int, ...] | None, siblings: set[str]
) -> Kernel | str:
    """The kernel, or why there is none."""
    stack, output = _split_by_bias(shape, bias)
    name = path.rsplit("/", 1)[-1]
    in_attention = siblings >= _ATTENTION
    if in_attention and name in _ATTENTION and bias is None:
        output = 2  # [in, heads, features]
    inputs = len(shape) - stack - output
    if inputs < 1:
        return f"shape {shape} has no input axis"
    is_conv = inputs in (2, 3, 4) and output == 1 and not (in_attention and name == "out")
    if inputs > 1 and output == 1 and not is_conv and not in_attention:
        return f"shape {shape} is neither a Dense nor a Conv"
    axes = tuple(range(len(shape)))
    return Kernel(
        path=path,
        layer="Conv" if is_conv else "Dense" if inputs == output == 1 else "DenseGeneral",
        shape=shape,
        stack_axes=axes[:stack],
        reduction_axes=axes[stack : stack + inputs],
        output_axes=axes[stack + inputs :],
    )


def _split_by_bias(shape: tuple[int, ...], bias: tuple[int, ...] | None) -> tuple[int, int]:
    """How many axes of the kernel are stacked in front, and how many are of the output."""
    if bias is None:
        return 0, 1
    for stack in range(len(bias)):
        output = len(bias) - stack
        if bias == shape[:stack] + shape[len(shape) - output :] and stack + output < len(shape):
            return stack, output
    return 0, 1


def _has_one_channel(kernel: Kernel) -> bool:
    is_window = kernel.layer == "Conv" and not kernel.is_pointwise
    return is_window and kernel.shape[kernel.reduction_axes[-1]] == 1 < kernel.n
