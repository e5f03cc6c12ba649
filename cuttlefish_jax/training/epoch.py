"""One epoch of training, one pass of evaluation."""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from cuttlefish_jax.training.data import EvalInput, TrainInput
from cuttlefish_jax.training.errors import UserError
from cuttlefish_jax.training.state import TrainState
from cuttlefish_jax.training.step import Compiled

# Steps that may be under way on the device. Looking at the loss of an older one costs nothing and keeps the
# host from running ahead without bound.
_STEPS_IN_FLIGHT = 16


class DivergedError(UserError):
    """The loss is not a finite number."""


def train_epoch(
    train_step: Compiled,
    state: TrainState,
    data: TrainInput,
    epoch: int,
    *,
    on_step: Callable[[int], None] = lambda steps: None,
) -> tuple[TrainState, dict[str, float]]:
    """Trains for one epoch.

    Args:
      train_step: from :func:`make_train_step`.
      state: donated to the first step.
      data: the training input.
      epoch: counted from 0.
      on_step: called with 1 whenever a step is done.

    Returns:
      The new state and the epoch's metrics: mean ``train_loss`` and ``train_accuracy``, ``steps``, and
      ``seconds`` without compilation.

    Raises:
      DivergedError: if the loss of a step is NaN or infinite.
    """
    start, compiled_before = time.perf_counter(), train_step.compile_seconds
    losses, accuracies = [], []
    in_flight: collections.deque[Any] = collections.deque()

    def settle() -> None:
        metrics = jax.device_get(in_flight.popleft())
        loss = float(metrics["loss"])
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss is {loss} at step {len(losses)} of epoch {epoch} "
                f"(step {epoch * data.steps_per_epoch + len(losses)} of the run): lower config.schedule.peak "
                "or set config.optimizer.clip_norm, with another --workdir; the last checkpoint is whole"
            )
        on_step(1)
        losses.append(loss)
        accuracies.append(float(metrics["accuracy"]))

    for batch in data.epoch(epoch):
        state, metrics = train_step(state, data.resident, batch)
        in_flight.append(metrics)
        if len(in_flight) > _STEPS_IN_FLIGHT:
            settle()
    while in_flight:
        settle()
    seconds = time.perf_counter() - start - (train_step.compile_seconds - compiled_before)
    return state, {
        "train_loss": float(np.mean(losses)),
        "train_accuracy": float(np.mean(accuracies)),
        "steps": len(losses),
        "seconds": seconds,
    }


def evaluate(eval_step: Compiled, variables: Any, data: EvalInput) -> tuple[float, float]:
    """Mean loss and accuracy over a split, every example counted once."""
    totals = {"loss": 0.0, "correct": 0.0, "examples": 0.0}
    pending = [eval_step(variables, data.resident, batch) for batch in data.batches()]
    for sums in jax.device_get(pending):
        totals = {name: total + float(sums[name]) for name, total in totals.items()}
    return totals["loss"] / totals["examples"], totals["correct"] / totals["examples"]
