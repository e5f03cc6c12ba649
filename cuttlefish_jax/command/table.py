"""What the command line prints of a checkpoint: its layers, their spectra, and what a plan saves."""

from __future__ import annotations

from typing import Any

import numpy as np

import cuttlefish_jax as cf
from cuttlefish_jax.command.plans import Spectra
from cuttlefish_jax.command.torch_names import NOTE
from cuttlefish_jax.command.tree_kernels import HEURISTICS
from cuttlefish_jax.plan.report import budget_line
from cuttlefish_jax.text_table import align

_HEADER = (
    "layer",
    "kernel",
    "type",
    "of",
    "stable",
    "90 %",
    "rank",
    "full",
    "factors",
    "kept full-rank because",
)


def spectra_table(spectra: Spectra, plan: cf.FactorizationPlan) -> str:
    """A line for each layer, the sums, and where the kernels come from.

    ``of`` is the full rank, ``stable`` the stable rank, ``90 %`` the singular values that hold as much of the
    squared norm, ``rank`` the plan's. Of stacked layers the two are the lowest and the highest of the copies.
    """
    rows: list[tuple[str, ...]] = [_HEADER]
    for path, kernel in spectra.kernels.items():
        rank = plan.ranks.get(path)
        sigmas = np.asarray(spectra.singular_values[path], np.float64)
        rows.append(
            (
                path or "(root)",
                "x".join(map(str, kernel.shape)),
                kernel.layer,
                str(kernel.max_rank),
                _range(spectra.stable_ranks[path], "{:.1f}"),
                _range(energy_ranks(sigmas), "{:.0f}"),
                "-" if rank is None else str(rank),
                f"{kernel.num_params():,}",
                "" if rank is None else f"{kernel.num_params(rank):,}",
                plan.kept.get(path, ""),
            )
        )
    blank = ("",) * (len(_HEADER) - 2)
    rows += [(path, *blank, reason) for path, reason in spectra.kernels.skipped.items()]
    return "\n".join([*align(rows, right={3, 4, 5, 6, 7, 8}), "", *_totals(spectra, plan)])


def energy_ranks(sigmas: np.ndarray, share: float = 0.9) -> np.ndarray:
    """How many of the leading singular values hold a share of the sum of their squares, ``[*stack]``."""
    sums = np.cumsum(sigmas**2, axis=-1)
    return 1 + np.sum(sums < share * sums[..., -1:], axis=-1)


def _range(values: Any, form: str) -> str:
    values = np.asarray(values, np.float64)
    low, high = form.format(values.min()), form.format(values.max())
    return low if low == high else f"{low}-{high}"


def _totals(spectra: Spectra, plan: cf.FactorizationPlan) -> list[str]:
    kernels = spectra.kernels.values()
    lines = [
        f"{len(plan.ranks)} of {len(plan.kernels)} kernels are factorized",
        f"parameters: {_change(plan.num_params_full, plan.num_params)}",
    ]
    if spectra.knows_flops:
        full = sum(kernel.flops() for kernel in kernels)
        low = sum(kernel.flops(plan.ranks.get(kernel.path)) for kernel in kernels)
        lines.append(f"forward FLOPs of the kernels, per example: {_change(full, low)}")
    if plan.budget is not None:
        lines.append(budget_line(plan.budget))
    if spectra.is_guessed:
        lines += ["", f"{HEURISTICS}. With --config or --model they are exact, and FLOPs are known."]
    return [*lines, "", f"{NOTE}."] if spectra.is_of_torch else lines


def _change(before: int, after: int) -> str:
    if before == after:
        return f"{before:,}"
    return f"{before:,} -> {after:,} ({before / after:.2f}x fewer)"
