"""One epoch of training, one pass of evaluation."""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from cuttlefish_jax.training.data import EvalInput, TrainInput
from cuttlefish_jax.training.errors import DivergedError
from cuttlefish_jax.training.metrics import compute_metrics
from cuttlefish_jax.training.state import TrainState
from cuttlefish_jax.training.step import Compiled

# Steps that may be under way on the device. Looking at the result of an older one costs nothing and keeps the
# host from running ahead without bound.
_STEPS_IN_FLIGHT = 16


def train_epoch(
    train_step: Compiled,
    state: TrainState,
    data: TrainInput,
    epoch: int,
    *,
    on_step: Callable[[int], None] = lambda steps: None,
    at_end: Callable[[TrainState], TrainState] = lambda state: state,
) -> tuple[TrainState, dict[str, float]]:
    """Trains for one epoch.

    Args:
      train_step: from :func:`make_train_step`.
      state: donated to the first step.
      data: the training input.
      epoch: counted from 0.
      on_step: called with 1 whenever a step is done.
      at_end: called when the last step is under way: what it starts on the devices follows without a pause.
        It may change the state.

    Returns:
      The new state and the epoch's metrics: ``train_loss`` and what else the step measures, such as
      ``train_accuracy``, averaged over the steps; ``steps``; ``seconds`` without compilation.

    Raises:
      DivergedError: if the loss of a step is NaN or infinite, or what the step made of the state.
    """
    start, compiled_before = time.perf_counter(), train_step.compile_seconds

    def steps() -> Iterator[Any]:
        nonlocal state
        for batch in data.epoch(epoch):
            state, metrics = train_step(state, data.resident, batch)
            yield metrics
        state = at_end(state)

    settled: list[dict[str, float]] = []
    for step, values in enumerate(_fetched(steps())):
        metrics = {name: float(value) for name, value in values.items()}
        if metrics.pop("nonfinite"):
            loss = metrics["loss"]
            what = "a gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
            raise DivergedError(
                f"{what} at step {step} of epoch {epoch} "
                f"(step {epoch * data.steps_per_epoch + step} of the run): lower config.schedule.peak "
                "or set config.optimizer.clip_norm, with another --workdir; the last checkpoint is whole"
            )
        on_step(1)
        settled.append(metrics)
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
    parts = list(_fetched(eval_step(variables, data.resident, batch) for batch in data.batches()))
    results = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    real = results["weight"] > 0
    found = {"loss": float(np.mean(results["loss"][real], dtype=np.float64))}
    return found | compute_metrics(metrics, results["label"][real], results["prediction"][real])


def _fetched(results: Iterable[Any]) -> Iterator[Any]:
    """The results of steps on the host, in their order, with a few more steps always under way."""
    in_flight: collections.deque[Any] = collections.deque()
    for result in results:
        in_flight.append(result)
        if len(in_flight) > _STEPS_IN_FLIGHT:
            yield jax.device_get(in_flight.popleft())
    while in_flight:
        yield jax.device_get(in_flight.popleft())
