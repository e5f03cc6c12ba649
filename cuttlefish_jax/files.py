"""Files that are whole at any moment, and what is not trusted bounded before it is read."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np


def replace_file(file: Path, contents: bytes) -> None:
    """Writes a file in one step: to a temporary one beside it, which is then renamed.

    Args:
      file: the file; its directory exists.
      contents: all that will be in it.

    Raises:
      OSError: as the file system says; the old file is still there, and nothing else.
    """
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(contents)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(file.parent)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk, to be there after a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Waits until all of a directory is on the disk: its files and its own names, not its name."""
    for parent, _, names in os.walk(directory, topdown=False):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


def check_space(directory: Path, sizes: Iterable[int], *, files: int) -> None:
    """Looks whether a disk has space for files before the first one is begun.

    Args:
      directory: where they will be; it exists.
      sizes: of the files, in bytes; of directories each file system has its own.
      files: how many files and directories there will be in all.

    Raises:
      OSError: ENOSPC, with what is short, if it has not.
    """
    disk = os.statvfs(directory)
    block = disk.f_frsize
    needed = sum(-(-size // block) for size in sizes) * block
    free = disk.f_bavail * block
    if needed > free:
        short = f"{needed / 2**20:,.1f} MiB, and {free / 2**20:,.1f} are free"
    elif disk.f_files > 0 and disk.f_favail < files:  # 0: as many as there is space for
        short = f"{files:,} inodes, and {disk.f_favail:,} are free"
    else:
        return
    raise OSError(errno.ENOSPC, f"it needs {short}")


# A plan of ten thousand layers has a tenth of it.
_LARGEST_DOCUMENT = 64 * 2**20


def read_document(path: Path, *, largest: int = _LARGEST_DOCUMENT) -> bytes:
    """The contents of a JSON document that is not trusted.

    Args:
      path: of the document.
      largest: how many bytes it may have.

    Raises:
      OSError: if the file cannot be read.
      ValueError: if it is too large for what it should be.
    """
    with path.open("rb") as file:
        content = file.read(largest + 1)
    _check_size(len(content), largest)
    return content


def check_document(path: Path) -> None:
    """Looks at the size of a JSON document that something else will read.

    Raises:
      OSError: if there is no such file.
      ValueError: if it is too large for what it should be.
    """
    try:
        _check_size(path.stat().st_size)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


def _check_size(size: int, largest: int = _LARGEST_DOCUMENT) -> None:
    if size > largest:
        raise ValueError(f"it has more than {largest // 2**20} MiB, too much for such a document")


def check_memory(arrays: Iterable[tuple[Sequence[int], str]]) -> None:
    """Looks at what arrays a file declares before memory is taken for them.

    Args:
      arrays: shape and dtype of each.

    Raises:
      ValueError: if one is no array of numbers, or together they are larger than this machine's memory.
    """
    needed = 0
    for shape, dtype in arrays:
        itemsize = np.dtype(dtype).itemsize
        if np.dtype(dtype).hasobject or itemsize > 16 or min(shape, default=0) < 0:
            raise ValueError(f"it declares an array of type {dtype!r:.40} and shape {list(shape)!s:.80}")
        needed += math.prod(shape) * itemsize
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ValueError(
            f"it declares arrays of {needed / 2**30:,.1f} GiB, and this machine has {memory / 2**30:,.1f}"
        )
