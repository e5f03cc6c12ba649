"""Where a run starts: at the last whole checkpoint, or anew."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

from cuttlefish_jax.errors import CheckpointError
from cuttlefish_jax.training.agreement import agree, agreed_outcome
from cuttlefish_jax.training.method import make_tracker
from cuttlefish_jax.training.progress import Progress

if TYPE_CHECKING:
    from cuttlefish_jax import RankTracker
    from cuttlefish_jax.training.checkpoint import Checkpointer, Restored
    from cuttlefish_jax.training.experiment import Experiment, Phase
    from cuttlefish_jax.training.rank_meter import RankMeter
    from cuttlefish_jax.training.state import TrainState

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run begins with.

    Attributes:
      progress: where it stands.
      phase: full-rank or low-rank.
      state: on the devices.
      is_resumed: whether that is from a checkpoint.
    """

    progress: Progress
    phase: Phase
    state: TrainState
    is_resumed: bool

    @property
    def place(self) -> tuple[int, int, str]:
        """Epochs and steps of the next one that are done, and the phase: what tells checkpoints apart."""
        return self.progress.epoch, self.progress.totals.steps, self.phase.name


def start(
    experiment: Experiment, checkpointer: Checkpointer, meter: RankMeter, *, epochs_logged: int
) -> Start:
    """The state of the last whole checkpoint, or a new one.

    Args:
      experiment: the fixed parts of the run.
      checkpointer: of its checkpoints.
      meter: of its ranks.
      epochs_logged: how many epochs the workdir has the numbers of.

    Raises:
      CheckpointError: if there are checkpoints, and none that the run could go on from; or none where there
        have to be.
      ConfigError: if the pre-trained weights do not fit the network.
    """
    tracker = make_tracker(experiment.config)
    restored = checkpointer.restore()
    if restored is None:
        _check_that_none_is_lost(checkpointer, experiment, epochs_logged)
    agree("the checkpoint to go on from", restored and restored.record)
    if restored is None:
        phase = experiment.phase()
        with agreed_outcome():
            state = experiment.create_state(phase)
        return Start(Progress(tracker), phase, state, is_resumed=False)
    progress = _progress(restored, experiment, tracker)
    switch_step = (progress.switch_epoch or 0) * experiment.train.steps_per_epoch
    phase = experiment.phase(progress.plan, switch_step=switch_step)
    vectors = {"rank_vectors": meter.initial_vectors}
    state = restored.into(experiment.abstract_state(phase), defaults=vectors)
    return Start(progress, phase, phase.layout.place(state), is_resumed=True)


def mend_best(best: Checkpointer, progress: Progress, state: TrainState) -> None:
    """Sees to it that the best parameters are those of the epoch that the run knows as its best.

    They are saved beside the checkpoint and not with it, so that one of the two may be missing after a kill.

    Args:
      best: of the best parameters.
      progress: where the run stands.
      state: its state there.
    """
    if progress.best is None or best.settle(epoch := progress.best["epoch"]):
        return
    if progress.is_right_after(epoch):
        best.save(epoch, state.eval_variables, progress.to_record())
    else:
        _log.warning(
            "the best parameters so far, of epoch %d, are no longer in %s: the next better ones will be",
            epoch + 1,
            best.directory,
        )


def _progress(restored: Restored, experiment: Experiment, tracker: RankTracker) -> Progress:
    """The progress that a checkpoint has; its record may be anybody's."""
    epochs, steps = experiment.config.epochs, experiment.train.steps_per_epoch
    try:
        progress = Progress.from_record(restored.record, tracker)
        if not (0 <= progress.epoch <= epochs and 0 <= progress.totals.steps <= steps):
            raise ValueError(f"it is of epoch {progress.epoch} and step {progress.totals.steps}")
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise CheckpointError(
            f"the checkpoint {restored.directory} is none of this run ({text}): give another --workdir"
        ) from error
    return progress


def _check_that_none_is_lost(checkpointer: Checkpointer, experiment: Experiment, epochs_logged: int) -> None:
    """An epoch is logged before its checkpoint is begun, which is whole before the next one is begun."""
    if epochs_logged > 2 * experiment.config.checkpoint.every_epochs:
        raise CheckpointError(
            f"the workdir has the numbers of {epochs_logged} epochs, but there is no checkpoint in "
            f"{checkpointer.directory}: is a disk not there? Or start again with another --workdir"
        )
