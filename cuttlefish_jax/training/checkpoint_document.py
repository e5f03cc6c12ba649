"""What a checkpoint says of itself: format, digests, and what its arrays are called on the disk."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

# 3 has every array in a file of its own. 2, where orbax kept all in a database (OCDBT), is read, too, and so
# is 1, which has no records from within epochs: what its records and arrays lack has defaults.
FORMAT = 3
# What some file system would not have in a name.
_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]")


def make_document(
    step: int, record: Mapping[str, Any], leaves: Mapping[str, np.ndarray], key_types: Mapping[str, str]
) -> dict[str, Any]:
    """The JSON of a checkpoint: what the caller says of it, and shape, digest and place of every array."""
    specs = {}
    for index, (name, leaf) in enumerate(leaves.items()):
        specs[name] = {"shape": list(leaf.shape), "dtype": leaf.dtype.name, "sha256": digest(leaf)}
        # The number keeps apart what is alike by then, or where capitals do not count.
        specs[name]["file"] = f"{index:05d}.{_UNSAFE.sub('_', name.replace('/', '.'))[:100]}"
        if name in key_types:
            specs[name]["key_type"] = key_types[name]
    payload = {"format": FORMAT, "step": step, "record": dict(record), "leaves": specs}
    # Through JSON and back, so that the digest is of what will be read: tuples are lists by then.
    payload = json.loads(json.dumps(payload))
    return payload | {"sha256": digest_of_json(payload)}


def stored_names(specs: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """What every array is called among orbax's; of those without elements, tensorstore has none."""
    files = {name: spec.get("file", name) for name, spec in specs.items() if 0 not in spec["shape"]}
    if len(set(files.values())) < len(files):
        raise ValueError("two arrays are in one file")
    return files


def digest(array: np.ndarray) -> str:
    """The SHA-256 of an array's bytes."""
    # A view as bytes, because the buffer protocol does not know bfloat16.
    contiguous = np.ascontiguousarray(array).reshape(-1)
    return hashlib.sha256(contiguous.view(np.uint8).data).hexdigest()


def digest_of_json(value: Any) -> str:
    """The SHA-256 of what JSON says, however it is written."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
