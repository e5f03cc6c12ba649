"""One process in a run's directory: a lock, which its death opens."""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path

from cuttlefish_jax.errors import WorkdirError, storage_errors

_log = logging.getLogger(__name__)


def take_lock(directory: Path) -> int:
    """An open file descriptor that holds the lock; the system drops it when the process dies.

    Raises:
      WorkdirError: if another process has it.
      OSError: if the lock cannot be written.
    """
    descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(descriptor, 100, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise WorkdirError(
            f"another run is working in {directory} (process {owner}). Wait for its end, or give another "
            "--workdir"
        ) from None
    except OSError as error:
        # Some network file systems have no locks; that is no reason not to train on them.
        _log.warning("cannot lock %s (%s): make sure that no other run uses it", directory, error)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, _owner(), 0)
    return descriptor


def check_lock(directory: Path, descriptor: int) -> None:
    """Looks whether the lock is still the one that others will find.

    Raises:
      WorkdirError: if it is not: somebody has deleted it.
    """
    file = directory / ".lock"
    with storage_errors(file, action="read"):
        try:
            # Some file systems give a file another number from time to time: then its contents tell.
            if os.path.samestat(file.stat(), os.fstat(descriptor)) or file.read_bytes() == _owner():
                return
        except FileNotFoundError:
            pass
    raise WorkdirError(
        f"{file} was deleted while this run worked, so another one may be in {directory} by now: see to it "
        "that there is none, and start the same command again, to go on from the last checkpoint"
    )


def _owner() -> bytes:
    return f"{os.getpid()} on {os.uname().nodename}\n".encode()
