"""Looks at what the files of a checkpoint declare before orbax takes time or memory for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from cuttlefish_jax.files import check_document, check_memory

# The names that orbax gives to JSON documents.
_DOCUMENTS = ("metadata", "_METADATA", "_CHECKPOINT_METADATA", "_sharding", "array_metadatas")


def check_files(directory: Path) -> None:
    """Looks at every file of a checkpoint, and opens none.

    Raises:
      OSError: if the directory cannot be read.
      ValueError: if it has anything but files and directories (a pipe would be waited for without end), or a
        document is too large for what it should be.
    """
    for path in directory.rglob("*"):
        if not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path.relative_to(directory)} is neither a file nor a directory")
        if path.name in _DOCUMENTS and path.is_file():
            check_document(path)


def declared_arrays(item: Path) -> Any:
    """The arrays of an item as its metadata declare them, none of which is read.

    Args:
      item: the directory of an item that orbax's StandardSave or PyTreeSave wrote.

    Returns:
      The tree of the item, of orbax's metadata of arrays: they have a shape and a dtype.

    Raises:
      ValueError: if they are larger than this machine's memory, or are stored in pieces that are larger than
        themselves, each of which is read whole.
      Exception: whatever orbax and tensorstore raise for damaged files.
    """
    # Behind a relative path, orbax finds nothing.
    handler: Any = ocp.PyTreeCheckpointHandler()
    metadata = handler.metadata(item.absolute())
    arrays = jax.tree.leaves(metadata.tree)
    check_memory((array.shape, array.dtype) for array in arrays)
    for array in arrays:
        for piece in _pieces(array):
            if any(part > max(whole, 1) for part, whole in zip(piece, array.shape, strict=True)):
                raise ValueError(f"{array.name} of shape {array.shape} is stored in pieces of {tuple(piece)}")
    return metadata.tree


def _pieces(array: Any) -> list[tuple[int, ...]]:
    storage = getattr(array, "storage", None)
    shapes = (storage.chunk_shape, storage.write_shape) if storage is not None else ()
    return [shape for shape in shapes if shape is not None]
