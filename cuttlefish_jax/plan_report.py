"""The table of a factorization plan that people read before and at the switch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cuttlefish_jax.plan import FactorizationPlan

_HEADER = ("layer", "kernel", "rank", "of", "full", "factors", "kept full-rank because")


def plan_table(plan: FactorizationPlan) -> str:
    """Every layer with its kernel's shape, rank, full rank, parameters, and the reason if it is kept."""
    rows = [_HEADER]
    for path, kernel in plan.kernels.items():
        rank = plan.ranks.get(path)
        shape = "x".join(map(str, kernel.shape))
        full = f"{kernel.num_params():,}"
        if rank is None:
            rows.append((path or "(root)", shape, "-", str(kernel.max_rank), full, "", plan.kept[path]))
        else:
            factors = f"{kernel.num_params(rank):,}"
            rows.append((path or "(root)", shape, str(rank), str(kernel.max_rank), full, factors, ""))
    rows += [(path, "", "-", "", "", "", reason) for path, reason in plan.kernels.skipped.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    right = {2, 3, 4, 5}
    lines = [
        "  ".join(
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in [*lines, "", _totals(plan)])


def _totals(plan: FactorizationPlan) -> str:
    full, low = plan.num_params_full, plan.num_params
    kernels = plan.kernels.values()
    flops_full = sum(kernel.flops() for kernel in kernels)
    flops_low = sum(kernel.flops(plan.ranks.get(kernel.path)) for kernel in kernels)
    return (
        f"{len(plan.ranks)} of {len(plan.kernels) + len(plan.kernels.skipped)} layers are factorized: "
        f"{full:,} -> {low:,} parameters ({full / max(low, 1):.2f}x fewer), "
        f"{flops_full:,} -> {flops_low:,} FLOPs per example ({flops_full / max(flops_low, 1):.2f}x fewer)"
    )
