"""Reads checkpoints that other programs saved with orbax; those of train.py are read by ``checkpoint.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from cuttlefish_jax.errors import CheckpointError, UserError, storage_errors
from cuttlefish_jax.training.untrusted import check_files, declared_arrays

# What every item of arrays has, as orbax's StandardSave and PyTreeSave write it.
_ITEM = "_METADATA"


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
