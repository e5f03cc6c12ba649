"""What a run knows besides its arrays: the JSON record of its checkpoints."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from cuttlefish_jax import FactorizationPlan, RankTracker
from cuttlefish_jax.training.epoch import EpochTotals

_KINDS = ("full_rank", "low_rank", "rank", "profile", "switch", "compile", "stall", "background")


@dataclasses.dataclass
class Progress:
    """Where a run stands.

    Attributes:
      tracker: the history of the stable ranks, and which layers have converged.
      epoch: the epoch to train, counted from 0.
      totals: what was trained of it already.
      plan: what is factorized; ``None`` in the full-rank phase.
      foreseen: the plan whose programs were compiled ahead, near the switch.
      switch_epoch: the first low-rank epoch, ``None`` before the switch.
      stays_full_rank: whether the ranks missed their deadline, or no layer would have got smaller.
      best: epoch and metrics of the best validation score of the present phase.
      seconds: time spent, by what it was spent on, none of it twice; and ``"stall"``, all that training
        waited for at the switch, and ``"background"``, compilation that nobody waited for.
      examples: training examples seen, by phase.
      memory: bytes on a device, by phase: of its state, and of a train step at most (``Phase.memory``).
    """

    tracker: RankTracker
    epoch: int = 0
    totals: EpochTotals = dataclasses.field(default_factory=EpochTotals)
    plan: FactorizationPlan | None = None
    foreseen: FactorizationPlan | None = None
    switch_epoch: int | None = None
    stays_full_rank: bool = False
    best: dict[str, Any] | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(_KINDS, 0.0))
    examples: dict[str, int] = dataclasses.field(default_factory=lambda: dict(full_rank=0, low_rank=0))
    memory: dict[str, dict[str, int | None]] = dataclasses.field(default_factory=dict)

    @property
    def ranks_0(self) -> dict[str, Any]:
        """``{path: stable rank}`` at the initialisation."""
        return {path: history[0] for path, history in self.tracker.history.items()}

    @property
    def ranks_t(self) -> dict[str, Any]:
        """``{path: stable rank}`` at the last measurement."""
        return {path: history[-1] for path, history in self.tracker.history.items()}

    def is_better(self, metrics: dict[str, Any], score: str) -> bool:
        """Whether an epoch's validation score is the best so far; the loss decides between equals.

        None, which stands for what was not finite, is worse than any number.
        """

        def goodness(measured: dict[str, Any]) -> tuple[float, float]:
            value, loss = measured[f"validation_{score}"], measured["validation_loss"]
            return -math.inf if value is None else value, -math.inf if loss is None else -loss

        return self.best is None or goodness(metrics) > goodness(self.best)

    def is_right_after(self, epoch: int) -> bool:
        """Whether an epoch is trained, and no step of the next."""
        return (self.epoch, self.totals.steps) == (epoch + 1, 0)

    def measure_memory(self, phase: str, found: dict[str, int | None]) -> None:
        """Notes a phase's memory, but what is None: a process that makes no step knows of none."""
        known = {name: size for name, size in found.items() if size is not None}
        self.memory[phase] = self.memory.get(phase, {}) | known

    def to_record(self) -> dict[str, Any]:
        """The progress as JSON."""
        record = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        record["tracker"] = self.tracker.to_state()
        record["totals"] = dataclasses.asdict(self.totals)
        for name in ("plan", "foreseen"):
            record[name] = None if record[name] is None else record[name].to_json()
        return record

    @classmethod
    def from_record(cls, record: dict[str, Any], tracker: RankTracker) -> Progress:
        """The progress that :meth:`to_record` wrote; what an older version did not write is as at the start.

        Args:
          record: the JSON.
          tracker: a fresh tracker with the run's criterion.
        """
        new = cls(tracker).to_record()
        record = new | record | {"seconds": new["seconds"] | record["seconds"]}
        plans = {
            name: None if record[name] is None else FactorizationPlan.from_json(record[name])
            for name in ("plan", "foreseen")
        }
        tracker = RankTracker.from_state(tracker.criterion, record["tracker"])
        totals = EpochTotals(**record["totals"])
        return cls(**record | {"tracker": tracker, "totals": totals, **plans})
