"""Where a run starts: at the last whole checkpoint, or anew."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from cuttlefish_jax.training.agreement import agree, agreed_outcome
from cuttlefish_jax.training.method import make_tracker
from cuttlefish_jax.training.progress import Progress

if TYPE_CHECKING:
    from cuttlefish_jax.training.checkpoint import Checkpointer
    from cuttlefish_jax.training.experiment import Experiment, Phase
    from cuttlefish_jax.training.rank_meter import RankMeter
    from cuttlefish_jax.training.state import TrainState


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


def start(experiment: Experiment, checkpointer: Checkpointer, meter: RankMeter) -> Start:
    """The state of the last whole checkpoint, or a new one.

    Args:
      experiment: the fixed parts of the run.
      checkpointer: of its checkpoints.
      meter: of its ranks.

    Raises:
      CheckpointError: if there are checkpoints, and none that the run could go on from.
      ConfigError: if the pre-trained weights do not fit the network.
    """
    tracker = make_tracker(experiment.config)
    restored = checkpointer.restore()
    agree("the checkpoint to go on from", restored and restored.record)
    if restored is None:
        phase = experiment.phase()
        with agreed_outcome():
            state = experiment.create_state(phase)
        return Start(Progress(tracker), phase, state, is_resumed=False)
    progress = Progress.from_record(restored.record, tracker)
    switch_step = (progress.switch_epoch or 0) * experiment.train.steps_per_epoch
    phase = experiment.phase(progress.plan, switch_step=switch_step)
    vectors = {"rank_vectors": meter.initial_vectors}
    state = restored.into(experiment.abstract_state(phase), defaults=vectors)
    return Start(progress, phase, phase.layout.place(state), is_resumed=True)
