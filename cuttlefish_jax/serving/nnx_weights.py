"""The weights of NNX models as nested dicts, and the models as functions of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx


def weights_of(model: nnx.Module | nnx.State) -> dict[str, Any]:
    """Everything but random states; the indices of lists as texts: files and programs have no other keys."""
    state = nnx.state(model) if isinstance(model, nnx.Module) else model
    return _with_text_keys(nnx.to_pure_dict(nnx.filter_state(state, nnx.Not(nnx.RngState))))


def weights_as_argument(model: nnx.Module, kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """The model as a function of what :func:`weights_of` returns, and of its inputs."""
    graph, random, state = nnx.split(model, nnx.RngState, ...)
    pure = nnx.to_pure_dict(state)

    def call(weights: Any, *inputs: Any) -> Any:
        filled = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(filled, _with_keys_of(pure, weights))
        return nnx.merge(graph, random, filled)(*inputs, **kwargs)

    return call


def _with_text_keys(tree: Any) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    return {str(key): _with_text_keys(value) for key, value in tree.items()}


def _with_keys_of(pure: Any, tree: Any) -> Any:
    """Inverse of :func:`_with_text_keys`."""
    if not isinstance(pure, Mapping):
        return tree
    return {key: _with_keys_of(value, tree[str(key)]) for key, value in pure.items()}
