"""Why a layer stays full-rank although nobody said so: where it stands, how fast it gets, what it holds."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from cuttlefish_jax.kernels import Kernels

if TYPE_CHECKING:
    from cuttlefish_jax.plan.measured import Measured
    from cuttlefish_jax.profiling.kernel_profile import KernelProfile

_SHORTCUT_NAMES = ("shortcut", "downsample", "proj", "skip", "residual")


def default_reasons(kernels: Kernels) -> dict[str, str]:
    """``{path: reason}`` of the layers that Cuttlefish never factorizes unless a rule says so."""
    paths = list(kernels)
    reasons = {
        path: "shortcut"
        for path, kernel in kernels.items()
        if kernel.is_pointwise and any(name in path.rsplit("/", 1)[-1] for name in _SHORTCUT_NAMES)
    }
    if paths:
        reasons[paths[-1]] = "last layer"
        if not kernels.embedding_first:
            reasons[paths[0]] = "first layer"
    return reasons


def zero_kernel(measured: Measured) -> str | None:
    """That a kernel, or a copy of it in a stack, is all zeros."""
    zeros, copies = measured.zero_copies, math.prod(measured.kernel.stack_shape)
    if zeros == 0:
        return None
    return "its kernel is zero" + (f" in {zeros} of {copies} copies" if zeros < copies else "")


def slow_stack(profile: KernelProfile | None, path: str, min_speedup: float) -> str | None:
    """That a layer's stack was measured, and does not get fast enough.

    Raises:
      ValueError: if the profile lacks the layer.
    """
    if profile is None:
        return None
    try:
        stack = profile.stack_of(path)
    except KeyError as error:
        raise ValueError(f"the profile has no {path!r}: time that layer too, or give it a rule") from error
    if (speedup := profile[stack]) >= min_speedup:
        return None
    gets = f"stack {stack!r} gets only {_times(speedup)} faster at ratio {profile.ratio:g}"
    return f"{gets}, less than {min_speedup:g}x"


def slow_layer(profile: KernelProfile | None, path: str, rank: int, min_layer_speedup: float) -> str | None:
    """That a layer of a stack which gets faster would not do so itself, at its own rank."""
    if profile is None or (speedup := profile.predicted_speedup(path, rank)) > min_layer_speedup:
        return None
    return f"predicted {_times(speedup)} as fast at rank {rank}"


def _times(speedup: float) -> str:
    # Rounded down, lest what falls short of 1.5 reads as 1.50x.
    return f"{math.floor(100 * speedup + 1e-6) / 100:.2f}x"
