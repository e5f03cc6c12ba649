"""The table of a factorization plan that people read before and at the switch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cuttlefish_jax.text_table import align

if TYPE_CHECKING:
    from cuttlefish_jax.plan.budgets import BudgetUse
    from cuttlefish_jax.plan.plan import FactorizationPlan

_HEADER = ("layer", "kernel", "rank", "of", "full", "factors", "why")


def plan_table(plan: FactorizationPlan) -> str:
    """Every layer with its kernel's shape, rank, full rank, parameters, and what decided."""
    rows: list[tuple[str, ...]] = [_HEADER]
    for path, kernel in plan.kernels.items():
        rank = plan.ranks.get(path)
        shape = "x".join(map(str, kernel.shape))
        full = f"{kernel.num_params():,}"
        if rank is None:
            rows.append((path or "(root)", shape, "-", str(kernel.max_rank), full, "", plan.kept[path]))
        else:
            factors = f"{kernel.num_params(rank):,}"
            why = plan.decided.get(path, "")
            rows.append((path or "(root)", shape, str(rank), str(kernel.max_rank), full, factors, why))
    rows += [(path, "", "-", "", "", "", reason) for path, reason in plan.kernels.skipped.items()]
    return "\n".join([*align(rows, right={2, 3, 4, 5}), "", _totals(plan)])


def _totals(plan: FactorizationPlan) -> str:
    kernels = plan.kernels.values()
    flops_full = sum(kernel.flops() for kernel in kernels)
    flops_low = sum(kernel.flops(plan.ranks.get(kernel.path)) for kernel in kernels)
    lines = [
        f"{len(plan.ranks)} of {len(plan.kernels)} kernels are factorized",
        f"parameters of the model: {_change(plan.num_params_full, plan.num_params)}",
        f"forward FLOPs of the kernels, per example: {_change(flops_full, flops_low)}",
    ]
    if plan.budget is not None:
        lines.append(budget_line(plan.budget))
    return "\n".join(lines)


def budget_line(use: BudgetUse) -> str:
    """What became of a plan's budget."""
    text = f"budget: {use.budget.share:g} of the {use.budget.noun}; "
    if use.asked != use.used:
        text += f"the rank rule asked for {use.asked:.4g}, "
    return text + f"the plan uses {use.used:.4g}"


def _change(before: int, after: int) -> str:
    if before == after:
        return f"{before:,}, unchanged"
    ratio = max(before, after) / max(min(before, after), 1)
    return f"{before:,} -> {after:,} ({ratio:.2f}x {'fewer' if after < before else 'more'})"
