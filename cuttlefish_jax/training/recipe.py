"""The recipe of a run: learning rate, optimizer and loss, built from optax parts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from cuttlefish_jax.training.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    from cuttlefish_jax.plan import FactorizationPlan

# A part of an ml_collections.ConfigDict, of whose values a type checker knows nothing.
Settings = Any


def make_schedule(config: Settings, *, epochs: int, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate of every step of a run, counted from its beginning.

    After ``warmup_epochs`` in which the rate grows linearly from ``warmup_start`` to ``peak``:

    * ``"steps"`` multiplies it by ``decay`` at every milestone (a share of the run's epochs). The rate
      changes between epochs only, in the warm-up too: 0.1, .24, .38, .52, .66, .8 for 5 epochs from 0.1 to
      0.8.
    * ``"cosine"`` follows half a cosine down to ``final`` at the end of the run, step by step.
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
    if config.name == "cosine":
        remaining = epochs * steps_per_epoch - warmup
        main = optax.cosine_decay_schedule(config.peak, remaining, alpha=config.final / config.peak)
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


def rewarmup(
    schedule: optax.Schedule, switch_step: int, config: Settings, *, steps_per_epoch: int
) -> optax.Schedule:
    """``schedule`` with a second warm-up after the switch.

    The rate is ``warmup_start`` at the switch, whatever it was before, and goes linearly over
    ``warmup_epochs`` to the value that ``schedule`` has by then: between epochs with ``"steps"``, otherwise
    step by step. Without warm-up epochs nothing changes.

    Args:
      schedule: the rate without a switch, from :func:`make_schedule`.
      switch_step: the first low-rank step.
      config: the same as for ``schedule``.
      steps_per_epoch: updates in one epoch.

    Returns:
      A function of the step, equal to ``schedule`` before the switch.
    """
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


def make_optimizer(
    config: Settings, schedule: optax.Schedule, *, plan: FactorizationPlan | None = None
) -> optax.GradientTransformation:
    """SGD as PyTorch does it, or AdamW.

    SGD adds L2 to the gradient before the momentum and multiplies by the learning rate after it; AdamW
    decays weights beside the adapted gradient. Kernels and embeddings decay, norm scales, biases and tokens
    never do. In the low-rank phase, with ``frobenius_decay``, the factors have the decay of their products
    in place of their own.

    The structure of the state is the same with and without ``plan``, so it can be carried over a switch.

    Args:
      config: ``name``, ``momentum``, ``nesterov``, ``b1``, ``b2``, ``weight_decay``, ``frobenius_decay``,
        ``clip_norm``.
      schedule: the learning rate; it counts the updates since the state's own ``init``.
      plan: what is factorized; None in the full-rank phase.

    Returns:
      The transformation of gradients into updates.

    Raises:
      ConfigError: for an unknown name or a number out of its range.
    """
    _check_optimizer(config)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    factors: frozenset[str] = frozenset()
    frobenius = optax.identity()
    if plan is not None and config.frobenius_decay:
        from cuttlefish_jax.decay import frobenius_decay

        # The path of a model that is one layer is empty.
        factors = frozenset(f"{path}/{factor}/kernel".lstrip("/") for path in plan.ranks for factor in "uv")
        frobenius = frobenius_decay(config.frobenius_decay, plan)
    decay = optax.add_decayed_weights(config.weight_decay, mask=lambda params: _decayed(params, factors))
    learning_rate = optax.scale_by_learning_rate(schedule)
    if config.name == "sgd":
        momentum = optax.trace(config.momentum, nesterov=config.nesterov)
        return optax.chain(clip, decay, frobenius, momentum, learning_rate)
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2)
    return optax.chain(clip, adam, decay, frobenius, learning_rate)


def _decayed(params: Any, factors: frozenset[str]) -> Any:
    """A tree of booleans: which parameters have weight decay."""

    # By name and not by the number of axes alone: biases of layers stacked by scan have two.
    def is_decayed(keys: tuple[Any, ...], param: Any) -> bool:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        name = path.rpartition("/")[2]
        return name in ("kernel", "embedding") and jnp.ndim(param) > 1 and path not in factors

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def cross_entropy(
    logits: Float[Array, "b classes"], labels: Int[Array, " b"], *, label_smoothing: float = 0.0
) -> Float[Array, " b"]:
    """Softmax cross-entropy of every example, in float32.

    Args:
      logits: scores of the classes.
      labels: the true classes.
      label_smoothing: share of the target spread evenly over all classes, in [0, 1).

    Returns:
      The loss of each example, ``f32[b]``.

    Raises:
      ConfigError: if ``label_smoothing`` is out of its range.
    """
    _check("loss.label_smoothing", label_smoothing, 0 <= label_smoothing < 1, "0 or more, and below 1")
    logits = logits.astype(jnp.float32)
    if not label_smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def _check(key: str, value: Any, is_valid: bool, rule: str) -> None:
    if not is_valid or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(f"{key} = {value!r}: it must be {rule}")


def _check_schedule(config: Settings, *, epochs: int, steps_per_epoch: int) -> None:
    names = ("steps", "cosine", "constant")
    _check("schedule.name", config.name, config.name in names, f"one of {', '.join(names)}")
    _check("epochs", epochs, epochs >= 1, "1 or more")
    _check("steps per epoch", steps_per_epoch, steps_per_epoch >= 1, "1 or more: is batch_size too large?")
    _check("schedule.peak", config.peak, config.peak > 0, "above 0")
    _check("schedule.warmup_start", config.warmup_start, config.warmup_start >= 0, "0 or more")
    in_run = 0 <= config.warmup_epochs < epochs
    _check(
        "schedule.warmup_epochs", config.warmup_epochs, in_run, f"0 or more, and less than epochs = {epochs}"
    )
    _check("schedule.decay", config.decay, config.decay > 0, "above 0")
    _check("schedule.final", config.final, config.final >= 0, "0 or more")
    milestones = tuple(config.milestones)
    in_range = all(0 < share < 1 for share in milestones)
    _check("schedule.milestones", milestones, in_range, "shares of the run, each between 0 and 1")


def _check_optimizer(config: Settings) -> None:
    names = ("sgd", "adamw")
    _check("optimizer.name", config.name, config.name in names, f"one of {', '.join(names)}")
    for key in ("momentum", "b1", "b2"):
        _check(f"optimizer.{key}", config[key], 0 <= config[key] < 1, "0 or more, and below 1")
    for key in ("weight_decay", "frobenius_decay", "clip_norm"):
        _check(f"optimizer.{key}", config[key], config[key] >= 0, "0 or more")
