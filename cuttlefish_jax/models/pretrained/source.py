"""Where checkpoints are: on the disk, or on the Hugging Face hub."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from cuttlefish_jax.safetensors_file import (
    FILE,
    INDEX,
    Checkpoint,
    files_of,
    open_checkpoint,
    require_safetensors,
    shards_of,
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def open_source(source: str | Path) -> contextlib.AbstractContextManager[Checkpoint]:
    """Opens a checkpoint; no tensor is read before it is asked for.

    Args:
      source: a safetensors file, a folder with model.safetensors or model.safetensors.index.json, or the
        id of a repository on the Hugging Face hub.

    Raises:
      ValueError: if there is none, or it is damaged or a pickle, or the hub cannot be reached.
    """
    path = Path(source)
    is_name = isinstance(source, str) and path.suffix != ".safetensors" and _HUB_ID.fullmatch(source)
    is_local = path.exists() or not is_name
    return open_checkpoint(files_of(path) if is_local else _download(str(source)))


def _download(repository: str) -> list[Path]:
    require_safetensors()
    try:
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise ValueError(
            f"there is no file or folder {repository}; to look for it on the Hugging Face hub: "
            "pip install huggingface_hub"
        ) from error

    def fetch(name: str) -> Path:
        return Path(huggingface_hub.hf_hub_download(repository, name))

    try:
        try:
            return [fetch(FILE)]
        except LocalEntryNotFoundError:  # no network, and not downloaded before
            raise
        except EntryNotFoundError:
            return [fetch(shard) for shard in shards_of(fetch(INDEX))]
    except Exception as error:  # whatever the client and its transport raise
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{repository} is no local path, and could not be fetched from the Hugging Face hub: {reason}"
        ) from error
