"""Steps whose numbers go bad: found on the devices, left out if that is wanted, and counted on the host."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from cuttlefish_jax.training.schedule import keep_schedule
from cuttlefish_jax.training.state import TrainState


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


def _all_finite(tree: Any) -> jax.Array:
    numbers = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in numbers]))
