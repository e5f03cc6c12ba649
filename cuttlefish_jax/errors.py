"""Problems that the user can mend: one line that names the thing and the way out, and no traceback."""

from __future__ import annotations

import contextlib
import errno
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """A problem outside the code; ``train.py`` prints the message alone and exits with status 2."""


class ConfigError(UserError):
    """A setting that makes no sense, or that names something which does not exist."""


class WorkdirError(UserError):
    """A working directory that belongs to another run, is in use, or was damaged."""


class CheckpointError(UserError):
    """Checkpoints that are damaged, or that belong to another model."""


class DivergedError(UserError):
    """Training whose numbers are not finite."""


class StorageError(UserError):
    """A disk that is full, or a directory that cannot be read or written."""


class HostLostError(UserError):
    """Another host of the run has failed or cannot be reached: nothing that needs it can be waited for."""


def check_setting(key: str, value: Any, is_valid: bool, rule: str) -> None:
    """Refuses a setting that makes no sense.

    Args:
      key: the setting's name.
      value: what it is.
      is_valid: whether that makes sense; an infinite number or NaN never does.
      rule: what it must be, for the message.

    Raises:
      ConfigError: names the setting, its value and what it must be.
    """
    if not is_valid or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(f"{key} = {value!r}: it must be {rule}")


_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_NOT_A_DIRECTORY = (errno.ENOTDIR, errno.EEXIST)


@contextlib.contextmanager
def storage_errors(path: str | Path, *, action: str = "write", option: str = "--workdir") -> Iterator[None]:
    """Turns what the file system refuses into a :class:`StorageError` that names ``path``.

    Libraries written in C++ report a full disk, missing permissions and files where directories should be as
    text in an exception of another type, and asynchronous ones as the cause of one; these are recognised.
    Every other exception passes through unchanged, and when reading also that a file below ``path`` is
    missing or of another kind: then what is there is damaged, and the storage is not to blame.

    Args:
      path: what is being written or read.
      action: what is being done to it, for the message.
      option: what the user can give to have it elsewhere.

    Raises:
      StorageError: in place of the errors described above, which become its cause.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if action == "read" and _is_below(error, path):
            raise
        advice = _advice(error, Path(path), option)
        if advice is None:
            raise
        raise StorageError(f"cannot {action} {path}: {advice}") from error


def _advice(error: BaseException, path: Path, option: str) -> str | None:
    """What went wrong and what to do about it; None if it is not about storage."""
    chain = _chain(error)
    if _any_of(chain, _FULL):
        # files.check_space knows how much is missing.
        told = [e.strerror for e in chain if isinstance(e, OSError) and e.errno in _FULL and e.strerror]
        short = next((text for text in told if text.startswith("it needs ")), None) or _free_space(path)
        return (
            f"no space left on the disk ({short}). Free some, or give a {option} on "
            "another disk; what was saved before is whole, and the same command goes on from there"
        )
    if _any_of(chain, _FORBIDDEN):
        return f"permission denied. Change the permissions, or give another {option}"
    if _any_of(chain, _NOT_A_DIRECTORY):
        parts = (part for part in (path, *path.parents) if os.path.exists(part) and not os.path.isdir(part))
        return f"{next(parts, 'a part of this path')} is a file, not a directory. Give another {option}"
    found = _system_error(error)
    return None if found is None else f"{os.strerror(found[1])}. Mend that, or give another {option}"


def _system_error(error: BaseException | None) -> tuple[OSError, int] | None:
    """The error of the file system, and its number, that an error is or was made from."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error, error.errno
        error = error.__cause__
    return None


def _is_below(error: BaseException, path: str | Path) -> bool:
    """Whether an error is that a file below ``path``, not that itself, is missing or of another kind."""
    found = _system_error(error)
    kinds = FileNotFoundError | IsADirectoryError | NotADirectoryError
    return found is not None and isinstance(found[0], kinds) and str(found[0].filename) != str(path)


def _chain(error: BaseException) -> list[BaseException]:
    """The error, its causes, and the members of exception groups."""
    found: list[BaseException] = []
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is None or any(current is seen for seen in found):
            continue
        found.append(current)
        pending += [current.__cause__, current.__context__]
        if isinstance(current, BaseExceptionGroup):
            pending += current.exceptions
    return found


def _any_of(chain: list[BaseException], numbers: tuple[int, ...]) -> bool:
    texts = [os.strerror(number) for number in numbers]
    for error in chain:
        if isinstance(error, OSError) and error.errno is not None:
            if error.errno in numbers:
                return True
        # tensorstore: "RESOURCE_EXHAUSTED: ... [OS error 28: ENOSPC No space left on device]"
        elif any(text in str(error) for text in texts):
            return True
    return False


def _free_space(path: Path) -> str:
    existing = next((p for p in (path, *path.absolute().parents) if os.path.exists(p)), Path("/"))
    space = os.statvfs(existing)
    # Some file systems do not count them, and have 0 of 0.
    if space.f_files and not space.f_favail:
        return "no inodes left: it has as many files as it can have, whatever their size"
    return f"{space.f_bavail * space.f_frsize / 2**20:.0f} MiB free"
