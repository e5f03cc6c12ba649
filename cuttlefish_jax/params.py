"""Params as the core works on them, whatever a front end keeps them in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from optax import MaskedNode

from cuttlefish_jax.kernels import Kernel, unboxed


@functools.singledispatch
def unwrap(params: Any) -> tuple[Mapping[str, Any], Callable[[Mapping[str, Any]], Any]]:
    """Params as nested dicts of arrays, and the way back. Front ends register what they keep params in.

    Args:
      params: a params tree, which is returned as it is, or a model or state of a front end.

    Returns:
      The nested dicts, and a function from such a tree to what ``params`` is.

    Raises:
      ValueError: if a param has no value yet.
    """
    return params, lambda tree: tree


def find_leaf(tree: Any, kernel: Kernel) -> Any:
    """The leaf in a kernel's place in what an optimizer sees of params, or of a tree of their structure.

    Returns:
      The leaf, out of its box if it is in one. It is a ``MaskedNode`` if it, or a part that it is in, is
      masked, and ``None`` if there is nothing.
    """
    for key in [*(kernel.path.split("/") if kernel.path else []), kernel.param]:
        if isinstance(tree, MaskedNode):
            return tree
        if not isinstance(tree, Mapping) or key not in tree:
            return None
        tree = tree[key]
    return unboxed(tree)
