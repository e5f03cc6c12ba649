"""Parameters as safetensors, with the plan of their factorization in the metadata."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.core import meta

from cuttlefish_jax.files import replace_file
from cuttlefish_jax.plan.plan import FactorizationPlan
from cuttlefish_jax.safetensors_file import files_of, open_checkpoint
from cuttlefish_jax.serving.nnx_weights import weights_of

# In the metadata: the document of FactorizationPlan.to_json.
PLAN = "cuttlefish_plan"
# Of names; JAX and Python walk through trees by recursion.
_MAX_DEPTH = 64


def save_safetensors(
    file: str | os.PathLike[str], params: Any, plan: FactorizationPlan | None = None
) -> None:
    """Writes a tree of arrays to a safetensors file, and the plan that it was factorized with beside it.

    Tensors are named by their keys, joined by dots, as everywhere in safetensors: ``encoder.fc1.u.kernel``.
    Shapes and dtypes, bfloat16 among them, stay as they are in Flax.

    Args:
      file: where to; an older file is replaced in one step.
      params: nested dicts of arrays: params, or all variables, ``{"params": ..., "batch_stats": ...}``; or an
        NNX model or state, of which everything but random states is saved.
      plan: of params that are factorized; its JSON document becomes ``"cuttlefish_plan"`` of the file's
        metadata, where every reader of safetensors finds it.

    Raises:
      ValueError: if safetensors is not installed; if a key has a dot or is empty, or a leaf is no array that
        is whole on this host.

    Example:
      >>> import tempfile, numpy as np
      >>> from cuttlefish_jax import serving
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     serving.save_safetensors(f"{folder}/model.safetensors", {"fc": {"kernel": np.eye(2)}})
      ...     serving.load_safetensors(f"{folder}/model.safetensors")
      ({'fc': {'kernel': array([[1., 0.], [0., 1.]])}}, None)
    """
    try:
        from safetensors.numpy import save
    except ImportError as error:
        raise ValueError("saving needs safetensors: pip install 'cuttlefish-jax[serving]'") from error
    if isinstance(params, (nnx.Module, nnx.State)):
        params = weights_of(params)
    params = meta.unbox(params)  # a file has no place for the names of axes
    tensors = {name: _host_array(name, leaf) for name, leaf in _named(params)}
    metadata = {"format": "flax"} | ({PLAN: plan.to_json()} if plan is not None else {})
    replace_file(Path(file), save(tensors, metadata))


def load_safetensors(file: str | os.PathLike[str]) -> tuple[dict[str, Any], FactorizationPlan | None]:
    """Reads what :func:`save_safetensors` wrote.

    Args:
      file: the safetensors file, or a folder with model.safetensors or its shards.

    Returns:
      The tree, nested dicts of NumPy arrays, and the plan, ``None`` if there is none in the file. In files
      of others names may be joined by slashes instead of dots.

    Raises:
      ValueError: if safetensors is not installed, the file is missing, damaged or a pickle, its plan is no
        plan, or two of its names exclude each other.
    """
    with open_checkpoint(files_of(Path(file))) as checkpoint:
        names, metadata = checkpoint.names, checkpoint.metadata
        separator = "/" if any("/" in name for name in names) else "."
        tree: dict[str, Any] = {}
        for name in names:
            *parents, last = keys = name.split(separator)
            if "" in keys or len(keys) > _MAX_DEPTH:
                fault = "an empty part" if "" in keys else f"{len(keys)} parts, more than {_MAX_DEPTH}"
                raise ValueError(f"{file}: the name of the tensor {name!r:.100} has {fault}")
            node: Any = tree
            for key in parents:
                node = node.setdefault(key, {})
                if not isinstance(node, dict):
                    raise ValueError(
                        f"{file}: a tensor stands in the way of {name!r}, another begins like it"
                    )
            node[last] = checkpoint.read(name)
    try:
        return tree, FactorizationPlan.from_json(metadata[PLAN]) if PLAN in metadata else None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _named(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, Mapping):
        yield ".".join(path), tree
        return
    for key, value in tree.items():
        if not (name := str(key)) or "." in name:
            where = "/".join((*path, name))
            raise ValueError(f"{where!r} has a key that is empty or has a dot: names are joined by dots")
        yield from _named(value, (*path, name))


def _host_array(name: str, leaf: Any) -> np.ndarray:
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise ValueError(f"{name!r} is a {type(leaf).__name__}, not an array")
    if isinstance(leaf, jax.Array):
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(f"{name!r} is a random key, not an array: save params without it")
        if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            raise ValueError(f"{name!r} is spread over several hosts: gather it first")
    return np.ascontiguousarray(leaf).reshape(leaf.shape)  # which makes one axis of none
