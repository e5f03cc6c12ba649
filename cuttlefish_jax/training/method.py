"""Methods of training as combinations of the core's parts: a criterion of the switch, rules of the ranks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from cuttlefish_jax import (
    AtEpoch,
    FactorizationPlan,
    Kernels,
    Never,
    RankTracker,
    ReferencePlateau,
    RelativePlateau,
    Rule,
    make_plan,
)
from cuttlefish_jax.training.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cuttlefish_jax.training.config import Config

CRITERIA = {
    "relative_plateau": lambda config: RelativePlateau(),
    "reference_cifar": lambda config: ReferencePlateau.cifar(),
    "reference_resnet50": lambda config: ReferencePlateau.resnet50(),
    "reference_deit": lambda config: ReferencePlateau.deit(),
    "at_epoch": lambda config: AtEpoch(config.epoch),
}
METHODS = ("cuttlefish", "full_rank")


def make_tracker(config: Config) -> RankTracker:
    """The tracker that decides when to switch; a full-rank run has one that never does."""
    if config.method == "full_rank":
        return RankTracker(Never())
    return RankTracker(CRITERIA[config.switch.criterion](config.switch))


def deadline(config: Config) -> int | None:
    """The epoch by which the ranks should have converged, ``None`` if nothing is awaited."""
    if config.method == "full_rank" or config.switch.criterion == "at_epoch":
        return None
    return math.ceil(config.switch.deadline * config.epochs)


def plan_from_config(
    config: Config,
    kernels: Kernels,
    ranks_t: Mapping[str, object],
    ranks_0: Mapping[str, object],
) -> FactorizationPlan:
    """The plan that the configuration's rules give; see :func:`cuttlefish_jax.make_plan`.

    Raises:
      ConfigError: for a rule that matches no layer.
    """
    rules = [Rule(pattern, keep=True) for pattern in config.plan.keep]
    rules += [Rule(pattern) for pattern in config.plan.factorize]
    try:
        return make_plan(
            kernels,
            ranks_t,
            ranks_0,
            rules=rules,
            round_to=config.plan.round_to,
            min_rank_ratio=config.plan.min_rank_ratio,
            extra_batch_norm=config.plan.extra_batch_norm,
        )
    except ValueError as error:
        raise ConfigError(f"config.plan: {error}") from error


def check_config(config: Config) -> None:
    """Refuses settings that make no sense, before any work is done.

    Raises:
      ConfigError: names the setting, its value and what it may be.
    """
    one_of = {
        "method": (config.method, METHODS),
        "switch.criterion": (config.switch.criterion, tuple(CRITERIA)),
        "switch.if_never": (config.switch.if_never, ("full_rank", "switch")),
        "switch.optimizer": (config.switch.optimizer, ("carry", "reset")),
        "switch.learning_rate": (config.switch.learning_rate, ("continue", "rewarmup")),
        "ranks.method": (config.ranks.method, ("exact", "lanczos")),
    }
    for key, (value, valid) in one_of.items():
        if value not in valid:
            raise ConfigError(f"config.{key} = {value!r}: it must be one of {', '.join(valid)}")
    for key in ("epochs", "batch_size"):
        if config[key] < 1:
            raise ConfigError(f"config.{key} = {config[key]}: it must be 1 or more")
    for key in ("keep", "every_epochs"):
        if config.checkpoint[key] < 1:
            raise ConfigError(f"config.checkpoint.{key} = {config.checkpoint[key]}: it must be 1 or more")
    if not 0 < config.switch.deadline <= 1:
        raise ConfigError(f"config.switch.deadline = {config.switch.deadline}: it must be in (0, 1]")
    if config.switch.epoch < 0:
        raise ConfigError(f"config.switch.epoch = {config.switch.epoch}: it must be 0 or more")
    if not 0 <= config.optimizer.ema < 1:
        raise ConfigError(f"config.optimizer.ema = {config.optimizer.ema}: it must be in [0, 1)")
    if config.plan.extra_batch_norm and config.optimizer.frobenius_decay:
        raise ConfigError(
            "config.plan.extra_batch_norm and config.optimizer.frobenius_decay exclude each other: "
            "set one of them to False or 0"
        )
