"""Files that are whole at any moment."""

from __future__ import annotations

import os
from pathlib import Path


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
    directory = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
