"""Reads safetensors files, which are not trusted: what is wrong with one is a ValueError that names it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cuttlefish_jax.files import read_document
from cuttlefish_jax.json_reader import JsonReader

FILE = "model.safetensors"
INDEX = f"{FILE}.index.json"
# Pickles run code when they are read.
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_READER = JsonReader("list of safetensors files")


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
        """The tensor itself.

        Raises:
          ValueError: if NumPy has no array of its shape or dtype.
        """
        path, file = self._tensors[name]
        try:
            # bfloat16 is a name that NumPy knows since JAX has imported ml_dtypes.
            return file.get_tensor(name)
        except Exception as error:  # which of them, depends on what is wrong
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}: cannot read the tensor {name!r}: {reason}") from error

    def _slice(self, name: str) -> Any:
        return self._tensors[name][1].get_slice(name)


def require_safetensors() -> Any:
    """The package safetensors.

    Raises:
      ValueError: if it is not installed.
    """
    try:
        import safetensors
    except ImportError as error:
        raise ValueError("reading needs safetensors: pip install 'cuttlefish-jax[serving]'") from error
    return safetensors


@contextlib.contextmanager
def open_checkpoint(files: Sequence[Path]) -> Iterator[Checkpoint]:
    """Opens the files of a checkpoint; no tensor is read before it is asked for.

    A file says where in it each tensor is. That it has the bytes for all of them, each its own, is checked
    when it is opened, so no more memory is taken than it is long.

    Args:
      files: of one checkpoint; see :func:`files_of`.

    Raises:
      ValueError: if one is damaged, or safetensors is not installed.
    """
    safetensors = require_safetensors()
    with contextlib.ExitStack() as stack:
        tensors: dict[str, tuple[Path, Any]] = {}
        metadata: dict[str, str] = {}
        for path in files:
            try:
                file = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
            except OSError as error:
                raise ValueError(f"cannot read {path}: {error}") from error
            except safetensors.SafetensorError as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"{path} is truncated, or not a safetensors file: {reason}") from error
            metadata |= file.metadata() or {}
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                if name in tensors:
                    raise ValueError(f"tensor {name!r} is in both {tensors[name][0]} and {path}")
                tensors[name] = path, file
        yield Checkpoint(tensors, metadata)


def files_of(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Args:
      path: a file, or a folder with model.safetensors or model.safetensors.index.json.

    Raises:
      ValueError: if there is none, or it is a pickle, or safetensors is not installed.
    """
    require_safetensors()
    if path.is_dir():
        if (path / FILE).is_file():
            return [path / FILE]
        if (path / INDEX).is_file():
            return [path / shard for shard in shards_of(path / INDEX)]
        for file in sorted(path.iterdir()):
            _refuse_pickle(file)
        raise ValueError(f"folder {path} has neither {FILE} nor {INDEX}")
    _refuse_pickle(path)
    if not path.is_file():
        raise ValueError(f"there is no file or folder {path}")
    return [path]


def has_weights(folder: Path) -> bool:
    """Whether a folder has files such as :func:`files_of` takes, or refuses for being pickles."""
    return any(
        path.suffix in _PICKLES or path.suffix == ".safetensors" or path.name == INDEX
        for path in folder.iterdir()
    )


def _refuse_pickle(path: Path) -> None:
    if path.suffix in _PICKLES:
        raise ValueError(
            f"{path} is a pickle, which can run code when it is read; convert it where you trust it: "
            f"safetensors.torch.save_file(torch.load({path.name!r}, weights_only=True), {FILE!r})"
        )


def shards_of(index: Path) -> list[str]:
    """The names of the files that an index speaks of, all of them beside it.

    Raises:
      ValueError: if it is no index, or names a file elsewhere.
    """
    try:
        names = _READER.get(_READER.load(read_document(index)), "weight_map", dict)
    except (OSError, ValueError) as error:
        raise ValueError(f"{index}: {error}") from error
    for shard in names.values():
        is_name = isinstance(shard, str) and Path(shard).name == shard and "\x00" not in shard
        if not is_name or shard in ("", ".."):
            raise ValueError(f"{index} names {shard!r:.100}, which is not a file beside it")
    return sorted(set(names.values()))
