"""The optimizer of a run, built from optax parts."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from cuttlefish_jax.decay import frobenius_decay
from cuttlefish_jax.errors import ConfigError, check_setting
from cuttlefish_jax.precondition import precondition_factors

if TYPE_CHECKING:
    from cuttlefish_jax.plan.plan import FactorizationPlan

# A part of an ml_collections.ConfigDict, of whose values a type checker knows nothing.
Settings = Any


def make_optimizer(
    config: Settings, schedule: optax.Schedule, *, plan: FactorizationPlan | None = None
) -> optax.GradientTransformation:
    """SGD as PyTorch does it, or AdamW.

    SGD adds L2 to the gradient before the momentum and multiplies by the learning rate after it; AdamW
    decays weights beside the adapted gradient. Kernels and embeddings decay, norm scales, biases and tokens
    never do. In the low-rank phase, with ``frobenius_decay``, the factors have the decay of their products
    in place of their own. With ``precondition`` the steps of the factors are those of their product
    (:func:`cuttlefish_jax.precondition_factors`), and the weight decay of SGD is that of the product, too.
    Kernels of ``freeze`` are left as they are: they have no optimizer state, and do not count in the norm
    that gradients are clipped by.

    The structure of the state is the same with and without ``plan``, so it can be carried over a switch.

    Args:
      config: ``name``, ``momentum``, ``nesterov``, ``b1``, ``b2``, ``weight_decay``, ``frobenius_decay``,
        ``precondition``, ``clip_norm``, ``freeze``.
      schedule: the learning rate; it counts the updates since the state's own ``init``.
      plan: what is factorized; None in the full-rank phase.

    Returns:
      The transformation of gradients into updates.

    Raises:
      ConfigError: for an unknown name or a number out of its range.
    """
    _check_optimizer(config)
    trained = _chain(config, schedule, plan)
    if not config.freeze:
        return trained

    def labels(params: Any) -> Any:
        return jax.tree.map(lambda frozen: "frozen" if frozen else "trained", frozen_mask(params, config))

    return optax.partition({"trained": trained, "frozen": optax.set_to_zero()}, labels)


def frozen_mask(params: Any, config: Settings) -> Any:
    """A tree of booleans: which parameters are not trained, those of ``config.freeze``.

    A pattern is one of layers; their kernels and embeddings are frozen, their biases are not.

    Raises:
      ConfigError: for a pattern that matches no layer.
    """
    patterns: Sequence[str] = config.freeze
    unmatched = set(patterns)

    def is_frozen(keys: tuple[Any, ...], param: Any) -> bool:
        layer, _, name = jax.tree_util.keystr(keys, simple=True, separator="/").rpartition("/")
        matching = {pattern for pattern in patterns if fnmatch.fnmatchcase(layer, pattern)}
        if name not in ("kernel", "embedding"):
            return False
        unmatched.difference_update(matching)
        return bool(matching)

    mask = jax.tree_util.tree_map_with_path(is_frozen, params)
    if unmatched:
        raise ConfigError(f"config.optimizer.freeze: {min(unmatched)!r} matches no layer with a kernel")
    return mask


def _chain(
    config: Settings, schedule: optax.Schedule, plan: FactorizationPlan | None
) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    is_sgd = config.name == "sgd"
    factors: frozenset[str] = frozenset()
    frobenius = precondition = optax.identity()
    coefficient = config.frobenius_decay
    if config.precondition and is_sgd:
        # L2 decay of the factors, preconditioned, would be a decay of the singular values' sum.
        coefficient = coefficient or config.weight_decay
    if plan is not None and coefficient:
        # The path of a model that is one layer is empty.
        factors = frozenset(f"{path}/{factor}/kernel".lstrip("/") for path in plan.ranks for factor in "uv")
        frobenius = frobenius_decay(coefficient, plan)
    if plan is not None and config.precondition:
        precondition = precondition_factors(plan, normalized=not is_sgd)
    decay = optax.add_decayed_weights(config.weight_decay, mask=lambda params: _decayed(params, factors))
    learning_rate = optax.scale_by_learning_rate(schedule)
    if is_sgd:
        momentum = optax.trace(config.momentum, nesterov=config.nesterov)
        return optax.chain(clip, decay, frobenius, momentum, precondition, learning_rate)
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2)
    return optax.chain(clip, adam, precondition, decay, frobenius, learning_rate)


def _decayed(params: Any, factors: frozenset[str]) -> Any:
    """A tree of booleans: which parameters have weight decay."""

    # By name and not by the number of axes alone: biases of layers stacked by scan have two.
    def is_decayed(keys: tuple[Any, ...], param: Any) -> bool:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        name = path.rpartition("/")[2]
        return name in ("kernel", "embedding") and jnp.ndim(param) > 1 and path not in factors

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def _check_optimizer(config: Settings) -> None:
    names = ("sgd", "adamw")
    check_setting("optimizer.name", config.name, config.name in names, f"one of {', '.join(names)}")
    for key in ("momentum", "b1", "b2"):
        check_setting(f"optimizer.{key}", config[key], 0 <= config[key] < 1, "0 or more, and below 1")
    for key in ("weight_decay", "frobenius_decay", "clip_norm"):
        check_setting(f"optimizer.{key}", config[key], config[key] >= 0, "0 or more")
