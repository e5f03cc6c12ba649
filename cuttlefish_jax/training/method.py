"""Methods of training as combinations of the core's parts: a criterion, a rule of the ranks, a regulariser.

The settings of a configuration make the method "cuttlefish"; the other names put another part in the place of
one or two of them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import cuttlefish_jax as cf
from cuttlefish_jax.errors import ConfigError
from cuttlefish_jax.plan.rank_rules import RANK_RULES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cuttlefish_jax.training.config import Config

CRITERIA: Mapping[str, Callable[[Any], cf.Criterion]] = {
    "relative_plateau": lambda config: cf.RelativePlateau(),
    "reference_cifar": lambda config: cf.ReferencePlateau.cifar(),
    "reference_resnet50": lambda config: cf.ReferencePlateau.resnet50(),
    "reference_deit": lambda config: cf.ReferencePlateau.deit(),
    "at_epoch": lambda config: cf.AtEpoch(config.epoch),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """What a method does where methods differ.

    Attributes:
      criterion: when to switch.
      rank_rule: at what ranks.
      keep: patterns of layers that stay full-rank.
      frobenius_decay: on the products of factors.
      precondition: whether the steps of the factors are those of their product, which a norm between them
        excludes.
      uses_profile: whether the layers that do not get faster are kept as well, where they are measured.
      calibration_batches: that show what the layers are given, for factors that spare their outputs.
    """

    criterion: cf.Criterion
    rank_rule: cf.RankRule
    keep: tuple[str, ...]
    frobenius_decay: float
    precondition: bool
    uses_profile: bool = True
    calibration_batches: int = 0

    @property
    def awaits_ranks(self) -> bool:
        """Whether it depends on the stable ranks when the switch comes."""
        return not isinstance(self.criterion, (cf.AtEpoch, cf.Never))


def _cuttlefish(config: Config) -> Method:
    """Cuttlefish (Wang et al., MLSys 2023), as configured."""
    rules = [RANK_RULES[name](config.plan) for name in config.plan.rank_rule.split("+")]
    return Method(
        criterion=CRITERIA[config.switch.criterion](config.switch),
        rank_rule=rules[0] if len(rules) == 1 else cf.LargestOf(tuple(rules)),
        keep=tuple(config.plan.keep),
        frobenius_decay=config.optimizer.frobenius_decay,
        precondition=config.optimizer.precondition and not config.plan.extra_batch_norm,
        calibration_batches=config.plan.calibration_batches,
    )


def _full_rank(config: Config) -> Method:
    """Ordinary training."""
    return dataclasses.replace(_cuttlefish(config), criterion=cf.Never())


def _pufferfish(config: Config) -> Method:
    """Pufferfish (Wang et al., MLSys 2021): which layers, what ranks and when, all fixed beforehand."""
    return dataclasses.replace(
        _cuttlefish(config),
        criterion=cf.AtEpoch(round(config.pufferfish.switch_share * config.epochs)),
        rank_rule=cf.RankRatio(config.pufferfish.rank_ratio),
        keep=tuple(config.pufferfish.keep),
        precondition=False,
        uses_profile=False,
        calibration_batches=0,
    )


def _si_fd(config: Config) -> Method:
    """Spectral initialisation and Frobenius decay (Khodak et al., ICLR 2021): low-rank from the beginning."""
    return Method(
        criterion=cf.AtEpoch(0),
        rank_rule=cf.RankRatio(config.si_fd.rank_ratio),
        keep=tuple(config.si_fd.keep),
        frobenius_decay=config.si_fd.frobenius_decay,
        precondition=False,
        uses_profile=False,
    )


def _with_rank_rule(name: str) -> Callable[[Config], Method]:
    return lambda config: dataclasses.replace(_cuttlefish(config), rank_rule=RANK_RULES[name](config.plan))


METHODS: Mapping[str, Callable[[Config], Method]] = {
    "cuttlefish": _cuttlefish,
    "full_rank": _full_rank,
    "pufferfish": _pufferfish,
    "si_fd": _si_fd,
    **{name: _with_rank_rule(name) for name in ("vanilla_stable_rank", "accumulative_rank", "energy")},
}


def make_method(config: Config) -> Method:
    """The method that the configuration, which must have been checked, describes."""
    return METHODS[config.method](config)


def make_tracker(config: Config) -> cf.RankTracker:
    """The tracker that decides when to switch; a full-rank run has one that never does."""
    return cf.RankTracker(make_method(config).criterion)


def deadline(config: Config) -> int | None:
    """The epoch by which the ranks should have converged, ``None`` if nothing is awaited.

    At the latest the last one: a run of few epochs is not to end without a word about its ranks.
    """
    if not make_method(config).awaits_ranks:
        return None
    return max(1, min(math.ceil(config.switch.deadline * config.epochs), config.epochs - 1))


def rank_tolerance(config: Config) -> float:
    """How far the ranks of the switch may be from the foreseen; not at all with the original's criteria."""
    is_reference = isinstance(make_method(config).criterion, cf.ReferencePlateau)
    return 0.0 if is_reference else config.switch.rank_tolerance


def needs_singular_values(config: Config) -> bool:
    """Whether the plan looks at more than the stable ranks."""
    return bool(config.plan.budget) or make_method(config).rank_rule.needs_singular_values


def plan_from_config(
    config: Config,
    kernels: cf.Kernels,
    ranks_t: Mapping[str, object],
    ranks_0: Mapping[str, object],
    *,
    singular_values: Mapping[str, object] | None = None,
    profile: cf.KernelProfile | None = None,
) -> cf.FactorizationPlan:
    """The plan that the configuration's method gives; see :func:`cuttlefish_jax.make_plan`.

    Args:
      config: a run's configuration.
      kernels: of the network.
      ranks_t: ``{path: stable rank}`` now.
      ranks_0: the same before training. That of pre-trained weights is not used: it says nothing of how far
        they are from random ones.
      singular_values: ``{path: f32[min(m, n)]}`` now, if :func:`needs_singular_values`.
      profile: how much faster each kernel gets, if that was measured.

    Raises:
      ConfigError: for a rule that matches no layer, or a budget that cannot be met.
    """
    method = make_method(config)
    frozen = [cf.Rule(pattern, keep=True) for pattern in config.optimizer.freeze]
    rules = [rule for rule in frozen if any(rule.matches(path) for path in kernels)]
    rules += [cf.Rule(pattern, keep=True) for pattern in method.keep]
    rules += [cf.Rule(pattern) for pattern in config.plan.factorize]
    try:
        return cf.make_plan(
            kernels,
            ranks_t,
            None if config.model.pretrained else ranks_0,
            rank_rule=method.rank_rule,
            singular_values=singular_values,
            profile=profile if method.uses_profile else None,
            min_speedup=config.profile.min_speedup,
            min_layer_speedup=config.profile.min_layer_speedup,
            rules=rules,
            budget=cf.Budget.parse(config.plan.budget) if config.plan.budget else None,
            round_to=config.plan.round_to,
            min_rank_ratio=config.plan.min_rank_ratio,
            extra_batch_norm=config.plan.extra_batch_norm,
        )
    except ValueError as error:
        raise ConfigError(f"config.plan: {error}") from error
