"""Refuses settings that make no sense before any work is done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cuttlefish_jax as cf
from cuttlefish_jax.errors import ConfigError, check_setting
from cuttlefish_jax.plan.rank_rules import RANK_RULES
from cuttlefish_jax.training.method import CRITERIA, METHODS, make_method
from cuttlefish_jax.training.parallelism import PARALLELISMS
from cuttlefish_jax.training.schedule import AFTER_SWITCH

if TYPE_CHECKING:
    from collections.abc import Callable

    from cuttlefish_jax.training.config import Config

_INTEGERS = (int, "a tuple of integers, e.g. (2,3)")
_NUMBERS = ((int, float), "a tuple of numbers, e.g. (0.5,0.75)")
_PATTERNS = (str, "a tuple of patterns, e.g. ('stage1/*',)")
_LISTS = {
    "model.stage_sizes": _INTEGERS,
    "model.fresh": _PATTERNS,
    "model.unused": _PATTERNS,
    "data.lengths": _INTEGERS,
    "optimizer.freeze": _PATTERNS,
    "schedule.milestones": _NUMBERS,
    "plan.keep": _PATTERNS,
    "plan.factorize": _PATTERNS,
    "pufferfish.keep": _PATTERNS,
    "si_fd.keep": _PATTERNS,
}


def check_config(config: Config) -> None:
    """Refuses settings that make no sense, before any work is done.

    Raises:
      ConfigError: names the setting, its value and what it may be.
    """
    one_of = {
        "method": (config.method, tuple(METHODS)),
        "parallelism": (config.parallelism, PARALLELISMS),
        "switch.criterion": (config.switch.criterion, tuple(CRITERIA)),
        "switch.if_never": (config.switch.if_never, ("full_rank", "switch")),
        "switch.optimizer": (config.switch.optimizer, ("carry", "reset")),
        "switch.learning_rate": (config.switch.learning_rate, AFTER_SWITCH),
        "ranks.method": (config.ranks.method, ("warm", "lanczos", "exact")),
        "nonfinite": (config.nonfinite, ("stop", "skip")),
        "data.interpolation": (config.data.interpolation, ("bilinear", "bicubic")),
    }
    for key, (value, valid) in one_of.items():
        check_setting(f"config.{key}", value, value in valid, f"one of {', '.join(valid)}")
    for rule in config.plan.rank_rule.split("+"):
        known = f"one of {', '.join(RANK_RULES)}, or several joined by +"
        check_setting("config.plan.rank_rule", config.plan.rank_rule, rule in RANK_RULES, known)
    _check_budget(config)
    for key, (kind, rule) in _LISTS.items():
        section, _, name = key.partition(".")
        value = config[section][name]
        is_list = isinstance(value, (tuple, list)) and all(isinstance(item, kind) for item in value)
        check_setting(f"config.{key}", value, is_list, rule)
    at_least_1 = (
        "epochs batch_size max_skipped_steps checkpoint.keep checkpoint.every_epochs evaluation.every_epochs "
        "optimizer.accumulation_steps data.repeated_augmentation data.max_length plan.round_to"
    )
    for key in at_least_1.split():
        _check_number(config, key, lambda value: value >= 1, "1 or more")
    at_least_0 = (
        "switch.epoch switch.recalibration_batches plan.calibration_batches profile.min_speedup "
        "profile.min_layer_speedup "
        "data.train_examples data.validation_examples data.workers data.crop_padding data.color_jitter "
        "data.mixup data.cutmix checkpoint.every_steps"
    )
    for key in at_least_0.split():
        _check_number(config, key, lambda value: value >= 0, "0 or more")
    # JAX would take the last 32 bits of a larger one, and give two runs the same numbers.
    _check_number(config, "seed", lambda value: 0 <= value < 2**32, "from 0 to 2**32 - 1")
    for key in (
        "switch.deadline",
        "plan.rank_ratio",
        "profile.ratio",
        "pufferfish.rank_ratio",
        "si_fd.rank_ratio",
    ):
        _check_number(config, key, lambda value: 0 < value <= 1, "in (0, 1]")
    _check_number(config, "data.random_erasing", lambda value: 0 <= value <= 1, "in [0, 1]")
    for key in ("optimizer.ema", "pufferfish.switch_share", "model.drop_path", "switch.rank_tolerance"):
        _check_number(config, key, lambda value: 0 <= value < 1, "in [0, 1)")
    _check_number(config, "switch.learning_rate_factor", lambda value: value > 0, "above 0")
    if config.plan.extra_batch_norm and make_method(config).frobenius_decay:
        raise ConfigError(
            "config.plan.extra_batch_norm and Frobenius decay (config.optimizer.frobenius_decay, or that of "
            "the method si_fd) exclude each other: set one of them to False or 0"
        )


def _check_budget(config: Config) -> None:
    if not (text := config.plan.budget):
        return
    try:
        budget = cf.Budget.parse(text)
    except ValueError as error:
        raise ConfigError(f"config.plan.budget: {error}") from error
    if isinstance(budget, cf.Time) and not config.profile.enabled:
        raise ConfigError(
            f"config.plan.budget {text!r} needs measured times: set config.profile.enabled=True"
        )


def _check_number(config: Config, key: str, is_valid: Callable[[Any], bool], rule: str) -> None:
    section, _, name = key.rpartition(".")
    value = config[section][name] if section else config[name]
    check_setting(f"config.{key}", value, is_valid(value), rule)
