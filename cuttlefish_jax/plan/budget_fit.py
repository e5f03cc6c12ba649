"""Ranks within a budget: what the rank rule gave, lowered together by water-filling."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cuttlefish_jax.kernels import Kernel, Kernels
from cuttlefish_jax.plan.budgets import Budget, BudgetUse
from cuttlefish_jax.plan.water_filling import water_fill

if TYPE_CHECKING:
    from jaxtyping import Float64

    from cuttlefish_jax.profiling.kernel_profile import KernelProfile

# A share that is met but for rounding is met.
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Decision:
    """What becomes of one kernel.

    Attributes:
      kernel: the kernel.
      rank: its rank, ``None`` if it is kept.
      why: what decided that.
      lower_ranks: the ranks that a budget may choose instead, ascending.
      singular_values: descending, ``f64[*stack, min(m, n)]``, if they are known.
    """

    kernel: Kernel
    rank: int | None
    why: str
    lower_ranks: tuple[int, ...] = ()
    singular_values: Float64[np.ndarray, "*stack r"] | None = None


def within_budget(
    budget: Budget,
    kernels: Kernels,
    decisions: Sequence[Decision],
    *,
    profile: KernelProfile | None,
    extra_batch_norm: bool,
) -> tuple[list[Decision], BudgetUse]:
    """The decisions, with lower ranks where the budget asks for them.

    Raises:
      ValueError: if the lowest ranks are too many, or singular values are missing.
    """

    def cost(kernel: Kernel, rank: int | None) -> float:
        return float(budget.cost(kernel, rank, profile=profile, extra_batch_norm=extra_batch_norm))

    def left(ranks: Sequence[int | None]) -> float:
        changes = (cost(d.kernel, r) - cost(d.kernel, None) for d, r in zip(decisions, ranks, strict=True))
        return full + sum(changes)

    full = float(budget.full_cost(kernels, profile))
    asked = left([decision.rank for decision in decisions])
    allowed = budget.share * full * (1 + _ROUNDING)
    if asked <= allowed:
        share = asked / full if full else 1.0
        return list(decisions), BudgetUse(budget=budget, asked=share, used=share)

    options: list[list[int | None]] = [[*decision.lower_ranks, decision.rank] for decision in decisions]
    costs = [
        np.array([cost(decision.kernel, rank) for rank in ranks])
        for decision, ranks in zip(decisions, options, strict=True)
    ]
    lowest = left([ranks[int(np.argmin(cost))] for ranks, cost in zip(options, costs, strict=True)])
    if lowest > allowed:
        possible = math.ceil(1e4 * lowest / full) / 1e4
        raise ValueError(
            f"budget {budget!r} cannot be met: the smallest share of the {budget.noun} is {possible:g}, "
            "with every layer at the lowest rank that the rules allow"
        )
    energies = [_energies(decision, ranks) for decision, ranks in zip(decisions, options, strict=True)]
    fixed = asked - sum(cost[-1] for cost in costs)
    chosen = water_fill(costs, energies, allowed - fixed)
    ranks = [options[layer][option] for layer, option in enumerate(chosen)]
    lowered = [_lowered(decision, rank) for decision, rank in zip(decisions, ranks, strict=True)]
    return lowered, BudgetUse(budget=budget, asked=asked / full, used=left(ranks) / full)


def _energies(decision: Decision, ranks: Sequence[int | None]) -> Float64[np.ndarray, " options"]:
    """The share of its squared Frobenius norm that a kernel keeps at each rank, summed over its copies."""
    if len(ranks) == 1:
        return np.zeros(1)  # there is nothing to choose
    sigmas = decision.singular_values
    if sigmas is None:
        raise ValueError(f"there is no spectrum for {decision.kernel.path!r}")
    # Scaled first, so that no square overflows or vanishes; a kernel of zeros has been kept.
    energies = (sigmas / sigmas[..., :1]) ** 2
    shares = energies / np.sum(energies, axis=-1, keepdims=True)
    kept = np.cumsum(np.sum(shares.reshape(-1, shares.shape[-1]), axis=0))
    return np.array([kept[-1] if rank is None else kept[rank - 1] for rank in ranks])


def _lowered(decision: Decision, rank: int | None) -> Decision:
    if rank == decision.rank:
        return decision
    wish = decision.why if decision.rank is None else f"{decision.why} gave {decision.rank}"
    return dataclasses.replace(decision, rank=rank, why=f"budget; {wish}")
