"""Checks that a plan and the rules for it share, and their one-line messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import numpy as np

from cuttlefish_jax.kernels import Kernel


def check_rank(rank: Any, kernel: Kernel) -> int:
    """``rank`` as an ``int``; a ValueError if the kernel cannot have it."""
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)):
        raise ValueError(f"rank {rank!r} for {kernel.path!r} is not an integer")
    if rank < 1:
        raise ValueError(f"rank {rank} for {kernel.path!r} is below 1")
    if rank > kernel.max_rank:
        raise ValueError(f"rank {rank} for {kernel.path!r} exceeds min(m, n) = {kernel.max_rank}")
    return int(rank)


def no_such_layer(name: str, kernels: Iterable[str], what: str = "path") -> str:
    """The message for a name that is no layer's, with the names near it."""
    near = difflib.get_close_matches(name, list(kernels), n=3, cutoff=0.0)
    names = ", ".join(path or "(root)" for path in near)
    hint = f"near it: {names}" if near else "the model has no kernels"
    return f"{what} {name!r} matches no layer; {hint}"
