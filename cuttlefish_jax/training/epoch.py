"""One epoch of training, one pass of evaluation."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from cuttlefish_jax.training.data import EvalInput, TrainInput
from cuttlefish_jax.training.metrics import compute_metrics
from cuttlefish_jax.training.nonfinite import finite_or_none, refuse_step, report_skipped
from cuttlefish_jax.training.state import TrainState
from cuttlefish_jax.training.step import Compiled

# Steps that may be under way on the device. Looking at the result of an older one costs nothing and keeps the
# host from running ahead without bound.
_STEPS_IN_FLIGHT = 16


@dataclasses.dataclass(frozen=True)
class EpochTotals:
    """What the steps of an epoch have come to so far; JSON, so that a run can stop between any two of them.

    Attributes:
      steps: how many there were.
      seconds: how long they took, without compilation.
      sums: of what each step measures, such as ``loss``: added one after the other, so that they do not
        depend on where a run was stopped. Skipped steps are not in them.
      skipped: how many steps were skipped, as their numbers were not finite.
      skipped_in_a_row: how many of the last ones.
    """

    steps: int = 0
    seconds: float = 0.0
    sums: Mapping[str, float] = dataclasses.field(default_factory=dict)
    skipped: int = 0
    skipped_in_a_row: int = 0

    def add(self, metrics: Mapping[str, float]) -> EpochTotals:
        """With one more step."""
        sums = {name: self.sums.get(name, 0.0) + value for name, value in metrics.items()}
        return dataclasses.replace(self, steps=self.steps + 1, sums=sums, skipped_in_a_row=0)

    def skip(self) -> EpochTotals:
        """With one more step, which was skipped."""
        row = self.skipped_in_a_row + 1
        return dataclasses.replace(self, steps=self.steps + 1, skipped=self.skipped + 1, skipped_in_a_row=row)

    @property
    def means(self) -> dict[str, float]:
        """Means over the steps, ``train_loss`` and so on; and how many were skipped."""
        means = {f"train_{name}": value / (self.steps - self.skipped) for name, value in self.sums.items()}
        return means | {"train_skipped_steps": self.skipped}


def train_epoch(
    train_step: Compiled,
    state: TrainState,
    data: TrainInput,
    epoch: int,
    *,
    so_far: EpochTotals = EpochTotals(),
    max_skipped: int = 0,
    pauses: Callable[[int], bool] = lambda steps: False,
    on_step: Callable[[int], None] = lambda steps: None,
    at_end: Callable[[TrainState], object] = lambda state: None,
) -> tuple[TrainState, EpochTotals]:
    """Trains for an epoch, or for a part of it.

    Args:
      train_step: from :func:`make_train_step`.
      state: donated to the first step.
      data: the training input.
      epoch: counted from 0.
      so_far: what was trained of the epoch before.
      max_skipped: how many steps in a row may be skipped, by a step that does so, and not all of an epoch.
      pauses: called with the number of the epoch's steps that are under way or done, after each but the last;
        whether to return when these are done.
      on_step: called with 1 whenever a step is done.
      at_end: called with the state when the epoch's last step is under way: what it starts on the devices
        follows without a pause.

    Returns:
      The new state, and the totals of the epoch: of all its steps, unless it pauses.

    Raises:
      DivergedError: if the loss of a step is not finite, or what the step made of the state, and it may not
        be skipped. The state is lost then, and was never returned.
    """
    start, compiled_before = time.perf_counter(), train_step.compile_seconds

    def steps() -> Iterator[Any]:
        nonlocal state
        for step, batch in enumerate(data.epoch(epoch, so_far.steps), so_far.steps + 1):
            state, metrics = train_step(state, data.resident, batch)
            yield metrics
            if step < data.steps_per_epoch and pauses(step):
                return
        at_end(state)

    totals = so_far
    for values in _fetched(steps()):
        metrics, step = {name: float(value) for name, value in values.items()}, totals.steps
        if metrics.pop("nonfinite"):
            totals = totals.skip()
            place = f"step {step} of epoch {epoch} (step {epoch * data.steps_per_epoch + step} of the run)"
            row = totals.skipped_in_a_row
            refuse_step(metrics["loss"], place, in_a_row=row, max_in_a_row=max_skipped)
        else:
            totals = totals.add(metrics)
        on_step(1)
    if totals.steps == data.steps_per_epoch:
        report_skipped(totals.skipped, totals.steps, epoch)
    seconds = time.perf_counter() - start - (train_step.compile_seconds - compiled_before)
    return state, dataclasses.replace(totals, seconds=so_far.seconds + seconds)


def evaluate(
    eval_step: Compiled,
    variables: Any,
    data: EvalInput,
    metrics: Sequence[str],
    *,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Mean loss and metrics over a split, every example counted once.

    Args:
      eval_step: from :func:`make_eval_step`.
      variables: what the network is applied with.
      data: the split.
      metrics: names, see :func:`cuttlefish_jax.training.metrics.compute_metrics`.
      on_batch: called before every batch; what it raises ends the evaluation.

    Returns:
      ``{"loss": ..., **metrics}``.
    """

    def results() -> Iterator[Any]:
        for batch in data.batches():
            on_batch()
            yield eval_step(variables, data.resident, batch)

    parts = list(_fetched(results()))
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    real = found["weight"] > 0
    loss = {"loss": float(np.mean(found["loss"][real], dtype=np.float64))}
    return loss | compute_metrics(metrics, found["label"][real], found["prediction"][real])


def evaluate_splits(
    eval_step: Compiled,
    variables: Any | None,
    splits: Mapping[str, EvalInput],
    metrics: Sequence[str],
    *,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, float | None]:
    """Loss and metrics of several splits.

    Args:
      eval_step: from :func:`make_eval_step`.
      variables: what the network is applied with; None if nothing is to be evaluated.
      splits: by their names.
      metrics: names, as for :func:`evaluate`.
      on_batch: as for :func:`evaluate`.

    Returns:
      ``{"test_loss": ...}`` and so on; all None without ``variables``, and None, with a warning, what is not
      a finite number.
    """
    results: dict[str, float | None] = {}
    for split, data in splits.items():
        found: Mapping[str, float | None] = dict.fromkeys(("loss", *metrics))
        if variables is not None:
            found = finite_or_none(evaluate(eval_step, variables, data, metrics, on_batch=on_batch), split)
        results |= {f"{split}_{name}": value for name, value in found.items()}
    return results


def _fetched(results: Iterable[Any]) -> Iterator[Any]:
    """The results of steps on the host, in their order, with a few more steps always under way."""
    in_flight: collections.deque[Any] = collections.deque()
    for result in results:
        in_flight.append(result)
        if len(in_flight) > _STEPS_IN_FLIGHT:
            yield jax.device_get(in_flight.popleft())
    while in_flight:
        yield jax.device_get(in_flight.popleft())
