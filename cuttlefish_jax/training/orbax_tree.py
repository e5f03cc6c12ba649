"""Reads checkpoints that other programs saved with orbax; those of train.py are read by ``checkpoint.py``.

No checkpoint is trusted: what its files declare is looked at before orbax takes time or memory for it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from cuttlefish_jax.errors import CheckpointError, UserError, storage_errors
from cuttlefish_jax.files import check_document, check_memory

# What every item of arrays has, as orbax's StandardSave and PyTreeSave write it.
_ITEM = "_METADATA"
# The names that orbax gives to JSON documents.
_DOCUMENTS = ("metadata", "_METADATA", "_CHECKPOINT_METADATA", "_sharding")
# Those of tensorstore.
_DOCUMENTS += (".zarray", ".zattrs", ".zgroup", "zarr.json")
# What a file may have beside the numbers of arrays.
_SLACK = 64 * 2**20


def read_tree(directory: Path) -> Any:
    """The tree of a checkpoint, as it was saved.

    Args:
      directory: the checkpoint; or one of several items of arrays, of which there has to be only one; or of
        several steps, of which the last is read.

    Returns:
      Nested dicts and lists of NumPy arrays, on the host.

    Raises:
      CheckpointError: if there is no checkpoint, or no choosing between several, or it is damaged.
      StorageError: if the directory cannot be read.
    """
    item = _find_item(directory)
    try:
        with storage_errors(item, action="read"), ocp.StandardCheckpointer() as checkpointer:
            check_files(item)
            # Host arrays without memory: orbax then reads to the host, whatever devices there were.
            abstract = jax.tree.map(
                lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), declared_arrays(item)
            )
            return checkpointer.restore(item.absolute(), abstract)
    except UserError:
        raise
    except Exception as error:
        # Whatever orbax, tensorstore and json throw at broken files: there is no list of it.
        first_line = str(error).strip().partition("\n")[0][:300]
        raise CheckpointError(f"cannot read {item} ({type(error).__name__}: {first_line})") from error


def check_files(directory: Path) -> None:
    """Looks at every file of a checkpoint, and opens none.

    Raises:
      OSError: if the directory cannot be read.
      ValueError: if it has anything but files and directories (a pipe would be waited for without end), or a
        document is too large for what it should be.
    """
    for path in _files(directory):
        if not path.is_file():
            raise ValueError(f"{path.relative_to(directory)} is neither a file nor a directory")
        if path.name in _DOCUMENTS:
            check_document(path)


def declared_arrays(item: Path) -> Any:
    """The arrays of an item as its metadata declare them, none of which is read.

    Args:
      item: the directory of an item that orbax's StandardSave or PyTreeSave wrote.

    Returns:
      The tree of the item, of orbax's metadata of arrays: they have a shape and a dtype.

    Raises:
      ValueError: if they are larger than this machine's memory, or are stored elsewhere, or in pieces or
        files that are larger than they, each of which is read whole.
      Exception: whatever orbax and tensorstore raise for damaged files.
    """
    # Behind a relative path, orbax finds nothing.
    handler: Any = ocp.PyTreeCheckpointHandler()
    metadata = handler.metadata(item.absolute())
    arrays = jax.tree.leaves(metadata.tree)
    check_memory((array.shape, array.dtype) for array in arrays)
    most = _SLACK + sum(math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in arrays)
    for path in _files(item):
        if path.stat().st_size > most:
            raise ValueError(f"{path.relative_to(item)} has more than all arrays together")
    for array in arrays:
        if Path(array.name).is_absolute():  # tensorstore itself refuses ".."
            raise ValueError(f"its array {array.name} is stored outside of it")
        for piece in _pieces(array):
            if any(part > max(whole, 1) for part, whole in zip(piece, array.shape, strict=True)):
                raise ValueError(f"{array.name} of shape {array.shape} is stored in pieces of {tuple(piece)}")
    return metadata.tree


def _files(directory: Path) -> Iterator[Path]:
    """All that is in a directory and those that are linked from there, but for directories."""

    def fails(error: OSError) -> None:
        raise error

    seen = set()
    for parent, folders, names in os.walk(directory, onerror=fails, followlinks=True):
        found = os.stat(parent)
        if (found.st_dev, found.st_ino) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add((found.st_dev, found.st_ino))
        yield from (Path(parent, name) for name in names)


def _find_item(directory: Path) -> Path:
    if (directory / _ITEM).exists():
        return directory
    with storage_errors(directory, action="read"):
        inside = [path for path in directory.iterdir() if path.is_dir()]
    items = [path for path in inside if (path / _ITEM).exists()]
    if len(items) == 1:
        return items[0]
    if items:
        names = ", ".join(sorted(path.name for path in items))
        raise CheckpointError(f"{directory} has several items ({names}): give one of them")
    if steps := [path for path in inside if path.name.isdecimal()]:
        return _find_item(max(steps, key=lambda path: int(path.name)))
    raise CheckpointError(f"there is no checkpoint in {directory}: orbax would have left its {_ITEM}")


def _pieces(array: Any) -> list[tuple[int, ...]]:
    storage = getattr(array, "storage", None)
    shapes = (storage.chunk_shape, storage.write_shape) if storage is not None else ()
    return [shape for shape in shapes if shape is not None]
