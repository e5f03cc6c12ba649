"""The way into the low-rank phase: compiled in the background while full-rank training goes on.

When the ranks come near convergence, the plan that they would give is made, and the programs of its low-rank
phase are compiled by a thread. If the ranks at the switch are those, or nearly, nothing is left to compile
there. What is compiled when never changes a number of the run: the foreseen plan is a part of its progress.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

import cuttlefish_jax as cf
from cuttlefish_jax.training.calibration import Calibrator
from cuttlefish_jax.training.experiment import Experiment, Phase
from cuttlefish_jax.training.schedule import keep_schedule
from cuttlefish_jax.training.state import TrainState
from cuttlefish_jax.training.step import abstract


@dataclasses.dataclass(frozen=True)
class LowRank:
    """A low-rank phase that is ready to begin.

    Attributes:
      phase: with its steps compiled for all data that the full-rank phase has seen, if there is one host.
      convert: the program that turns the full-rank phase's state, and its calibration if there is one, into
        this phase's state.
      seconds: how long all that took to compile.
    """

    phase: Phase
    convert: Any
    seconds: float


class Switcher:
    """Compiles low-rank phases, in the background if it is told in time.

    Args:
      experiment: of the run.
      calibrator: if factors are to be whitened; compiled along.
    """

    def __init__(self, experiment: Experiment, calibrator: Calibrator | None = None):
        self._experiment = experiment
        self._calibrator = calibrator
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: tuple[tuple[cf.FactorizationPlan, int], Future[LowRank]] | None = None
        self._done: collections.deque[float] = collections.deque()

    def compile_ahead(self, plan: cf.FactorizationPlan, epoch: int, full: Phase, state: TrainState) -> None:
        """Starts to compile the phase of a plan that begins with an epoch, in place of any other.

        Args:
          plan: the foreseen plan.
          epoch: the foreseen first low-rank epoch.
          full: the full-rank phase, compiled for its data.
          state: of the full-rank phase.
        """
        key = self._key(plan, epoch)
        if self._ahead is not None:
            if self._ahead[0] == key:
                return
            self._ahead[1].cancel()  # unless it is at work already; then its programs are for nothing
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compile-ahead")
        started = self._thread.submit(self._compile_behind, plan, epoch, _inputs(full), abstract(state))
        self._ahead = key, started

    def get(
        self, plan: cf.FactorizationPlan, epoch: int, full: Phase, state: TrainState
    ) -> tuple[LowRank, bool]:
        """The phase of a plan, and whether it was compiled ahead; waits for it, or compiles it now.

        Args:
          plan: the plan.
          epoch: the first low-rank epoch.
          full: the full-rank phase.
          state: of the full-rank phase.
        """
        if self._ahead is not None and self._ahead[0] == self._key(plan, epoch):
            return self._ahead[1].result(), True
        if self._ahead is not None:
            self._ahead[1].cancel()
        return self._compile(plan, epoch, _inputs(full), abstract(state)), False

    def background_seconds(self) -> float:
        """How long what was compiled in the background since the last call took, needed or not."""
        return sum(self._done.popleft() for _ in range(len(self._done)))

    def close(self) -> None:
        """Forgets what has not begun. What is being compiled cannot be stopped: the process ends after it."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _key(self, plan: cf.FactorizationPlan, epoch: int) -> tuple[cf.FactorizationPlan, int]:
        # The steps know the epoch of the switch where the learning rate depends on it.
        switch = self._experiment.config.switch
        is_fixed = switch.learning_rate == "continue" and switch.learning_rate_factor == 1
        return plan, 0 if is_fixed else epoch

    def _compile_behind(self, *args: Any) -> LowRank:
        low = self._compile(*args)
        self._done.append(low.seconds)
        return low

    def _compile(
        self, plan: cf.FactorizationPlan, epoch: int, inputs: tuple[Sequence, Sequence], state: TrainState
    ) -> LowRank:
        start = time.perf_counter()
        experiment = self._experiment
        phase = experiment.phase(plan, switch_step=epoch * experiment.train.steps_per_epoch)
        forgets = experiment.config.switch.optimizer == "reset"

        def convert(state: TrainState, calibration: Any) -> TrainState:
            state = cf.switch(state, plan, phase.tx, apply_fn=phase.model.apply, calibration=calibration)
            if forgets:
                # A new one, but for the step that the learning rate follows.
                fresh = phase.tx.init(state.params)
                state = state.replace(opt_state=keep_schedule(fresh, state.opt_state))
            return state.replace(rank_vectors={})

        calibration = None if self._calibrator is None else self._calibrator.abstract(state)
        low = phase.layout.abstract(jax.eval_shape(convert, state, calibration))
        shardings = jax.tree.map(lambda leaf: leaf.sharding, low)
        program = jax.jit(convert, out_shardings=shardings).lower(state, calibration).compile()
        train_inputs, eval_inputs = inputs
        if self._calibrator is not None:
            self._calibrator.compile_for(state, train_inputs)
        for data in train_inputs:
            phase.train_step.compile_for(low, *data)
        for data in eval_inputs:
            phase.eval_step.compile_for(low.eval_variables, *data)
        return LowRank(phase, program, time.perf_counter() - start)


def nearly_equal(foreseen: cf.FactorizationPlan, plan: cf.FactorizationPlan, tolerance: float) -> bool:
    """Whether a foreseen plan may stand for the plan of the day of the switch.

    Args:
      foreseen: made a few epochs before.
      plan: made at the switch.
      tolerance: by how much ranks may differ, as a share of the plan's own. A rank may always differ by one:
        that is what rounding up makes of no change at all. At 0 the plans have to be equal.

    Returns:
      Whether the same layers are factorized, at ranks that are nearly equal.
    """
    if foreseen == plan:
        return True
    if not tolerance or foreseen.ranks.keys() != plan.ranks.keys():
        return False
    return all(
        abs(foreseen.ranks[path] - rank) <= max(1, tolerance * rank) for path, rank in plan.ranks.items()
    )


def _inputs(full: Phase) -> tuple[Sequence, Sequence]:
    if jax.process_count() > 1:
        # There pmap lowers for arrays alone, not for their shapes: steps are compiled when they are called.
        return (), ()
    return full.train_step.inputs, full.eval_step.inputs
