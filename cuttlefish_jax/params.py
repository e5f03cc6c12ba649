"""Params as the core works on them, whatever a front end keeps them in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any


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
