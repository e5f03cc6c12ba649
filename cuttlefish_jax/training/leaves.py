"""The leaves of a tree by name, as arrays in this host's memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils


def named_leaves(tree: Any) -> dict[str, Any]:
    """Every leaf by its path, such as ``params/dense/kernel``.

    Raises:
      ValueError: if two leaves have the same one.
    """
    named: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(keys, simple=True, separator="/")
        if name in named:
            raise ValueError(f"two leaves of the tree are called {name!r}")
        named[name] = leaf
    return named


def host_leaves(tree: Any) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Every leaf by its path as a numpy array, and the types of those that are random keys.

    Every host has to call this: arrays that are split over hosts are gathered.
    """
    named = named_leaves(tree)
    key_types = {name: str(jax.random.key_impl(leaf)) for name, leaf in named.items() if _is_key(leaf)}
    plain = {
        name: jax.random.key_data(leaf) if name in key_types
        else leaf if isinstance(leaf, jax.Array)
        else jnp.asarray(leaf)
        for name, leaf in named.items()
    }  # fmt: skip
    return _whole(plain), key_types


def stored_shape(leaf: Any) -> tuple[int, ...]:
    """The shape that :func:`host_leaves` gives a leaf: that of random keys is of their data."""
    return jax.eval_shape(jax.random.key_data, leaf).shape if _is_key(leaf) else tuple(leaf.shape)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _whole(arrays: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Arrays in this host's memory; those that are split over hosts one after the other."""
    spread = {
        name: multihost_utils.process_allgather(array, tiled=True)
        for name, array in arrays.items()
        if not (array.is_fully_addressable or array.is_fully_replicated)
    }
    here = jax.device_get({name: array for name, array in arrays.items() if name not in spread})
    return {name: np.asarray((spread | here)[name]) for name in arrays}
