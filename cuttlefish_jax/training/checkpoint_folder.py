"""The folder of a run's checkpoints: which there are, which of them are whole, and which may go."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from cuttlefish_jax.files import sync, sync_tree

# A checkpoint, or one that waits for its replacement under the same step to be whole.
_CHECKPOINT = re.compile(r"(\d+)(\.replaced)?")
_UNFINISHED = re.compile(r"\d+\.orbax-checkpoint-tmp.*")


class CheckpointFolder:
    """Decides what is deleted: nothing that could be needed, whatever happens in the meantime.

    A checkpoint has a rank: twice its step and one more; one that was set aside has the rank below.

    Args:
      path: the folder; it need not exist.
      keep: how many whole checkpoints to keep.
    """

    def __init__(self, path: Path, keep: int):
        self.path = path
        self._keep = keep
        self._verdicts: dict[int, bool] = {}

    def path_of(self, rank: int) -> Path:
        """Where the checkpoint of a rank is, or would be."""
        return self.path / (f"{rank // 2}" if rank % 2 else f"{rank // 2}.replaced")

    def checkpoints(self) -> dict[int, Path]:
        """Every checkpoint by its rank: the newest has the highest."""
        try:
            paths = list(self.path.iterdir())
        except FileNotFoundError:
            return {}
        matches = [(_CHECKPOINT.fullmatch(path.name), path) for path in paths]
        return {2 * int(match[1]) + (not match[2]): path for match, path in matches if match}

    def judge(self, rank: int, is_whole: bool) -> None:
        """Notes what came of reading or writing a checkpoint."""
        self._verdicts[rank] = is_whole

    def is_doubtful(self, step: int) -> bool:
        """Whether there are two checkpoints of a step, and nobody has read the newer one."""
        newer = 2 * step + 1
        return newer not in self._verdicts and {newer, newer - 1} <= self.checkpoints().keys()

    def make_room(self, step: int) -> None:
        """Makes room for a checkpoint whose step exists already, and keeps that if it is whole."""
        newer = 2 * step + 1
        present, is_damaged = self.checkpoints(), self._verdicts.pop(newer, True) is False
        if newer not in present:
            return
        if is_damaged:  # and the run has gone on from one that was set aside, or from an earlier step
            _remove(present[newer])
        else:
            if newer - 1 in present:
                _remove(present[newer - 1])
            present[newer].rename(self.path_of(newer - 1))
            self._verdicts.pop(newer - 1, None)
        sync(self.path)

    def finish(self, step: int) -> None:
        """Deletes what the checkpoint of a step, which is whole, makes superfluous, once that is on the disk.

        These are all but the last whole ones up to this step; later ones, which a run that fell back to an
        earlier checkpoint has left; and what was never finished.
        """
        newest = 2 * step + 1
        sync_tree(self.path_of(newest))
        sync(self.path)
        self._verdicts[newest] = True
        present = self.checkpoints()
        whole = [rank for rank in present if rank <= newest and self._verdicts.get(rank, True)]
        steps = sorted({rank // 2 for rank in whole})[-self._keep :]
        # Of two of a step the older one goes when the newer one is known to be whole.
        kept = {
            rank for rank in whole if rank // 2 in steps and (rank % 2 or not self._verdicts.get(rank + 1))
        }
        paths = list(self.path.iterdir())
        unfinished = [path for path in paths if _UNFINISHED.fullmatch(path.name)]
        for path in [*unfinished, *(path for rank, path in present.items() if rank not in kept)]:
            _remove(path, ignore_errors=True)


def _remove(path: Path, *, ignore_errors: bool = False) -> None:
    if path.is_symlink() or not path.is_dir():  # what is behind a link is somebody else's
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=ignore_errors)
