"""What was measured of one kernel, taken from the mappings that people pass, and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from cuttlefish_jax.kernels import Kernel

if TYPE_CHECKING:
    from jaxtyping import Float64

    from cuttlefish_jax.plan.rank_rules import RankRule


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """What is known of one kernel when its rank is chosen; ``None`` where it was not measured.

    Attributes:
      kernel: the kernel.
      stable_rank: its stable rank now, ``f64[*stack]``.
      initial_stable_rank: the same at the random initialisation.
      singular_values: its singular values now, descending, ``f64[*stack, min(m, n)]``.
    """

    kernel: Kernel
    stable_rank: Float64[np.ndarray, "*stack"] | None = None
    initial_stable_rank: Float64[np.ndarray, "*stack"] | None = None
    singular_values: Float64[np.ndarray, "*stack r"] | None = None

    @property
    def zero_copies(self) -> int:
        """How many copies of the kernel are known to be all zeros (of one, for a layer that is not stacked).

        Their factors would be next to zero, and stay so: the gradient of either is a product with the other.
        """
        if self.stable_rank is not None:
            return int(np.sum(self.stable_rank == 0))
        if self.singular_values is not None:
            return int(np.sum(self.singular_values[..., 0] == 0))
        return 0


def measure(
    kernel: Kernel,
    rule: RankRule | None,
    ranks_t: Mapping[str, Any] | None,
    ranks_0: Mapping[str, Any] | None,
    singular_values: Mapping[str, Any] | None,
) -> Measured:
    """What the mappings say of a kernel.

    Without a rule nothing is needed, but what there is has to be finite: a kernel with a NaN gets no rank.

    Raises:
      ValueError: where they lack what the rule needs, or a value is not what it should be.
    """

    def value(values: Mapping[str, Any] | None, what: str, needed: bool, *shapes: tuple[int, ...]) -> Any:
        if values is not None and kernel.path in values:
            return _checked(values[kernel.path], f"the {what} of {kernel.path!r}", shapes)
        if values is not None and needed:
            raise ValueError(f"there is no {what} for {kernel.path!r}")
        return None

    name, stack = type(rule).__name__, kernel.stack_shape
    ranks_needed = rule is not None and rule.needs_stable_ranks
    spectra_needed = rule is not None and rule.needs_singular_values
    if ranks_needed and ranks_t is None:
        raise ValueError(
            f"rank_rule {name} needs stable ranks: pass ranks_t=cf.stable_ranks(params, kernels)"
        )
    if spectra_needed and singular_values is None:
        raise ValueError(
            f"rank_rule {name} needs singular values: "
            "pass singular_values=cf.singular_values(params, kernels)"
        )
    now = value(ranks_t, "stable rank", ranks_needed, (), stack)
    initial = value(ranks_0, "stable rank", ranks_needed, (), stack)
    sigmas = value(singular_values, "spectrum", spectra_needed, (*stack, kernel.max_rank))
    return Measured(
        kernel=kernel,
        stable_rank=None if now is None else np.broadcast_to(now, stack),
        initial_stable_rank=None if initial is None else np.broadcast_to(initial, stack),
        singular_values=None if sigmas is None else np.sort(sigmas, axis=-1)[..., ::-1],
    )


def _checked(value: Any, what: str, shapes: tuple[tuple[int, ...], ...]) -> Float64[np.ndarray, ...]:
    array = np.asarray(value, np.float64)
    right = np.isfinite(array) & (array >= 0)
    if not np.all(right):
        raise ValueError(f"{what} is {array[~right][0]}, expected a finite number >= 0")
    if array.shape not in shapes:
        raise ValueError(f"{what} has shape {array.shape}, expected {shapes[-1]}")
    return array
