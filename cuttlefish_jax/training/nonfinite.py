"""Steps whose numbers go bad: found on the devices, left out if that is wanted, and counted on the host."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cuttlefish_jax.errors import DivergedError
from cuttlefish_jax.training.schedule import keep_schedule
from cuttlefish_jax.training.state import TrainState

_SMALL = 1024  # entries; such arrays are never split over devices

_ADVICE = (
    "lower config.schedule.peak or set config.optimizer.clip_norm, with another --workdir; "
    "the last checkpoint, if any, is whole"
)


def checked_step(
    old: TrainState, new: TrainState, loss: jax.Array, *, skip: bool
) -> tuple[TrainState, jax.Array]:
    """Looks at what a step is about to leave; to be called in the step, on one device or sharded.

    A step is bad if its loss is not finite, or a number of the parameters, of the optimizer's state or of
    the batch statistics that it made. A gradient that is not finite makes one of these so, and so does a
    finite one whose square overflows. With ``skip`` a bad step changes nothing but the step's number and
    the optimizer's place in the schedule of the learning rate, as these belong to the batches that were seen.

    Args:
      old: the state before the step.
      new: the state after it.
      loss: of the whole batch, the same on all devices.
      skip: whether a bad step is to leave ``old``.

    Returns:
      The state to go on with, and f32[], 1 if the step is bad and else 0.
    """
    is_finite = _all_finite((loss, new.params, new.opt_state, new.batch_stats))
    if skip:
        kept = old.replace(step=new.step, opt_state=keep_schedule(old.opt_state, new.opt_state))
        new = optax.tree.where(is_finite, new, kept)
    return new, 1 - is_finite.astype(jnp.float32)


def refuse_step(loss: float, place: str, *, in_a_row: int, max_in_a_row: int) -> None:
    """Stops the run at a bad step, unless it may be skipped.

    Args:
      loss: of the step.
      place: where it was, for the message.
      in_a_row: how many bad steps there were, this one the last.
      max_in_a_row: how many there may be; 0 if none is skipped.

    Raises:
      DivergedError: if there are more.
    """
    if in_a_row <= max_in_a_row:
        return
    what = "a gradient, or what came of it, is not finite" if math.isfinite(loss) else f"the loss is {loss}"
    before = f", and {in_a_row - 1} steps before it were skipped" if max_in_a_row else ""
    raise DivergedError(f"{what} at {place}{before}: {_ADVICE}")


def report_skipped(skipped: int, steps: int, epoch: int) -> None:
    """Warns of the steps of an epoch that were skipped, in one line.

    Raises:
      DivergedError: if that were all of its steps.
    """
    if skipped == steps:
        raise DivergedError(f"all {steps} steps of epoch {epoch} went bad and were skipped: {_ADVICE}")
    if skipped:
        warnings.warn(
            f"{skipped} of {steps} steps of epoch {epoch} were skipped: "
            "their loss or a gradient was not finite",
            stacklevel=2,
        )


def finite_or_none(values: Mapping[str, float], split: str) -> dict[str, float | None]:
    """Measurements of a split, for JSON: None what is not a finite number, with a warning."""
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        what = ", ".join(f"{name} {values[name]}" for name in bad)
        warnings.warn(f"the {split} split has {what}: written as null", stacklevel=2)
    return {name: None if name in bad else value for name, value in values.items()}


def _all_finite(tree: Any) -> jax.Array:
    numbers = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    # Together, the many small ones are one reduction to compile, not one each; the large ones are not copied.
    small = [jnp.ravel(leaf).astype(jnp.float32) for leaf in numbers if leaf.size < _SMALL]
    large = [leaf for leaf in numbers if leaf.size >= _SMALL]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in [jnp.concatenate(small), *large]]))
