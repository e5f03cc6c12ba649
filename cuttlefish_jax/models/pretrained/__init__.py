"""Pre-trained weights from safetensors files, as torchvision, timm and transformers name them."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from cuttlefish_jax.models.pretrained import timm, torchvision, transformers
from cuttlefish_jax.models.pretrained.naming import Naming, Tensor
from cuttlefish_jax.models.pretrained.source import open_source
from cuttlefish_jax.safetensors_file import Checkpoint

# By patterns of the names that create_model knows.
NAMINGS: Mapping[str, Naming] = MappingProxyType(
    {
        "resnet*": torchvision.RESNET,
        "wide_resnet*": torchvision.RESNET,
        "vgg*": torchvision.VGG,
        "deit_*": timm.DEIT,
        "resmlp_*": timm.RESMLP,
        "bert_*": transformers.BERT,
    }
)
_FLOATS = ("F64", "F32", "F16", "BF16")
_LISTED = 10

KeyPath = tuple[str, ...]


def load_pretrained(
    name: str,
    variables: Mapping[str, Any],
    source: str | Path,
    *,
    fresh: Sequence[str] = (),
    unused: Sequence[str] = (),
) -> dict[str, Any]:
    """Replaces a network's variables by those of a checkpoint of torchvision, timm or transformers.

    Every tensor of the checkpoint must find its place, and every parameter and batch statistic its tensor,
    but for the exceptions that ``fresh`` and ``unused`` name.

    Args:
      name: of the network, as ``create_model`` knows it; it chooses the naming: torchvision for ResNets
        (built with ``stem="imagenet"``) and VGG, timm for DeiT and ResMLP, transformers for BERT.
      variables: ``{"params": ..., "batch_stats": ...}`` of the network with full-rank layers: arrays, or
        the shapes that ``jax.eval_shape`` gives.
      source: a safetensors file, a folder with model.safetensors (or its shards and
        model.safetensors.index.json), or, where there is no such path, the id of a repository on the
        Hugging Face hub.
      fresh: patterns of paths, e.g. ``"classifier/*"``, that keep their value from ``variables``; what the
        checkpoint has for them is left out.
      unused: patterns of tensors, e.g. ``"cls.*"``, that may be left out.

    Returns:
      The tree of ``variables``, its dtypes kept, with NumPy arrays of the checkpoint.

    Raises:
      ValueError: if the network has no naming; if the checkpoint cannot be found or read, or is a pickle;
        if parameters are missing, or tensors left over or of other shapes, which are listed; if a pattern
        matches nothing, or a fresh parameter has no value.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from cuttlefish_jax.models import create_model
      >>> def fine_tune(folder):  # what bert-base-cased is on the hub: no classifier, but a head for words
      ...     model = create_model("bert_base", num_classes=2, config_file=folder)
      ...     variables = model.init(jax.random.key(0), jnp.zeros((1, 8), int))
      ...     return load_pretrained("bert_base", variables, folder, fresh=["classifier/*"], unused=["cls.*"])
    """
    naming = _naming(name)
    if strange := [key for key in variables if key not in ("params", "batch_stats")]:
        raise ValueError(f"variables have {strange[0]!r}; a checkpoint has params and batch_stats alone")
    leaves: dict[KeyPath, Any] = dict(traverse_util.flatten_dict(dict(variables)))
    places = {path: _place(naming, name, path) for path in leaves}
    kept = {path for path in leaves if _matches(_ours(path), fresh)}
    _check_patterns("fresh", fresh, [_ours(path) for path in leaves])
    for path, leaf in leaves.items():
        if path in kept and isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(f"{_ours(path)!r} is to be fresh, but has no value: give arrays, not shapes")
    with open_source(source) as checkpoint:
        _check_patterns("unused", unused, checkpoint.names)
        found = _find(naming, name, places, kept, checkpoint, unused, source)
        _check_shapes(leaves, places, found, checkpoint, source)
        loaded = {
            path: np.ascontiguousarray(places[path].convert(checkpoint.read(tensor)), leaves[path].dtype)
            for path, tensor in found.items()
        }
    return traverse_util.unflatten_dict({path: loaded.get(path, leaf) for path, leaf in leaves.items()})


def _naming(name: str) -> Naming:
    for pattern, naming in NAMINGS.items():
        if fnmatch.fnmatchcase(name, pattern):
            return naming
    raise ValueError(f"no checkpoints are known for model {name!r}; they are for {', '.join(NAMINGS)}")


def _ours(path: KeyPath) -> str:
    """A path without its collection: unambiguous, for norms call parameters and statistics differently."""
    return "/".join(path[1:])


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check_patterns(option: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    if isinstance(patterns, str):
        raise ValueError(f"{option} is {patterns!r}; give a list of patterns")
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            near = ", ".join(difflib.get_close_matches(pattern, names, n=3, cutoff=0.0))
            raise ValueError(f"{option} {pattern!r} matches nothing; near it: {near}")


def _place(naming: Naming, name: str, path: KeyPath) -> Tensor:
    place = naming.locate(_ours(path))
    if place is None:
        hint = "; load before factorizing" if path[-2] in ("u", "v") else ""
        raise ValueError(f"{naming.title} checkpoints have no place for {_ours(path)!r} of {name}{hint}")
    return place


def _find(
    naming: Naming,
    name: str,
    places: Mapping[KeyPath, Tensor],
    kept: set[KeyPath],
    checkpoint: Checkpoint,
    unused: Sequence[str],
    source: str | Path,
) -> dict[KeyPath, str]:
    """The tensor of every leaf that is not kept; complains of both the missing and the left over."""
    names = checkpoint.names
    here = set(names)
    found = {path: next((n for n in place.names if n in here), None) for path, place in places.items()}
    wanted = {path: tensor for path, tensor in found.items() if path not in kept}
    missing = [f"{_ours(p)} ({places[p].names[0]})" for p, tensor in wanted.items() if tensor is None]
    used = set(found.values())
    left = [n for n in names if n not in used and not _matches(n, [*naming.buffers, *unused])]
    if not missing and not left:
        return {path: tensor for path, tensor in wanted.items() if tensor is not None}
    problems = []
    if not _has_signature(names, naming):
        for other in NAMINGS.values():
            if _has_signature(names, other):
                raise ValueError(
                    f"{source} looks like a {other.title} checkpoint, not the {naming.title} of {name}"
                )
    if missing:
        problems.append(f"it lacks {_listed(missing)}")
    if left:
        problems.append(f"nothing uses its {_listed(left)}")
    raise ValueError(f"{source} is not a checkpoint of this {name}: {'; '.join(problems)}")


def _has_signature(names: Sequence[str], naming: Naming) -> bool:
    return any(fnmatch.fnmatchcase(name, naming.signature) for name in names)


def _check_shapes(
    leaves: Mapping[KeyPath, Any],
    places: Mapping[KeyPath, Tensor],
    found: Mapping[KeyPath, str],
    checkpoint: Checkpoint,
    source: str | Path,
) -> None:
    wrong = []
    for path, tensor in found.items():
        if (dtype := checkpoint.dtype(tensor)) not in _FLOATS:
            raise ValueError(f"{source}: {tensor!r} is {dtype}: quantised checkpoints are not supported")
        theirs, ours = checkpoint.shape(tensor), tuple(leaves[path].shape)
        try:
            becomes = jax.eval_shape(places[path].convert, jax.ShapeDtypeStruct(theirs, jnp.float32)).shape
        except (TypeError, ValueError):  # of transposing or reshaping what has other axes
            becomes = None
        if becomes != ours:
            how = "does not fit" if becomes is None else f"gives {becomes}"
            wrong.append(f"{_ours(path)} is {ours}, but {tensor} {theirs} {how}")
    if wrong:
        raise ValueError(f"{source} has other shapes: {_listed(wrong, '; ')}")


def _listed(names: Sequence[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return separator.join(names[:_LISTED]) + more
