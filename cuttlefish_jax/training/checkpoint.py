"""Checkpoints: arrays and a JSON record, saved in the background, verified to the last bit when read.

A checkpoint is the directory ``<step>/`` with two orbax items: ``arrays``, a flat mapping path -> array, and
``record``, JSON that has what the caller wants to know before it can build the arrays' tree (phase, plan,
tracker), and the SHA-256 of every array and of itself. So reading has two phases: all bytes are verified with
no model at hand, and :meth:`Restored.into` then puts them into the tree which the record asks for.

orbax's CheckpointManager believes every directory that it finds; which of them to trust, replace and delete
is the whole point here, so it is decided here and in ``checkpoint_folder.py``, on top of orbax's
AsyncCheckpointer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from cuttlefish_jax.errors import (
    CheckpointError,
    HostLostError,
    StorageError,
    UserError,
    storage_errors,
)
from cuttlefish_jax.files import check_memory, check_space
from cuttlefish_jax.training.agreement import smallest_of_hosts
from cuttlefish_jax.training.checkpoint_document import (
    FORMAT,
    digest,
    digest_of_json,
    make_document,
    stored_names,
)
from cuttlefish_jax.training.checkpoint_folder import CheckpointFolder
from cuttlefish_jax.training.leaves import host_leaves, named_leaves, stored_shape
from cuttlefish_jax.training.orbax_tree import check_files, declared_arrays

_log = logging.getLogger(__name__)

# What orbax writes besides arrays: documents and directories.
_OTHER_FILES = 16
# Errors that missing and exchanged files make.
_OF_FILES = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR)


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read whole.

    Attributes:
      step: the step that it was saved at.
      record: what the caller saved beside the arrays.
      directory: where it is.
    """

    step: int
    record: dict[str, Any]
    directory: Path
    leaves: Mapping[str, np.ndarray] = dataclasses.field(repr=False)
    key_types: Mapping[str, str] = dataclasses.field(repr=False)

    def into(self, abstract: Any, *, defaults: Any = None) -> Any:
        """The arrays in the tree that they were saved from, bit for bit.

        Args:
          abstract: that tree, of ``jax.ShapeDtypeStruct`` (from ``jax.eval_shape``) or of arrays.
          defaults: parts of that tree, as dicts of arrays, for what older versions did not save.

        Returns:
          The same tree of numpy arrays, on the host; random keys are jax arrays.

        Raises:
          CheckpointError: if the checkpoint is of another tree; the message has the first difference.
        """
        wanted = named_leaves(jax.eval_shape(lambda tree: tree, abstract))
        added = {name: leaf for name, leaf in host_leaves(defaults)[0].items() if name in wanted}
        leaves = {**added, **self.leaves}
        for name in [*wanted, *leaves]:
            ours, theirs = wanted.get(name), leaves.get(name)
            expected = None if ours is None else _describe(stored_shape(ours), ours.dtype)
            found = None if theirs is None else _describe(theirs.shape, self._dtype(name, theirs))
            if expected != found:
                raise CheckpointError(
                    f"the checkpoint {self.directory} is of another model: {name} is {found or 'missing'} "
                    f"there and {expected or 'not needed'} here. Use the settings that it was made with, or "
                    "another --workdir"
                )
        ordered = [
            jax.random.wrap_key_data(jnp.asarray(leaves[name]), impl=self.key_types[name])
            if name in self.key_types
            else leaves[name]
            for name in wanted
        ]
        return jax.tree.unflatten(jax.tree.structure(abstract), ordered)

    def _dtype(self, name: str, leaf: np.ndarray) -> Any:
        key_type = self.key_types.get(name)
        return leaf.dtype if key_type is None else jax.random.key(0, impl=key_type).dtype


class Checkpointer:
    """Saves and restores the checkpoints of one run.

    Every host calls every method; orbax lets the first one write. Arrays that are split over devices or hosts
    are saved whole, so that a run may go on with others. The directory is shared by the hosts.

    Args:
      directory: where the checkpoints are; made at the first save.
      keep: how many of the last checkpoints to keep.

    Raises:
      ValueError: if ``keep`` is not positive.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep = {keep}: at least one checkpoint has to be kept")
        self.directory = Path(directory).absolute()
        self._folder = CheckpointFolder(self.directory, keep)
        self._unfinished: int | None = None
        self._has_failed = False
        logging.getLogger("absl").addFilter(_is_news)
        # With directories made in the background, orbax waits five minutes for one that cannot be made.
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                # Through OCDBT, every save would keep memory for every array (docs/reliability.md).
                arrays=ocp.StandardCheckpointHandler(use_ocdbt=False),
                record=ocp.JsonCheckpointHandler(),
            ),
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        )

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # To be whole, a save needs all hosts.
        if kind is None or not issubclass(kind, HostLostError):
            self.close()

    def save(self, step: int, arrays: Any, record: Mapping[str, Any]) -> None:
        """Starts to save; the arrays may be donated or changed as soon as it returns.

        Nothing is deleted before the new checkpoint is whole, and on the disk. One with the same step is then
        replaced, and later ones, which a run that fell back to an earlier checkpoint has left, are removed.

        Args:
          step: number of the checkpoint.
          arrays: a tree of arrays; Python numbers become what jax makes of them, random keys are supported.
          record: JSON to be read before the arrays.

        Raises:
          StorageError: if the disk is full or the directory cannot be written. That of an earlier save,
            which went on in the background, is raised here too.
        """
        self.wait()
        leaves, key_types = host_leaves(arrays)
        payload = make_document(step, record, leaves, key_types)
        files = stored_names(payload["leaves"])
        stored = {file: leaves[name] for name, file in files.items()}
        with self._storage_errors():
            if not smallest_of_hosts(int(not self._folder.is_doubtful(step))):
                self._is_whole(2 * step + 1)
            if jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                # orbax tells of a full disk by hundreds of lines.
                sizes = [size for leaf in stored.values() for size in (leaf.nbytes, 1)]
                check_space(self.directory, sizes, files=3 * len(stored) + _OTHER_FILES)
                self._folder.make_room(step)
            _barrier("checkpoint_save")
            self._orbax.save(
                self.directory / str(step),
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardSave(stored), record=ocp.args.JsonSave(payload)
                ),
            )
        self._unfinished = step

    def wait(self) -> None:
        """Waits until the last save is on the disk, then deletes what it makes superfluous.

        Raises:
          StorageError: if the save failed for lack of space or permission.
        """
        with self._storage_errors():
            # Forgotten first: a save that failed must not be taken for whole when this is called again.
            step, self._unfinished = self._unfinished, None
            self._orbax.wait_until_finished()
            if step is not None:
                self._finish(step)

    def close(self) -> None:
        """Waits for the last save and ends orbax's threads.

        Raises:
          StorageError: as :meth:`wait`, unless a failure was raised before.
        """
        was_reported = self._has_failed
        try:
            with self._storage_errors():
                try:
                    self.wait()
                finally:
                    self._orbax.close()
        except StorageError:
            # orbax raises the failures of a save one after the other, and the first has told it all.
            if not was_reported:
                raise

    def restore(self) -> Restored | None:
        """Reads the last whole checkpoint. Nothing is changed on the disk.

        A damaged checkpoint (files missing, cut short or altered, or a save that was cut off) is passed over
        with a warning that names it.

        Returns:
          The checkpoint, or None if none was ever finished.

        Raises:
          CheckpointError: if there are checkpoints and none of them is whole, or the last one is of a newer
            version of this package: going on from an older one would lose what that has trained.
          StorageError: if the directory cannot be read.
        """
        with storage_errors(self.directory, action="read"):
            candidates = self._folder.checkpoints()
        damages = []
        while (rank := smallest_of_hosts(max(candidates, default=-1))) >= 0:
            damage, restored = self._judged(rank)
            if restored is not None:
                return restored
            damages.append(f"{self._folder.path_of(rank).name}: {damage}")
            _log.warning("passing over a damaged checkpoint, %s/%s", self.directory, damages[-1])
            candidates = {r: path for r, path in candidates.items() if r < rank}
        if not damages:
            return None
        raise CheckpointError(
            f"no checkpoint in {self.directory} is whole ({'; '.join(damages)}). Nothing was deleted: mend "
            "them, or start again with another --workdir"
        )

    @contextlib.contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            with storage_errors(self.directory, action="save a checkpoint in"):
                yield
        except StorageError:
            self._has_failed = True
            raise

    def settle(self, step: int) -> bool:
        """Whether the checkpoint of a step is there and whole; if so, what it makes superfluous is deleted.

        Raises:
          StorageError: if the directory cannot be read.
        """
        with self._storage_errors():
            if not self._is_whole(2 * step + 1):
                return False
            self._finish(step)
        return True

    def _finish(self, step: int) -> None:
        self._folder.judge(2 * step + 1, is_whole=True)
        if jax.process_index() == 0:
            self._folder.finish(step)

    def _is_whole(self, rank: int) -> bool:
        return self._judged(rank)[1] is not None

    def _judged(self, rank: int) -> tuple[str, Restored | None]:
        """What is wrong with a checkpoint on any host, or its contents; the folder is told."""
        damage, restored = self._read(self._folder.path_of(rank))
        if not smallest_of_hosts(int(restored is not None)) and restored is not None:
            damage, restored = "another host found it damaged", None
        self._folder.judge(rank, restored is not None)
        return damage, restored

    def _read(self, directory: Path) -> tuple[str, Restored | None]:
        """What is wrong with a checkpoint, or its contents."""
        with storage_errors(directory, action="read"):
            try:
                return "", self._verified(directory)
            except (UserError, MemoryError):
                raise
            except _DamagedError as error:
                return str(error), None
            except Exception as error:
                if of_disk := _disk_error(error):
                    raise of_disk from error
                # Whatever orbax, tensorstore and json throw at broken files: there is no list of it.
                first_line = str(error).strip().partition("\n")[0][:300]
                return f"its files are damaged ({type(error).__name__}: {first_line})", None

    def _verified(self, directory: Path) -> Restored:
        if not ocp.utils.is_checkpoint_finalized(directory):
            raise _DamagedError("it was never finished, or is half deleted")
        check_files(directory)
        record_args = ocp.args.Composite(record=ocp.args.JsonRestore())
        payload = self._orbax.restore(directory, args=record_args)["record"]
        stated = payload.pop("sha256")
        if digest_of_json(payload) != stated:
            raise _DamagedError("its record was altered")
        if payload["format"] > FORMAT:
            raise CheckpointError(
                f"the checkpoint {directory} is of format {payload['format']}, and this version of "
                f"cuttlefish_jax reads formats up to {FORMAT}: update it, or give another --workdir"
            )
        specs: dict[str, dict[str, Any]] = payload["leaves"]
        check_memory((spec["shape"], spec["dtype"]) for spec in specs.values())
        declared_arrays(directory / "arrays")
        # Host arrays without memory: orbax then reads to the host, whatever devices were there at the save.
        arrays = {
            name: np.broadcast_to(np.zeros((), spec["dtype"]), spec["shape"]) for name, spec in specs.items()
        }
        files = stored_names(specs)
        abstract = {file: arrays[name] for name, file in files.items()}
        arrays_args = ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract))
        read = self._orbax.restore(directory, args=arrays_args)["arrays"]
        arrays |= {name: read[file] for name, file in files.items()}
        for name, spec in specs.items():
            # Of the bytes alone: they could as well be those of another shape.
            same = list(arrays[name].shape) == spec["shape"] and arrays[name].dtype.name == spec["dtype"]
            if not same or digest(arrays[name]) != spec["sha256"]:
                raise _DamagedError(f"its array {name} was altered")
        key_types = {name: spec["key_type"] for name, spec in specs.items() if "key_type" in spec}
        for name, key_type in key_types.items():
            jax.random.wrap_key_data(jnp.asarray(arrays[name]), impl=key_type)
        return Restored(payload["step"], payload["record"], directory, arrays, key_types)


class _DamagedError(Exception):
    """A checkpoint is not what was saved."""


def _disk_error(error: BaseException | None) -> OSError | None:
    """What the disk said, if it is to blame for an error: to try again may help, and nothing is damaged."""
    while error is not None:
        # tensorstore: "... [OS error 116: ESTALE Stale file handle]"
        told = re.search(r"\[OS error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        if number is not None and number not in _OF_FILES:
            return OSError(number, os.strerror(number))
        error = error.__cause__ or error.__context__
    return None


def _is_news(message: logging.LogRecord) -> bool:
    """What orbax says of a save that fails comes as an error, too; and OCDBT has nothing to merge here."""
    is_told = "orbax" in Path(message.pathname).parts and message.exc_info is not None
    return not is_told and "Skipping merge of OCDBT" not in str(message.msg)


def _describe(shape: tuple[int, ...], dtype: Any) -> str:
    return f"{dtype}[{', '.join(map(str, shape))}]"


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
