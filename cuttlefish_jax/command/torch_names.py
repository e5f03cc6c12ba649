"""Checkpoints of PyTorch in the names and the layout of Flax, as far as names and shapes tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

NOTE = (
    "The weights were named as in PyTorch, and are here in the names and the layout of Flax: a weight of 2 "
    "axes is a Dense, one of 3 to 5 a Conv, and what is called embedding, wte or wpe is one"
)
_EMBEDDING = re.compile(r"(.*_)?(embed|embedding|embeddings|embed_tokens|wte|wpe)(_.*)?")


def is_of_torch(params: Mapping[str, Any]) -> bool:
    """Whether there are arrays called weight with several axes, and none called kernel."""
    shapes = list(_shapes(params))
    return any(name == "weight" and len(shape) > 1 for name, shape in shapes) and not any(
        name == "kernel" for name, _ in shapes
    )


def to_flax(params: Mapping[str, Any]) -> dict[str, Any]:
    """The same tree with kernels: ``[out, in, *window]`` becomes ``[*window, in, out]``.

    Example:
      >>> import numpy as np
      >>> tree = to_flax({"conv": {"weight": np.ones((16, 8, 3, 5)), "bias": np.ones(16)}})
      >>> {name: array.shape for name, array in tree["conv"].items()}
      {'kernel': (3, 5, 8, 16), 'bias': (16,)}
    """
    return _translated(params, "")


def _translated(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    layer: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            layer[key] = _translated(value, key)
        elif key == "weight" and value.ndim > 1 and _EMBEDDING.fullmatch(name):
            layer["embedding"] = value
        elif key == "weight" and value.ndim > 1:
            layer["kernel"] = np.transpose(value, (*range(2, value.ndim), 1, 0))
        else:
            layer[key] = value
    return layer


def _shapes(tree: Mapping[str, Any]) -> Any:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _shapes(value)
        else:
            yield key, value.shape
