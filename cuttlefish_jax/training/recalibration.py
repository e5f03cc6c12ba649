"""The running statistics of batch norms, estimated anew: truncation at the switch moves what they are of."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cuttlefish_jax.training.data import TrainInput, materialize
from cuttlefish_jax.training.parallelism import AXIS, DataParallel, Layout
from cuttlefish_jax.training.state import TrainState
from cuttlefish_jax.training.step import Compiled
from cuttlefish_jax.training.tasks import Task


def recalibrate(
    task: Task,
    state: TrainState,
    data: TrainInput,
    layout: Layout | None = None,
    *,
    epoch: int,
    batches: int,
) -> TrainState:
    """Sets the running statistics of all batch norms to their means over training batches.

    Every batch weighs the same, and nothing is left of what the statistics were. They are averaged over all
    devices, as in training.

    Args:
      task: what is learnt.
      state: on the devices; not donated.
      data: the training input.
      layout: of the state; by default every device has all of it.
      epoch: whose first batches are taken, those that training is going to see.
      batches: how many, at most an epoch's; 0 changes nothing.

    Returns:
      The state with new ``batch_stats``; the very state if its network has none.
    """
    if not batches or not jax.tree.leaves(state.batch_stats):
        return state
    step = make_statistics_step(task, layout)
    found = [step(state, data.resident, batch) for batch in itertools.islice(data.epoch(epoch), batches)]
    # On the devices: those of other hosts are out of reach for this one.
    mean = jax.jit(lambda trees: jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees))
    return state.replace(batch_stats=mean(found))


def make_statistics_step(task: Task, layout: Layout | None = None) -> Compiled:
    """The statistics of one batch: ``(state, resident, batch) -> batch_stats``.

    Args:
      task: what is learnt.
      layout: of the state on the devices; by default every device has all of it.

    Returns:
      A step over a state of the layout. Where a batch norm does not move its statistics at all, they stay.
    """
    layout = layout or DataParallel()

    def statistics_step(state: TrainState, resident: Any, batch: Any) -> Any:
        on_device = functools.partial(_statistics, task, layout, state.apply_fn)
        step_key = jax.random.fold_in(state.key, state.step)
        shared = state.batch_stats, step_key, resident
        return layout.on_each_device(on_device)(state.params, shared, batch)

    return Compiled(layout.program(statistics_step), num_shapes=task.num_lengths)


def _statistics(task: Task, layout: Layout, apply_fn: Callable, params: Any, shared: Any, batch: Any) -> Any:
    """What one device has to do with its part of a batch; the means of all devices."""
    batch_stats, step_key, resident = shared
    augment_key, device_key = jax.random.split(step_key)
    inputs, _ = task.train_inputs(augment_key, materialize(resident, batch))
    rngs = {"dropout": jax.random.fold_in(device_key, jax.lax.axis_index(AXIS))}

    def after_one_batch(params: Any, old: Any) -> Any:
        variables = {"params": params, "batch_stats": old}
        return apply_fn(variables, *inputs, train=True, mutable=["batch_stats"], rngs=rngs)[1]["batch_stats"]

    # new = momentum * old + (1 - momentum) * batch: what old zeros and old ones become gives both. XLA
    # computes the activations, which do not depend on the running statistics in training, but once.
    after = layout.whole(after_one_batch)
    from_zeros = after(params, jax.tree.map(jnp.zeros_like, batch_stats))
    from_ones = after(params, jax.tree.map(jnp.ones_like, batch_stats))

    def of_batch(zeros: jax.Array, ones: jax.Array, old: jax.Array) -> jax.Array:
        share = 1 - (ones - zeros)
        return jnp.where(share > 1e-6, zeros / jnp.where(share > 1e-6, share, 1), old)

    return jax.lax.pmean(jax.tree.map(of_batch, from_zeros, from_ones, batch_stats), AXIS)
