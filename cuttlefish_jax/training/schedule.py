"""The learning rate of every step of a run, built from optax parts, and what the switch does to it."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cuttlefish_jax.errors import check_setting

# A part of an ml_collections.ConfigDict, of whose values a type checker knows nothing.
Settings = Any

AFTER_SWITCH = ("continue", "rewarmup", "restart")


def make_schedule(config: Settings, *, epochs: int, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate of every step of a run, counted from its beginning.

    After ``warmup_epochs`` in which the rate grows linearly from ``warmup_start`` to ``peak``:

    * ``"steps"`` multiplies it by ``decay`` at every milestone (a share of the run's epochs). The rate
      changes between epochs only, in the warm-up too: 0.1, .24, .38, .52, .66, .8 for 5 epochs from 0.1 to
      0.8.
    * ``"cosine"`` follows half a cosine down to ``final`` at the end of the run, step by step.
    * ``"linear"`` falls in a straight line to ``final`` at the end of the run, step by step.
    * ``"constant"`` stays.

    Args:
      config: ``name``, ``peak``, ``warmup_epochs``, ``warmup_start``, ``milestones``, ``decay``, ``final``.
      epochs: the length of the run.
      steps_per_epoch: updates in one epoch.

    Returns:
      A function of the step, to be used under ``jit`` or outside.

    Raises:
      ConfigError: for an unknown name or a number out of its range.
    """
    _check_schedule(config, epochs=epochs, steps_per_epoch=steps_per_epoch)
    if config.name == "steps":
        return _staircase(config, epochs=epochs, steps_per_epoch=steps_per_epoch)
    warmup = round(config.warmup_epochs * steps_per_epoch)
    remaining = epochs * steps_per_epoch - warmup
    if config.name == "cosine":
        main = optax.cosine_decay_schedule(config.peak, remaining, alpha=config.final / config.peak)
    elif config.name == "linear":
        main = optax.linear_schedule(config.peak, config.final, remaining)
    else:
        main = optax.constant_schedule(config.peak)
    if not warmup:
        return main
    return optax.join_schedules(
        [optax.linear_schedule(config.warmup_start, config.peak, warmup), main], [warmup]
    )


def _staircase(config: Settings, *, epochs: int, steps_per_epoch: int) -> optax.Schedule:
    """One constant for each run of epochs with the same rate."""
    rates, boundaries = [], []
    # Rounded up, or a run of one epoch would begin after its first milestone.
    milestones = [math.ceil(round(share * epochs, 6)) for share in config.milestones]
    for epoch in range(epochs):
        done = min(1.0, epoch / config.warmup_epochs) if config.warmup_epochs else 1.0
        warm = config.warmup_start + (config.peak - config.warmup_start) * done
        rate = warm * config.decay ** sum(epoch >= milestone for milestone in milestones)
        if not rates or rate != rates[-1]:
            rates.append(rate)
            boundaries.append(epoch * steps_per_epoch)
    return optax.join_schedules([optax.constant_schedule(rate) for rate in rates], boundaries[1:])


def after_switch(
    schedule: optax.Schedule,
    switch_step: int,
    config: Settings,
    switch: Settings,
    *,
    epochs: int,
    steps_per_epoch: int,
) -> optax.Schedule:
    """``schedule`` as it goes on after the switch.

    * ``"continue"``: as if nothing had happened.
    * ``"rewarmup"``: ``warmup_start`` at the switch, whatever it was before, then linearly over
      ``warmup_epochs`` to the value that ``schedule`` has by then: between epochs with ``"steps"``, otherwise
      step by step. Without warm-up epochs nothing changes.
    * ``"restart"``: from the peak, without warm-up, through the whole schedule in the epochs that are left.

    ``switch.learning_rate_factor`` multiplies whatever comes out.

    Args:
      schedule: the rate without a switch, from :func:`make_schedule`.
      switch_step: the first low-rank step.
      config: the same as for ``schedule``.
      switch: ``learning_rate`` (one of the three) and ``learning_rate_factor``.
      epochs: the length of the run.
      steps_per_epoch: updates in one epoch.

    Returns:
      A function of the step, equal to ``schedule`` before the switch.
    """
    if switch.learning_rate == "rewarmup":
        later = _rewarmup(schedule, switch_step, config, steps_per_epoch=steps_per_epoch)
    elif switch.learning_rate == "restart":
        left = max(1, epochs - switch_step // steps_per_epoch)
        again = config.copy_and_resolve_references()
        again.warmup_epochs = 0.0
        restarted = make_schedule(again, epochs=left, steps_per_epoch=steps_per_epoch)
        later = lambda step: restarted(jnp.maximum(jnp.asarray(step) - switch_step, 0))  # noqa: E731
    else:
        later = schedule
    if later is schedule and switch.learning_rate_factor == 1:
        return schedule

    def rate(step: Any) -> Any:
        low = switch.learning_rate_factor * later(step)
        return jnp.where(jnp.asarray(step) < switch_step, schedule(step), low)

    return rate


def keep_schedule(opt_state: Any, other: Any) -> Any:
    """An optimizer's state, but with the place in the schedule that another one has.

    Args:
      opt_state: of a chain with ``optax.scale_by_learning_rate``.
      other: of the same chain, also of other parameters.
    """

    def is_schedule(part: Any) -> bool:
        return isinstance(part, optax.ScaleByScheduleState)

    return jax.tree.map(
        lambda ours, theirs: theirs if is_schedule(ours) else ours, opt_state, other, is_leaf=is_schedule
    )


def _rewarmup(
    schedule: optax.Schedule, switch_step: int, config: Settings, *, steps_per_epoch: int
) -> optax.Schedule:
    if not config.warmup_epochs:
        return schedule

    def with_second_warmup(step: Any) -> Any:
        since = jnp.maximum(jnp.asarray(step) - switch_step, 0)
        epochs_since = since // steps_per_epoch if config.name == "steps" else since / steps_per_epoch
        done = jnp.minimum(epochs_since / config.warmup_epochs, 1.0)
        rate = schedule(step)
        warm = config.warmup_start + (rate - config.warmup_start) * done
        # Chosen rather than blended where nothing changes, so that the rate is the same to the last bit.
        return jnp.where((jnp.asarray(step) < switch_step) | (done >= 1.0), rate, warm)

    return with_second_warmup


def _check_schedule(config: Settings, *, epochs: int, steps_per_epoch: int) -> None:
    names = ("steps", "cosine", "linear", "constant")
    check_setting("schedule.name", config.name, config.name in names, f"one of {', '.join(names)}")
    check_setting("epochs", epochs, epochs >= 1, "1 or more")
    check_setting(
        "steps per epoch", steps_per_epoch, steps_per_epoch >= 1, "1 or more: is batch_size too large?"
    )
    check_setting("schedule.peak", config.peak, config.peak > 0, "above 0")
    check_setting("schedule.warmup_start", config.warmup_start, config.warmup_start >= 0, "0 or more")
    in_run = 0 <= config.warmup_epochs < epochs
    check_setting(
        "schedule.warmup_epochs", config.warmup_epochs, in_run, f"0 or more, and less than epochs = {epochs}"
    )
    check_setting("schedule.decay", config.decay, config.decay > 0, "above 0")
    check_setting("schedule.final", config.final, config.final >= 0, "0 or more")
    milestones = tuple(config.milestones)
    in_range = all(0 < share < 1 for share in milestones)
    check_setting("schedule.milestones", milestones, in_range, "shares of the run, each between 0 and 1")
