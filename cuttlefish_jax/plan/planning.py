"""From measurements to a plan: which layers become two factors, at what rank, and why not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cuttlefish_jax.kernels import Kernel, Kernels
from cuttlefish_jax.plan.budget_fit import Decision, within_budget
from cuttlefish_jax.plan.budgets import Budget, num_params_low
from cuttlefish_jax.plan.kept_reasons import default_reasons, slow_layer, slow_stack, zero_kernel
from cuttlefish_jax.plan.measured import measure
from cuttlefish_jax.plan.plan import FactorizationPlan
from cuttlefish_jax.plan.rank_rules import RankRule, ScaledStableRank, check_rank_rule
from cuttlefish_jax.plan.rules import RankBounds, Rule, check_count, check_rules

if TYPE_CHECKING:
    from cuttlefish_jax.profiling.kernel_profile import KernelProfile


def make_plan(
    kernels: Kernels,
    ranks_t: Mapping[str, Any] | None = None,
    ranks_0: Mapping[str, Any] | None = None,
    *,
    singular_values: Mapping[str, Any] | None = None,
    rank_rule: RankRule = ScaledStableRank(),  # noqa: B008 (frozen)
    rules: Sequence[Rule] = (),
    budget: Budget | None = None,
    profile: KernelProfile | None = None,
    min_speedup: float = 1.5,
    min_layer_speedup: float = 1.0,
    round_to: int = 1,
    min_rank_ratio: float = 0.0,
    max_rank_ratio: float = 1.0,
    extra_batch_norm: bool = False,
) -> FactorizationPlan:
    r"""Chooses the layers to factorize, and their ranks.

    The rank is the one that ``rank_rule`` gives, in ``[1, min(m, n)]``: by default the scaled stable rank,
    :math:`r = \lceil \xi \, sr(W_t) \rceil` with :math:`\xi = \min(m, n) / sr(W_0)` (Cuttlefish, Wang et al.,
    MLSys 2023). Layers stacked by ``scan`` or ``vmap`` share one rank, their largest.

    Kept full-rank, unless one of ``rules`` matches them, are the first layer (behind an embedding, that is
    the embedding, and no kernel), the last one and 1x1 shortcut convolutions (their own names have shortcut,
    downsample, proj, skip or residual in them), and with a ``profile`` every layer that would not get faster.
    A kernel of zeros is kept unless a rule gives it a rank: its factors would hardly move from zero. A layer
    that would not get smaller is kept in any case.

    A ``budget`` is an upper bound. A plan within it is left alone. Otherwise the ranks are lowered together,
    so that the model keeps as much as possible: with :math:`\sigma_i` the singular values of layer :math:`l`,

    .. math:: \max_r \sum_l \sum_{i \le r_l} \sigma_{l,i}^2 / \|W_l\|_F^2
              \quad \text{such that} \quad \sum_l c_l(r_l) \le \text{share} \cdot \text{full-rank cost}

    where :math:`r_l` is at most what the rank rule gave (a layer that it kept for its high rank may stay, at
    full cost, or get any lower rank), at least the layer's minimum, and a multiple of ``round_to``. Each copy
    in a stack counts as a layer, with the one rank that they share. The solution is a water-filling
    (:mod:`cuttlefish_jax.plan.water_filling`): one threshold on the relative squared singular value per unit
    of cost for all layers. Fixed ranks, and layers kept for another reason, stay as they are.

    Args:
      kernels: what :func:`cuttlefish_jax.find_kernels` returned.
      ranks_t: ``{path: stable rank}`` now, a scalar or ``[*stack]``; not needed by every ``rank_rule``.
      ranks_0: the same at the random initialisation; ``None`` for pre-trained weights.
      singular_values: ``{path: f[*stack, min(m, n)]}`` now, what :func:`cuttlefish_jax.singular_values`
        returned; for the rank rules that look at them, and for a ``budget``.
      rank_rule: how ranks are chosen.
      rules: exceptions, tried in order.
      budget: how much of the model may be left, such as ``cf.Parameters(0.3)``, ``cf.FLOPs(0.5)`` or, with a
        ``profile``, ``cf.Time(0.7)``.
      profile: measured speed-ups, what :func:`cuttlefish_jax.profile_kernels` returned.
      min_speedup: with a profile, the layers of a stack are kept if it gets less than this many times faster.
      min_layer_speedup: with a profile, a layer is kept unless it is predicted to run more than this many
        times as fast at its own rank; 0 if being smaller is enough.
      round_to: ranks are rounded up to a multiple of this (at most to ``min(m, n)``), such as
        :func:`cuttlefish_jax.tile_size`.
      min_rank_ratio: lower bound of every rank, as a share of ``min(m, n)``.
      max_rank_ratio: upper bound of every rank, as a share of ``min(m, n)``; it is not exceeded by rounding.
      extra_batch_norm: put a batch norm between the factors.

    Raises:
      ValueError: for what is no kernels or no rules, a rule that matches nothing, a fixed rank out of bounds,
        a measurement that the rank rule or the budget needs and that is missing, or that is not finite, a
        profile of another model, a budget that cannot be met (the message says what can).

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, cuttlefish_jax as cf
      >>> model, x = nn.Sequential([nn.Dense(64) for _ in range(3)]), jnp.ones((1, 64))
      >>> kernels = cf.find_kernels(model, x)
      >>> cf.make_plan(kernels, {path: 5.0 for path in kernels}).ranks
      {'layers_1': 20}
      >>> cf.make_plan(kernels, rank_rule=cf.RankRatio(0.25), rules=[cf.Rule("layers_2")]).ranks
      {'layers_1': 16, 'layers_2': 16}
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> plan = cf.make_plan(kernels, rank_rule=cf.RankRatio(0.25), budget=cf.Parameters(0.75),
      ...                     singular_values=cf.singular_values(params, kernels))
      >>> plan.ranks, plan.num_params / plan.num_params_full < 0.75
      ({'layers_1': 7}, True)
    """
    if not isinstance(kernels, Kernels):
        raise ValueError(f"make_plan needs what find_kernels returned first, got {type(kernels).__name__}")
    check_count("round_to", round_to)
    if not 0 <= min_rank_ratio <= 1:
        raise ValueError(f"min_rank_ratio {min_rank_ratio} is not in [0, 1]")
    if not 0 < max_rank_ratio <= 1:
        raise ValueError(f"max_rank_ratio {max_rank_ratio} is not in (0, 1]")
    for name, bound in (("min_speedup", min_speedup), ("min_layer_speedup", min_layer_speedup)):
        if not 0 <= bound < math.inf:
            raise ValueError(f"{name} {bound} is not a number >= 0")
    check_rank_rule(rank_rule)
    check_rules(rules, kernels)
    if profile is not None:
        profile.check(kernels)
    if budget is not None:
        _check_budget(budget, singular_values)

    defaults = default_reasons(kernels)

    def objection(kernel: Kernel, rule: Rule | None, rank: int) -> str | None:
        if num_params_low(kernel, rank, extra_batch_norm) >= kernel.num_params():
            return f"rank {rank} of {kernel.max_rank} would not make it smaller"
        return slow_layer(profile, kernel.path, rank, min_layer_speedup) if rule is None else None

    def lower_ranks(kernel: Kernel, rule: Rule | None, bounds: RankBounds, rank: int) -> tuple[int, ...]:
        if budget is None:
            return ()
        return tuple(r for r in bounds.ranks() if r < rank and not objection(kernel, rule, r))

    def decide(kernel: Kernel) -> Decision:
        rule = next((rule for rule in rules if rule.matches(kernel.path)), None)
        by = "" if rule is None else f"rule {rule.pattern!r}"
        if rule is None:
            reason = defaults.get(kernel.path) or slow_stack(profile, kernel.path, min_speedup)
        else:
            reason = by if rule.keep else None
        if reason:
            return Decision(kernel=kernel, rank=None, why=reason)
        bounds = RankBounds.of(
            kernel, rule, round_to=round_to, min_rank_ratio=min_rank_ratio, max_rank_ratio=max_rank_ratio
        )
        rank = None if rule is None else rule.fixed_rank(kernel)
        measured = measure(kernel, rank_rule if rank is None else None, ranks_t, ranks_0, singular_values)
        if rule is not None and rank is not None:
            rank = rank if rule.rank is not None else bounds.fit(rank)
            reason = objection(kernel, rule, rank)
            return Decision(kernel=kernel, rank=None if reason else rank, why=reason or by)
        if reason := zero_kernel(measured):
            return Decision(kernel=kernel, rank=None, why=reason)
        rank = bounds.fit(rank_rule.rank(measured))
        reason = objection(kernel, rule, rank)
        return Decision(
            kernel=kernel,
            rank=None if reason else rank,
            why=reason or ", ".join(filter(None, [by, type(rank_rule).__name__])),
            lower_ranks=lower_ranks(kernel, rule, bounds, rank),
            singular_values=measured.singular_values,
        )

    decisions, use = [decide(kernel) for kernel in kernels.values()], None
    if budget is not None:
        decisions, use = within_budget(
            budget, kernels, decisions, profile=profile, extra_batch_norm=extra_batch_norm
        )
    return FactorizationPlan(
        kernels=kernels,
        rank_entries=tuple((d.kernel.path, d.rank) for d in decisions if d.rank is not None),
        kept_entries=tuple((d.kernel.path, d.why) for d in decisions if d.rank is None),
        decided_entries=tuple((d.kernel.path, d.why) for d in decisions if d.rank is not None),
        budget=use,
        extra_batch_norm=extra_batch_norm,
    )


def _check_budget(budget: Any, singular_values: Mapping[str, Any] | None) -> None:
    if not isinstance(budget, Budget):
        raise ValueError(f"{budget!r} is not a budget: give one such as Parameters(0.3)")
    if singular_values is None:
        raise ValueError(
            f"budget {budget!r} needs singular values: "
            "pass singular_values=cf.singular_values(params, kernels)"
        )
