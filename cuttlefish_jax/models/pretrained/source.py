"""Where checkpoints are, and their tensors one by one."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

FILE = "model.safetensors"
INDEX = f"{FILE}.index.json"
# Pickles run code when they are read.
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class Checkpoint:
    """The tensors of some safetensors files; made by :func:`open_checkpoint`."""

    def __init__(self, tensors: Mapping[str, tuple[Path, Any]], metadata: Mapping[str, str]):
        self._tensors = tensors
        self.metadata = metadata  # of all files together

    @property
    def names(self) -> list[str]:
        """Of all tensors, sorted."""
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, which is not read."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Of a tensor in the words of safetensors, e.g. ``"F32"`` or ``"BF16"``."""
        return self._slice(name).get_dtype()

    def read(self, name: str) -> np.ndarray:
        """The tensor itself."""
        # bfloat16 is a name that NumPy knows since JAX has imported ml_dtypes.
        return self._tensors[name][1].get_tensor(name)

    def _slice(self, name: str) -> Any:
        return self._tensors[name][1].get_slice(name)


@contextlib.contextmanager
def open_checkpoint(source: str | Path) -> Iterator[Checkpoint]:
    """Opens a checkpoint; no tensor is read before it is asked for.

    Args:
      source: a safetensors file, a folder with model.safetensors or model.safetensors.index.json, or the
        id of a repository on the Hugging Face hub.

    Raises:
      ValueError: if there is none, or it is damaged or a pickle, or the hub cannot be reached.
    """
    try:
        import safetensors
    except ImportError as error:
        raise ValueError("reading needs safetensors: pip install 'cuttlefish-jax[serving]'") from error
    with contextlib.ExitStack() as stack:
        tensors: dict[str, tuple[Path, Any]] = {}
        metadata: dict[str, str] = {}
        for path in _files(source):
            try:
                file = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
            except OSError as error:
                raise ValueError(f"cannot read {path}: {error}") from error
            except safetensors.SafetensorError as error:
                raise ValueError(f"{path} is truncated, or not a safetensors file: {error}") from error
            metadata |= file.metadata() or {}
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                if name in tensors:
                    raise ValueError(f"tensor {name!r} is in both {tensors[name][0]} and {path}")
                tensors[name] = path, file
        yield Checkpoint(tensors, metadata)


def _files(source: str | Path) -> list[Path]:
    path = Path(source)
    if path.is_dir():
        if (path / FILE).is_file():
            return [path / FILE]
        if (path / INDEX).is_file():
            return [path / shard for shard in _shards(path / INDEX)]
        for file in sorted(path.iterdir()):
            _refuse_pickle(file)
        raise ValueError(f"folder {path} has neither {FILE} nor {INDEX}")
    _refuse_pickle(path)
    if path.is_file():
        return [path]
    if isinstance(source, Path) or path.suffix == ".safetensors" or not _HUB_ID.fullmatch(source):
        raise ValueError(f"there is no file or folder {source}")
    return _download(source)


def _refuse_pickle(path: Path) -> None:
    if path.suffix in _PICKLES:
        raise ValueError(
            f"{path} is a pickle, which can run code when it is read; convert it where you trust it: "
            f"safetensors.torch.save_file(torch.load({path.name!r}, weights_only=True), {FILE!r})"
        )


def _shards(index: Path) -> list[str]:
    """The names of the files that an index speaks of."""
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of safetensors files: it has no weight_map") from error
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{index} names {shard!r}, which is not a file beside it")
    return sorted(shards)


def _download(repository: str) -> list[Path]:
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
            return [fetch(shard) for shard in _shards(fetch(INDEX))]
    except Exception as error:  # whatever the client and its transport raise
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{repository} is no local path, and could not be fetched from the Hugging Face hub: {reason}"
        ) from error
