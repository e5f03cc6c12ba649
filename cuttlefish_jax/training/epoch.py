"""One epoch of training, one pass of evaluation."""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from cuttlefish_jax.training.data import EvalInput, TrainInput
from cuttlefish_jax.training.errors import UserError
from cuttlefish_jax.training.metrics import compute_metrics
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
      The new state and the epoch's metrics: ``train_loss`` and what else the step measures, such as
      ``train_accuracy``, averaged over the steps; ``steps``; ``seconds`` without compilation.

    Raises:
      DivergedError: if the loss of a step is NaN or infinite.
    """
    start, compiled_before = time.perf_counter(), train_step.compile_seconds
    settled: list[dict[str, float]] = []
    in_flight: collections.deque[Any] = collections.deque()

    def settle() -> None:
        metrics = {name: float(value) for name, value in jax.device_get(in_flight.popleft()).items()}
        loss, step = metrics["loss"], len(settled)
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss is {loss} at step {step} of epoch {epoch} "
                f"(step {epoch * data.steps_per_epoch + step} of the run): lower config.schedule.peak "
                "or set config.optimizer.clip_norm, with another --workdir; the last checkpoint is whole"
            )
        on_step(1)
        settled.append(metrics)

    for batch in data.epoch(epoch):
        state, metrics = train_step(state, data.resident, batch)
        in_flight.append(metrics)
        if len(in_flight) > _STEPS_IN_FLIGHT:
            settle()
    while in_flight:
        settle()
    seconds = time.perf_counter() - start - (train_step.compile_seconds - compiled_before)
    means = {f"train_{name}": float(np.mean([m[name] for m in settled])) for name in settled[0]}
    return state, {**means, "steps": len(settled), "seconds": seconds}


def evaluate(
    eval_step: Compiled, variables: Any, data: EvalInput, metrics: Sequence[str]
) -> dict[str, float]:
    """Mean loss and metrics over a split, every example counted once.

    Args:
      eval_step: from :func:`make_eval_step`.
      variables: what the network is applied with.
      data: the split.
      metrics: names, see :func:`cuttlefish_jax.training.metrics.compute_metrics`.

    Returns:
      ``{"loss": ..., **metrics}``.
    """
    pending = [eval_step(variables, data.resident, batch) for batch in data.batches()]
    parts = jax.device_get(pending)
    results = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    real = results["weight"] > 0
    found = {"loss": float(np.mean(results["loss"][real], dtype=np.float64))}
    return found | compute_metrics(metrics, results["label"][real], results["prediction"][real])
