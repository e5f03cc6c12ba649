"""Criteria for "the stable ranks have converged": when a layer's history counts as settled.

A criterion looks at the *series* of all layers, one float per measurement each, and says which of them have
newly become stable. It keeps no state: :class:`~cuttlefish_jax.RankTracker` does. Measurement ``i`` is made
after ``i`` epochs of training; measurement 0 is the initialisation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Hashable, Mapping
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float64

Series = TypeVar("Series", bound=Hashable)


@runtime_checkable
class Criterion(Protocol):
    """When a layer's stable rank has converged. To write one's own: a frozen dataclass with these two."""

    @property
    def delay(self) -> int:
        """Epochs trained full-rank between the last layer's verdict and the switch."""
        ...

    def newly_stable(
        self, histories: Mapping[Series, Float64[np.ndarray, " t"]], stable: Collection[Series]
    ) -> set[Series]:
        """The series that are to be declared stable now.

        Args:
          histories: name -> stable ranks measured so far, the initialisation first; all of length ``t >= 1``.
          stable: the names declared stable by earlier calls; they stay so.

        Returns:
          The names, none of them in ``stable``, of the series that have converged with this measurement.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelativePlateau:
    r"""Stable when the rank changes by less than 2 % per epoch, with 95 % confidence. Nothing to tune.

    A straight line is fitted to :math:`\log \rho` over the last ``w`` measurements. Its slope :math:`b` is
    the relative change per epoch, and the scatter around the line gives the slope's standard error :math:`s`.
    A layer is stable when

    .. math:: |b| + t_{w-2} \, s \le \text{max\_slope}

    with Student's :math:`t` at 97.5 %. The window is the shortest, from ``min_window`` on, that determines
    the slope to half of ``max_slope`` (:math:`t_{w-2} \, s \le \text{max\_slope} / 2`); if there is none,
    there is no verdict. A smooth history is therefore judged by its last five measurements, whatever came
    before, a noisy one by as many as it takes to tell a trend from noise.

    What it guarantees when it fires: each layer has had a window of at least ``min_window`` measurements in
    which its stable rank drifted by less than ``max_slope`` per epoch, with 95 % confidence if the scatter
    around the trend is independent from epoch to epoch. Only ratios count: scaling a history changes nothing.
    In the recorded runs of ``tests/data/trajectories`` it fires at epoch 11 to 17 of 30 (ResNets and a VGG on
    digits and Fashion-MNIST, cosine and step schedules) and at 26 and 27 of 40 (a DeiT and a ResMLP), every
    layer's rank within 8 % of its last one.
    It cannot look ahead: a layer that rests under a long learning-rate warm-up counts as stable then, and a
    later change of the learning rate may set it moving again.

    Attributes:
      max_slope: largest relative change per epoch that counts as converged.
      min_window: shortest window, in measurements; at least 4.

    Example:
      >>> import numpy as np
      >>> from cuttlefish_jax.criteria import RelativePlateau
      >>> falling, flat = 100 * 0.95 ** np.arange(9), 60 + np.cos(np.arange(9.0))
      >>> sorted(RelativePlateau().newly_stable({"falling": falling, "flat": flat}, stable=()))
      ['flat']
    """

    max_slope: float = 0.02
    min_window: int = 5

    def __post_init__(self) -> None:
        if not self.max_slope > 0:
            raise ValueError(f"max_slope must be positive, got {self.max_slope}")
        if self.min_window < 4:
            raise ValueError(f"min_window must be at least 4, got {self.min_window}")

    @property
    def delay(self) -> int:
        """0: the very next epoch is low-rank."""
        return 0

    def newly_stable(
        self, histories: Mapping[Series, Float64[np.ndarray, " t"]], stable: Collection[Series]
    ) -> set[Series]:
        """See :meth:`Criterion.newly_stable`."""
        return {name for name, x in histories.items() if name not in stable and self._is_flat(x)}

    def _is_flat(self, history: Float64[np.ndarray, " t"]) -> bool:
        for window in range(self.min_window, len(history) + 1):
            last = history[-window:]
            if not np.all(last > 0):  # a matrix of zeros: there is no relative change to speak of
                return not np.any(last)
            slope, margin = trend(last)
            if margin <= self.max_slope / 2:
                return abs(slope) + margin <= self.max_slope
        return False


def trend(history: Float64[np.ndarray, " t"]) -> tuple[float, float]:
    """Relative change per measurement, and the half-width of its 95 % confidence interval.

    Args:
      history: three or more positive numbers.

    Returns:
      Slope of the least-squares line through ``log(history)``, and 97.5 % Student quantile times its standard
      error as estimated from the residuals.
    """
    y = np.log(history)
    x = np.arange(len(y)) - (len(y) - 1) / 2
    slope = np.dot(x, y) / np.dot(x, x)
    residuals = y - y.mean() - slope * x
    freedom = len(y) - 2
    error = math.sqrt(np.dot(residuals, residuals) / freedom / np.dot(x, x))
    return float(slope), _student_quantile(freedom) * error


def _student_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t by Cornish-Fisher: 3 % low at 2 degrees of freedom, 1 % at 3."""
    z = 1.959964
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferencePlateau:
    r"""The detector of the paper's published implementation, for reproducing its runs; see the presets.

    On integer stable ranks :math:`x`, truncated here, with :math:`a = 2 / (N + 1)`:

    .. math:: e_0 = x_0, \quad e_i = a x_i + (1 - a) e_{i-1}

    A layer is stable when the mean of :math:`|\nabla e|` (``np.gradient``) over the last :math:`L`
    measurements is at most the threshold. The threshold is in ranks per epoch, so it depends on the network's
    width; it is multiplied by a factor when few layers are left that are not stable (counted once for each
    measurement).

    Attributes:
      window: :math:`N`, the time constant of the moving average; there is no verdict before epoch ``N``.
      last: :math:`L`, how many gradients are averaged.
      threshold: in units of rank per epoch.
      relaxations: ``(left, factor)``, ascending: with at most ``left`` layers left, the threshold is
        multiplied by ``factor``; the first pair that fits counts.
      delay: 1 if ranks are measured before each epoch (the epoch of the verdict is still trained full-rank),
        0 if after it. Either way the epoch after the one of the verdict is the first low-rank one.

    References:
      Wang et al., `Cuttlefish: Low-Rank Model Training without All the Tuning
      <https://arxiv.org/abs/2305.02538>`_, MLSys 2023.
    """

    window: int
    last: int
    threshold: float
    relaxations: tuple[tuple[int, float], ...] = ()
    delay: int = 0

    @classmethod
    def cifar(cls) -> ReferencePlateau:
        """ResNet-18 and VGG-19 on CIFAR and SVHN: verdicts from measurement 15 on, made before each epoch."""
        return cls(window=15, last=11, threshold=0.1, relaxations=((1, 5.0), (2, 2.5)), delay=1)

    @classmethod
    def resnet50(cls) -> ReferencePlateau:
        """ResNet-50 and WideResNet-50 on ImageNet: verdicts from measurement 6 on, made after epoch 5."""
        return cls(window=5, last=5, threshold=0.33, relaxations=((3, 5.0), (6, 2.5)))

    @classmethod
    def deit(cls) -> ReferencePlateau:
        """DeiT and ResMLP on ImageNet: verdicts from measurement 6 on, made after epoch 5."""
        return cls(window=5, last=5, threshold=0.411, relaxations=((4, 5.0), (9, 2.5)))

    def statistic(self, history: Float64[np.ndarray, " t"]) -> float:
        """Mean absolute gradient of the moving average, in ranks per epoch; ``t >= 2``.

        Example:
          >>> from cuttlefish_jax.criteria import ReferencePlateau
          >>> round(ReferencePlateau.resnet50().statistic([178, 160, 150, 141, 135, 131, 128]), 6)
          6.532099
        """
        weight = 2 / (self.window + 1)
        ranks = np.trunc(np.asarray(history, np.float64))
        averages = [ranks[0]]
        for rank in ranks[1:]:
            averages.append(weight * rank + (1 - weight) * averages[-1])
        return float(np.mean(np.abs(np.gradient(averages))[-self.last :]))

    def newly_stable(
        self, histories: Mapping[Series, Float64[np.ndarray, " t"]], stable: Collection[Series]
    ) -> set[Series]:
        """See :meth:`Criterion.newly_stable`."""
        pending = {name: x for name, x in histories.items() if name not in stable}
        factor = next((f for left, f in self.relaxations if len(pending) <= left), 1.0)
        # Before epoch i (delay 1) or after epoch i - 1 (delay 0), i being the index of the measurement.
        return {
            name
            for name, x in pending.items()
            if len(x) - 2 + self.delay >= self.window and self.statistic(x) <= factor * self.threshold
        }


@dataclasses.dataclass(frozen=True)
class AtEpoch:
    """All layers count as converged after ``epoch`` epochs: a switch at a given epoch.

    With ``AtEpoch(0)`` the network is factorized at its initialisation.
    """

    epoch: int

    def __post_init__(self) -> None:
        if self.epoch < 0:
            raise ValueError(f"epoch must not be negative, got {self.epoch}")

    @property
    def delay(self) -> int:
        """0: ``epoch`` is the first low-rank epoch."""
        return 0

    def newly_stable(
        self, histories: Mapping[Series, Float64[np.ndarray, " t"]], stable: Collection[Series]
    ) -> set[Series]:
        """See :meth:`Criterion.newly_stable`."""
        return {name for name, x in histories.items() if name not in stable and len(x) > self.epoch}


@dataclasses.dataclass(frozen=True)
class Never:
    """No layer ever counts as converged: full-rank training to the end."""

    @property
    def delay(self) -> int:
        """Of no consequence."""
        return 0

    def newly_stable(
        self, histories: Mapping[Series, Float64[np.ndarray, " t"]], stable: Collection[Series]
    ) -> set[Series]:
        """See :meth:`Criterion.newly_stable`."""
        return set()
