"""Prints for people, who may have stopped to listen: what cannot be printed never ends a run."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, TextIO


def say(text: str, *, stream: TextIO | None = None) -> None:
    """Prints a text, if that is possible.

    It is not if the reader is gone (``| head``, or ``| tee`` that Ctrl-C has ended too), if output goes to a
    file on a full disk, or if a terminal was closed.

    Args:
      text: what to print; letters that the stream does not have are escaped.
      stream: where to; standard output by default.
    """
    stream = sys.stdout if stream is None else stream
    if stream is None:  # Python's, where the descriptor was closed
        return
    try:
        try:
            print(text, file=stream, flush=True)
        except UnicodeEncodeError:
            print(text.encode("ascii", "backslashreplace").decode(), file=stream, flush=True)
    except OSError as error:
        _forget(stream, for_good=isinstance(error, BrokenPipeError))


class Deaf:
    """A stream that takes everything, also what the stream it stands for cannot take."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes a text, if that is possible."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Sees to it that what was written is seen, if that is possible."""
        try:
            self._stream.flush()
        except OSError as error:
            _forget(self._stream, for_good=isinstance(error, BrokenPipeError))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _forget(stream: TextIO, *, for_good: bool) -> None:
    """Drops what a stream has kept; else Python fails to write it at exit, and changes the exit status.

    Args:
      stream: that could not be written.
      for_good: whether all that follows is to be dropped, too. A full disk may have space again.
    """
    # Streams without a file, as of notebooks, have nothing to drop.
    with contextlib.suppress(OSError, ValueError):
        descriptor = stream.fileno()
        before, nowhere = os.dup(descriptor), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        with contextlib.suppress(OSError):
            stream.flush()
        if not for_good:
            os.dup2(before, descriptor)
        os.close(nowhere)
        os.close(before)
