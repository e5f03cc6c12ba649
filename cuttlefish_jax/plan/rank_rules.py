"""Rank rules: the rank that a layer's factors get, from what was measured of its kernel.

A rule looks at one kernel at a time. What holds for all of them is the plan's: bounds, rounding, floors, and
which layers are worth it (:func:`cuttlefish_jax.make_plan`).
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from cuttlefish_jax.plan.measured import Measured

if TYPE_CHECKING:
    from jaxtyping import Float64

# A product that is a whole number up to the rounding of float32 is that number: 1.0 x R is R.
_ROUNDING = 1e-6
# As in :func:`cuttlefish_jax.accumulative_ranks`: an exact tie of two sums counts as reached.
_TIE = 1e-5


class RankRule(abc.ABC):
    """How a rank is chosen. To write one's own: a frozen dataclass that derives from this."""

    @property
    def needs_stable_ranks(self) -> bool:
        """Whether the rule looks at stable ranks; then ``make_plan`` insists on them."""
        return False

    @property
    def needs_singular_values(self) -> bool:
        """Whether the rule looks at singular values; then ``make_plan`` insists on them."""
        return False

    @abc.abstractmethod
    def rank(self, measured: Measured) -> int:
        """The rank that the kernel should have; of a stack, the largest over its copies.

        It may be out of bounds: ``make_plan`` clamps it to ``[1, min(m, n)]``.
        """


@dataclasses.dataclass(frozen=True)
class ScaledStableRank(RankRule):
    r"""Cuttlefish's rule: the stable rank, in units of the initialisation's.

    .. math:: r = \lceil \xi \, sr(W_t) \rceil, \quad \xi = \min(m, n) / sr(W_0)

    A matrix whose stable rank is still that of its random initialisation :math:`W_0` has full rank. Where
    :math:`sr(W_0)` is not known, or zero (a kernel initialised to zeros), :math:`\xi` is that of a Gaussian
    matrix of the same shape, :func:`gaussian_scale`.

    Example:
      >>> import numpy as np
      >>> from cuttlefish_jax.kernels import Kernel
      >>> kernel = Kernel(path="fc", layer="Dense", shape=(512, 512), reduction_axes=(0,), output_axes=(1,))
      >>> ScaledStableRank().rank(Measured(
      ...     kernel=kernel, stable_rank=np.array(57.0), initial_stable_rank=np.array(286.0)))
      103

    References:
      Wang et al., `Cuttlefish: Low-Rank Model Training without All the Tuning
      <https://arxiv.org/abs/2305.02538>`_, MLSys 2023: scaled stable rank.
    """

    @property
    def needs_stable_ranks(self) -> bool:
        """Yes."""
        return True

    def rank(self, measured: Measured) -> int:
        """See :meth:`RankRule.rank`."""
        now, initial, kernel = _stable_rank_of(measured), measured.initial_stable_rank, measured.kernel
        scale = np.full(now.shape, gaussian_scale(kernel.m, kernel.n))
        if initial is not None:
            scale = np.divide(kernel.max_rank, initial, out=scale, where=initial > 0)
        return round_up(float(np.max(scale * now)))


@dataclasses.dataclass(frozen=True)
class StableRank(RankRule):
    r"""The stable rank as it is, rounded up: :math:`r = \lceil sr(W_t) \rceil`.

    Example:
      >>> import numpy as np
      >>> from cuttlefish_jax.kernels import Kernel
      >>> kernel = Kernel(path="fc", layer="Dense", shape=(512, 512), reduction_axes=(0,), output_axes=(1,))
      >>> StableRank().rank(Measured(kernel=kernel, stable_rank=np.array(56.3)))
      57

    References:
      Rudelson and Vershynin, `Sampling from large matrices <https://arxiv.org/abs/math/0503442>`_, J. ACM
      2007 (there: numerical rank); as a rank rule, what Cuttlefish (Wang et al., MLSys 2023) improves on.
    """

    @property
    def needs_stable_ranks(self) -> bool:
        """Yes."""
        return True

    def rank(self, measured: Measured) -> int:
        """See :meth:`RankRule.rank`."""
        return round_up(float(np.max(_stable_rank_of(measured))))


@dataclasses.dataclass(frozen=True)
class AccumulativeRank(RankRule):
    r"""The leading singular values that hold a share of the sum of all.

    .. math:: r = \min \{k \ge 1 : \sum_{i \le k} \sigma_i \ge p \sum_i \sigma_i\}

    what :func:`cuttlefish_jax.accumulative_ranks` computes on the device.

    Attributes:
      p: the share to hold, ``0 < p <= 1``.

    Example:
      >>> import numpy as np
      >>> from cuttlefish_jax.kernels import Kernel
      >>> kernel = Kernel(path="fc", layer="Dense", shape=(3, 3), reduction_axes=(0,), output_axes=(1,))
      >>> AccumulativeRank(p=0.8).rank(Measured(kernel=kernel, singular_values=np.array([6.0, 3.0, 1.0])))
      2

    References:
      Wang et al., `Cuttlefish: Low-Rank Model Training without All the Tuning
      <https://arxiv.org/abs/2305.02538>`_, MLSys 2023: accumulative rank, for transformers.
    """

    p: float = 0.8

    def __post_init__(self) -> None:
        _check_share("AccumulativeRank", "p", self.p)

    @property
    def needs_singular_values(self) -> bool:
        """Yes."""
        return True

    def rank(self, measured: Measured) -> int:
        """See :meth:`RankRule.rank`."""
        return _leading(_singular_values_of(measured), self.p)


@dataclasses.dataclass(frozen=True)
class EnergyRank(RankRule):
    r"""The leading singular values that hold a share of the squared Frobenius norm, the energy.

    .. math:: r = \min \{k \ge 1 : \sum_{i \le k} \sigma_i^2 \ge p \sum_i \sigma_i^2\}

    Equivalently, the best approximation of rank ``r`` has a relative error of at most
    :math:`\sqrt{1 - p}` in the Frobenius norm.

    Attributes:
      p: the share to hold, ``0 < p <= 1``.

    Example:
      >>> import numpy as np
      >>> from cuttlefish_jax.kernels import Kernel
      >>> kernel = Kernel(path="fc", layer="Dense", shape=(3, 3), reduction_axes=(0,), output_axes=(1,))
      >>> EnergyRank(p=0.75).rank(Measured(kernel=kernel, singular_values=np.array([6.0, 3.0, 1.0])))
      1

    References:
      Zhang et al., `Accelerating Very Deep Convolutional Networks for Classification and Detection
      <https://arxiv.org/abs/1505.06798>`_, TPAMI 2016: rank selection by accumulated energy.
    """

    p: float = 0.9

    def __post_init__(self) -> None:
        _check_share("EnergyRank", "p", self.p)

    @property
    def needs_singular_values(self) -> bool:
        """Yes."""
        return True

    def rank(self, measured: Measured) -> int:
        """See :meth:`RankRule.rank`."""
        sigmas = _singular_values_of(measured)
        # Scaled first, so that no square overflows or vanishes.
        largest = np.max(sigmas)
        return _leading((sigmas / (largest if largest > 0 else 1)) ** 2, self.p)


@dataclasses.dataclass(frozen=True)
class EffectiveRank(RankRule):
    r"""The exponential of the entropy of the singular values, taken for probabilities, rounded up.

    .. math:: r = \lceil \exp(-\sum_i p_i \ln p_i) \rceil, \quad p_i = \sigma_i / \sum_j \sigma_j

    Of ``k`` equal singular values and zeros it is ``k``.

    Example:
      >>> import numpy as np
      >>> from cuttlefish_jax.kernels import Kernel
      >>> kernel = Kernel(path="fc", layer="Dense", shape=(3, 3), reduction_axes=(0,), output_axes=(1,))
      >>> EffectiveRank().rank(Measured(kernel=kernel, singular_values=np.array([6.0, 1.0, 1.0])))
      3
      >>> EffectiveRank().rank(Measured(kernel=kernel, singular_values=np.array([6.0, 1.0, 0.0])))
      2

    References:
      Roy and Vetterli, `The effective rank: A measure of effective dimensionality
      <https://www.eurasip.org/Proceedings/Eusipco/Eusipco2007/Papers/a5p-h05.pdf>`_, EUSIPCO 2007.
    """

    @property
    def needs_singular_values(self) -> bool:
        """Yes."""
        return True

    def rank(self, measured: Measured) -> int:
        """See :meth:`RankRule.rank`."""
        sigmas = _singular_values_of(measured)
        # Scaled first, so that no sum overflows; the share of a zero is a zero, whatever the others are.
        largest = np.max(sigmas, axis=-1, keepdims=True)
        shares = sigmas / np.where(largest > 0, largest, 1)
        shares = shares / np.maximum(np.sum(shares, axis=-1, keepdims=True), 1)
        entropy = -np.sum(shares * np.log(np.where(shares > 0, shares, 1)), axis=-1)
        return round_up(float(np.max(np.exp(entropy))))


@dataclasses.dataclass(frozen=True)
class RankRatio(RankRule):
    r"""A fixed share of the full rank, rounded down: :math:`r = \lfloor \min(m, n) \cdot ratio \rfloor`.

    Nothing has to be measured. It is at least 1.

    Attributes:
      ratio: the share, ``0 < ratio <= 1``.

    Example:
      >>> from cuttlefish_jax.kernels import Kernel
      >>> kernel = Kernel(path="fc", layer="Dense", shape=(512, 1000), reduction_axes=(0,), output_axes=(1,))
      >>> RankRatio(0.25).rank(Measured(kernel=kernel))
      128

    References:
      Wang et al., `Pufferfish: Communication-efficient Models At No Extra Cost
      <https://arxiv.org/abs/2103.03936>`_, MLSys 2021: a quarter, for all layers.
      Khodak et al., `Initialization and Regularization of Factorized Neural Layers
      <https://arxiv.org/abs/2105.01029>`_, ICLR 2021: the rank scale.
    """

    ratio: float = 0.25

    def __post_init__(self) -> None:
        _check_share("RankRatio", "ratio", self.ratio)

    def rank(self, measured: Measured) -> int:
        """See :meth:`RankRule.rank`."""
        return max(1, math.floor(measured.kernel.max_rank * self.ratio * (1 + _ROUNDING)))


@dataclasses.dataclass(frozen=True)
class LargestOf(RankRule):
    """The largest rank that any of several rules gives.

    Cuttlefish takes ``LargestOf((ScaledStableRank(), AccumulativeRank()))`` for transformers, whose spectra
    have a few large singular values and a long tail: the stable rank alone sees only the former.

    Attributes:
      rules: the rules, at least one.

    Example:
      >>> import numpy as np
      >>> from cuttlefish_jax.kernels import Kernel
      >>> kernel = Kernel(path="fc", layer="Dense", shape=(3, 3), reduction_axes=(0,), output_axes=(1,))
      >>> measured = Measured(kernel=kernel, singular_values=np.array([6.0, 3.0, 1.0]))
      >>> LargestOf((RankRatio(0.34), AccumulativeRank(0.8))).rank(measured)
      2

    References:
      Wang et al., `Cuttlefish: Low-Rank Model Training without All the Tuning
      <https://arxiv.org/abs/2305.02538>`_, MLSys 2023.
    """

    rules: tuple[RankRule, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))  # a list would not be hashable
        if not self.rules:
            raise ValueError("LargestOf needs at least one rank rule")
        for rule in self.rules:
            check_rank_rule(rule)

    @property
    def needs_stable_ranks(self) -> bool:
        """Whether one of the rules does."""
        return any(rule.needs_stable_ranks for rule in self.rules)

    @property
    def needs_singular_values(self) -> bool:
        """Whether one of the rules does."""
        return any(rule.needs_singular_values for rule in self.rules)

    def rank(self, measured: Measured) -> int:
        """See :meth:`RankRule.rank`."""
        return max(rule.rank(measured) for rule in self.rules)


def gaussian_scale(m: int, n: int) -> float:
    r"""The scale :math:`\xi = \min(m, n) / sr(W_0)` of an ``m x n`` Gaussian matrix.

    :math:`(1 + \sqrt{\min(m, n) / \max(m, n)})^2` in the limit of large matrices (Marchenko-Pastur).

    Example:
      >>> gaussian_scale(64, 64)
      4.0
    """
    return (1 + math.sqrt(min(m, n) / max(m, n))) ** 2


def check_rank_rule(rule: Any) -> None:
    """Raises a ValueError if ``rule`` is no rank rule; a class in place of its instance, for one."""
    if not isinstance(rule, RankRule):
        raise ValueError(
            f"{rule!r} is not a rank rule: give one such as ScaledStableRank() or RankRatio(0.25)"
        )


def round_up(x: float) -> int:
    """The least integer that is not below ``x``, but for rounding."""
    return math.ceil(x * (1 - _ROUNDING))


def _leading(parts: Float64[np.ndarray, "*stack r"], p: float) -> int:
    """How many of the parts hold the share ``p`` of their sum; the largest over the stack."""
    sums = np.cumsum(parts, axis=-1)
    below = sums < p * sums[..., -1:] * (1 - _TIE)
    return 1 + int(np.max(np.sum(below, axis=-1)))


def _stable_rank_of(measured: Measured) -> Float64[np.ndarray, "*stack"]:
    if measured.stable_rank is None:
        raise ValueError(f"there is no stable rank for {measured.kernel.path!r}")
    return measured.stable_rank


def _singular_values_of(measured: Measured) -> Float64[np.ndarray, "*stack r"]:
    if measured.singular_values is None:
        raise ValueError(f"there is no spectrum for {measured.kernel.path!r}")
    return measured.singular_values


def _check_share(rule: str, name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{rule}: {name} {value} is not in (0, 1]")


# By the names that configurations and the command have for them; of settings that have a ``rank_ratio``.
RANK_RULES: Mapping[str, Callable[[Any], RankRule]] = {
    "scaled_stable_rank": lambda settings: ScaledStableRank(),
    "vanilla_stable_rank": lambda settings: StableRank(),
    "accumulative_rank": lambda settings: AccumulativeRank(),
    "energy": lambda settings: EnergyRank(),
    "effective_rank": lambda settings: EffectiveRank(),
    "rank_ratio": lambda settings: RankRatio(settings.rank_ratio),
}
