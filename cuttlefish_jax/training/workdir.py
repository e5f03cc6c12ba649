"""The directory of one run: who it belongs to, its logs and its results.

Every file is written so that a process killed at any moment leaves it readable: JSON files are replaced as
a whole, and logs (one JSON object per line) only grow, so that at most their last line is torn.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
from collections.abc import Collection, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from cuttlefish_jax.errors import WorkdirError, storage_errors
from cuttlefish_jax.files import read_document, replace_file
from cuttlefish_jax.training.lock import check_lock, take_lock

_log = logging.getLogger(__name__)

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# Of the 4096 bytes that systems allow a path, without what the files of checkpoints are called.
_LONGEST_PATH = 3500
# Of ten thousand layers, 500 epochs.
_LARGEST_LOG = 256 * 2**20


class Workdir:
    """A run's directory, held by this process alone until :meth:`close` or its death.

    Args:
      path: the directory; it is made if it is missing.
      is_writer: whether this process writes; of several hosts that share the directory only the first one
        does. Everything that writes does nothing on the others.

    Raises:
      WorkdirError: if another process runs in the same directory, or its name is not one of a directory.
      StorageError: if the directory cannot be made or written; a finished run's need not be written.
    """

    def __init__(self, path: str | os.PathLike[str], *, is_writer: bool = True):
        self.path = Path(path)
        self.is_writer = is_writer
        self._lock: int | None = None
        with storage_errors(self.path):
            _check_name(os.fspath(path))
            self.path.mkdir(parents=True, exist_ok=True)
            if is_writer:
                try:
                    self._lock = take_lock(self.path)
                except OSError as error:
                    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not self.is_finished:
                        raise

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
        """Whether a run came to its end here: behind ``summary.json`` it writes nothing but a picture."""
        return os.path.exists(self.path / "summary.json")

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
            Also if a run has left something here, but not its settings.
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
            self._check_free()
            return True
        try:
            theirs = _flatten(json.loads(_to_json(defaults or {}))) | _flatten(theirs)
        except RecursionError as error:
            raise self._damaged("config.json", error) from error
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

    def _check_free(self) -> None:
        """Refuses what a run without its settings has left: those of the next one may be others."""
        for folder in ("checkpoints", "best"):
            with storage_errors(self.path / folder, action="read"), contextlib.suppress(FileNotFoundError):
                # What is not of a checkpoint may be a file manager's.
                if any(name[0].isdecimal() for name in os.listdir(self.path / folder)):
                    raise self._without_settings(folder)
        for name in ("metrics.jsonl", "summary.json"):
            if os.path.lexists(self.path / name):
                raise self._without_settings(name)
        # The ranks of a new network are written before the settings are known to be right.
        if any(record["epoch"] > 0 for record in self.read_log("ranks.jsonl")):
            raise self._without_settings("ranks.jsonl")

    def _without_settings(self, found: str) -> WorkdirError:
        return WorkdirError(
            f"{self.path} has {found} and no config.json, which says with what settings that was trained. "
            "Restore the file, or give another --workdir"
        )

    def read_json(self, name: str, kind: type = dict) -> Any | None:
        """The contents of a JSON file, or None if there is none.

        Args:
          name: of the file.
          kind: what type they are of.

        Raises:
          WorkdirError: if the file is not JSON, or of another type.
        """
        file = self.path / name
        with storage_errors(file, action="read"):
            try:
                document = json.loads(read_document(file))
            except FileNotFoundError:
                return None
            except (ValueError, RecursionError) as error:
                raise self._damaged(name, error) from error
        if not isinstance(document, kind):
            raise self._damaged(name, f"it is {_name(document)}, not {_name(kind())}")
        return document

    def _damaged(self, name: str, reason: object) -> WorkdirError:
        return WorkdirError(
            f"{self.path / name} is damaged ({reason}). Give another --workdir, or restore the file"
        )

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
          WorkdirError: if the directory may be another run's by now.
        """
        if not self.is_writer:
            return
        if self._lock is not None:
            check_lock(self.path, self._lock)
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
          WorkdirError: if any other line is not a JSON object with an ``"epoch"``; or the file is too large.
        """
        file = self.path / name
        with storage_errors(file, action="read"):
            try:
                text = read_document(file, largest=_LARGEST_LOG)
            except FileNotFoundError:
                return []
            except ValueError as error:
                raise self._damaged(name, error) from error
        lines = text.split(b"\n")[:-1]  # what is behind the last newline was torn
        return [self._record(name, number, line) for number, line in enumerate(lines, 1)]

    def _record(self, name: str, number: int, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"it is {_name(record)}, not {_name({})}")
            if type(record.get("epoch")) is not int:
                raise ValueError('it has no "epoch"')
        except (ValueError, RecursionError) as error:
            # Python counts lines within what it is given, and that is one.
            reason = (
                f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            )
            raise WorkdirError(
                f"{self.path / name} is damaged, in line {number} ({reason}). Delete its bad lines, or give "
                "another --workdir"
            ) from error
        return record

    def rewind_log(self, name: str, *, epoch: int, last: int | None = None) -> None:
        """Drops the lines of ``epoch`` and later ones, which a resumed run will write again.

        Lines before that which are missing cannot be had again: a warning, and no reason not to go on.

        Args:
          name: the log; each of its lines has an ``"epoch"``.
          epoch: the epoch that the run goes on with.
          last: the last epoch that the log has; None if there is no such.
        """
        kept = [record for record in self.read_log(name) if record["epoch"] < epoch]
        there = {record["epoch"] for record in kept}
        expected = range(epoch if last is None else min(epoch, last + 1))
        missing = [number for number in expected if number not in there]
        if missing and self.is_writer:
            _log.warning(
                "%s has lost %d of its lines, that of epoch %d first: the run goes on without them",
                self.path / name, len(missing), missing[0],
            )  # fmt: skip
        if os.path.exists(self.path / name):
            self._replace(self.path / name, "".join(_to_json(record) + "\n" for record in kept))

    def _replace(self, file: Path, text: str) -> None:
        if self.is_writer:
            with storage_errors(file):
                replace_file(file, text.encode())


def _check_name(name: str) -> None:
    if _SCHEME.match(name):
        raise WorkdirError(
            f"{name} is not on this machine's file system, where a run writes: mount that storage, and give "
            "the folder as --workdir"
        )
    try:
        length = len(os.path.abspath(name).encode())
    except UnicodeEncodeError as error:
        raise WorkdirError(f"--workdir={name!a}: its name is not UTF-8. Give another one") from error
    if length > _LONGEST_PATH:
        raise WorkdirError(
            f"--workdir={name[:40]}...: its path has {length} bytes. Give one of at most {_LONGEST_PATH}: "
            "the files in it have longer ones"
        )


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


_NAMES = {dict: "an object", list: "a list", str: "a text", type(None): "null"}


def _name(value: Any) -> str:
    """What JSON calls a value's type."""
    return _NAMES.get(type(value), "a number or a truth value")


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _show(flat: Mapping[str, Any], key: str) -> str:
    return json.dumps(flat[key]) if key in flat else "not set"
