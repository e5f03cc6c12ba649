"""The directory of one run: who it belongs to, its logs and its results.

Every file is written so that a process killed at any moment leaves it readable: JSON files are replaced as
a whole, and logs (one JSON object per line) only grow, so that at most their last line is torn.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Collection, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from cuttlefish_jax.errors import WorkdirError, storage_errors
from cuttlefish_jax.files import read_document, replace_file

_log = logging.getLogger(__name__)


class Workdir:
    """A run's directory, held by this process alone until :meth:`close` or its death.

    Args:
      path: the directory; it is made if it is missing.
      is_writer: whether this process writes; of several hosts that share the directory only the first one
        does. Everything that writes does nothing on the others.

    Raises:
      WorkdirError: if another process runs in the same directory.
      StorageError: if the directory cannot be made or written.
    """

    def __init__(self, path: str | os.PathLike[str], *, is_writer: bool = True):
        self.path = Path(path)
        self.is_writer = is_writer
        self._lock: int | None = None
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if is_writer:
                self._lock = _lock(self.path)

    def __enter__(self) -> Workdir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets other processes have the directory."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def checkpoints(self) -> Path:
        """Where the run's checkpoints are."""
        return self.path / "checkpoints"

    @property
    def is_finished(self) -> bool:
        """Whether a run came to its end here: ``summary.json`` is the last thing that it writes."""
        return (self.path / "summary.json").exists()

    def claim(
        self,
        config: Mapping[str, Any],
        *,
        ignore: Collection[str] = (),
        defaults: Mapping[str, Any] | None = None,
    ) -> bool:
        """Makes the directory that of a run with these settings, or checks that it is.

        Args:
          config: the run's settings, nested, of JSON types (tuples count as lists); a ConfigDict or a dict.
          ignore: dotted names of settings that may change between a run and its continuation.
          defaults: of settings, nested: one that the run was started without, by an older version, had that.

        Returns:
          Whether there was no run here before.

        Raises:
          WorkdirError: if the directory belongs to a run with other settings; the message has all of them.
        """
        is_free = self.check(config, ignore=ignore, defaults=defaults)
        if is_free:
            self.write_json("config.json", json.loads(_to_json(config)))
        return is_free

    def check(
        self,
        config: Mapping[str, Any],
        *,
        ignore: Collection[str] = (),
        defaults: Mapping[str, Any] | None = None,
    ) -> bool:
        """As :meth:`claim`, but a directory without a run stays free: its settings may yet turn out wrong."""
        ours = json.loads(_to_json(config))
        theirs = self.read_json("config.json")
        if theirs is None:
            return True
        theirs = _flatten(json.loads(_to_json(defaults or {}))) | _flatten(theirs)
        ours = _flatten(ours)
        different = [
            f"{key} (there {_show(theirs, key)}, here {_show(ours, key)})"
            for key in dict.fromkeys([*theirs, *ours])
            if key not in ignore and _show(theirs, key) != _show(ours, key)
        ]
        if different:
            raise WorkdirError(
                f"{self.path} belongs to a run with other settings: {', '.join(different)}. "
                "Give another --workdir, or the same settings to go on with that run"
            )
        return False

    def read_json(self, name: str) -> Any | None:
        """The contents of a JSON file, or None if there is none.

        Raises:
          WorkdirError: if the file is not JSON.
        """
        file = self.path / name
        with storage_errors(file, action="read"):
            try:
                return json.loads(read_document(file))
            except FileNotFoundError:
                return None
            except (ValueError, RecursionError) as error:
                raise WorkdirError(
                    f"{file} is damaged ({error}). Give another --workdir, or restore the file"
                ) from error

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file in one step: a reader finds the old one or the new one, never a part.

        Numbers and arrays of numpy and jax become plain ones.

        Raises:
          StorageError: if the disk is full; the old file is still there.
        """
        self._replace(self.path / name, _to_json(value, indent=2) + "\n")

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Adds one line to a log, and sees to it that the line is on the disk.

        Raises:
          StorageError: if the disk is full; no part of the line is left.
        """
        if not self.is_writer:
            return
        file = self.path / name
        line = (_to_json(record) + "\n").encode()
        # Unbuffered: nothing may be left in a buffer, to be written after a failure was cleaned up.
        with storage_errors(file), open(file, "a+b", buffering=0) as stream:
            end = _end_of_last_whole_line(stream)
            try:
                stream.truncate(end)
                rest = memoryview(line)
                while rest:
                    rest = rest[stream.write(rest) :]
                os.fsync(stream.fileno())
            except OSError:
                stream.truncate(end)
                raise

    def read_log(self, name: str) -> list[dict[str, Any]]:
        """The lines of a log; a torn last one is left out, a missing file is an empty log.

        Raises:
          WorkdirError: if any other line is damaged.
        """
        file = self.path / name
        with storage_errors(file, action="read"):
            try:
                text = file.read_bytes()
            except FileNotFoundError:
                return []
        lines = text[: text.rfind(b"\n") + 1].splitlines()
        try:
            return [json.loads(line) for line in lines]
        except (ValueError, RecursionError) as error:
            raise WorkdirError(
                f"{file} is damaged ({error}). Delete its bad lines, or give another --workdir"
            ) from error

    def rewind_log(self, name: str, *, epoch: int) -> None:
        """Drops the lines of ``epoch`` and later ones, which a resumed run will write again.

        Args:
          name: the log; each of its lines has an ``"epoch"``.
          epoch: the epoch that the run goes on with.
        """
        kept = [record for record in self.read_log(name) if record["epoch"] < epoch]
        if (self.path / name).exists():
            self._replace(self.path / name, "".join(_to_json(record) + "\n" for record in kept))

    def _replace(self, file: Path, text: str) -> None:
        if self.is_writer:
            with storage_errors(file):
                replace_file(file, text.encode())


def _lock(directory: Path) -> int:
    """An open file descriptor that holds the lock; the system drops it when the process dies."""
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
    os.pwrite(descriptor, f"{os.getpid()} on {os.uname().nodename}\n".encode(), 0)
    return descriptor


def _end_of_last_whole_line(stream: FileIO) -> int:
    """Where the next line of a log begins: after the last newline, if a killed process tore a line."""
    position = stream.seek(0, os.SEEK_END)
    while position:
        start = max(0, position - 4096)
        stream.seek(start)
        newline = stream.read(position - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        position = start
    return 0


def _to_json(value: Any, *, indent: int | None = None) -> str:
    value = value.to_dict() if hasattr(value, "to_dict") else value
    return json.dumps(value, indent=indent, default=_plain)


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{value!r} of type {type(value).__name__} cannot be written as JSON")


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _show(flat: Mapping[str, Any], key: str) -> str:
    return json.dumps(flat[key]) if key in flat else "not set"
