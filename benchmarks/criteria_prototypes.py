"""Criteria that benchmarks/criteria.py compares with those of the package."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

import cuttlefish_jax as cf
from cuttlefish_jax.criteria import trend
from cuttlefish_jax.plan.rank_rules import gaussian_scale

Series = Any  # (path, index in the stack)
History = np.ndarray  # f64[t]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanPlateau:
    """The plateau of the mean layer: stable, all at once, when slopes and margins are small on average.

    One restless layer does not hold up the others then, and a deep network waits no longer than a shallow
    one.

    Attributes:
      max_slope: largest relative change per epoch that counts as converged, in the mean over the layers.
      min_window: measurements that it takes at least.
    """

    max_slope: float = 0.02
    min_window: int = 5

    @property
    def delay(self) -> int:
        """0: the very next epoch is low-rank."""
        return 0

    def newly_stable(self, histories: Mapping[Series, History], stable: Collection[Series]) -> set[Series]:
        """See :class:`cuttlefish_jax.Criterion`."""
        length = min(len(history) for history in histories.values())
        for window in range(self.min_window, length + 1):
            found = [trend(history[-window:]) for history in histories.values()]
            slope = float(np.mean([abs(slope) for slope, _ in found]))
            margin = float(np.mean([margin for _, margin in found]))
            if margin <= self.max_slope / 2:
                return set(histories) - set(stable) if slope + margin <= self.max_slope else set()
        return set()


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCost:
    """What a layer costs at a stable rank.

    Attributes:
      path: of the layer.
      random: the stable rank of a large random matrix of its shape, at which the scaled rank is the full one.
      factorized: FLOPs of the factors at full rank, as a share of the layer's.
      flops: of one copy of the layer.
    """

    path: str
    random: float
    factorized: float
    flops: float

    @classmethod
    def of(cls, kernel: cf.Kernel) -> LayerCost:
        """That of a kernel."""
        copies = math.prod(kernel.stack_shape)
        return cls(
            path=kernel.path,
            random=kernel.max_rank / gaussian_scale(kernel.m, kernel.n),
            factorized=kernel.flops(kernel.max_rank) / kernel.flops(),
            flops=kernel.flops() / copies,
        )

    def share(self, history: History) -> History:
        """FLOPs at the scaled stable ranks of a history, as a share of the whole layer's."""
        return np.minimum(1.0, self.factorized * history / max(history[0], self.random))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MarginalBenefit:
    r"""Switches when another epoch at full rank costs more than the lower ranks that it would bring save.

    Let :math:`c_t` be the cost of an epoch after a switch at the ranks measured after :math:`t` of
    :math:`T` epochs, as a share of a full-rank one; of the layers that can be factorized, for the others
    cost the same either way. To wait for one epoch costs :math:`1 - c_t` of a full-rank epoch, and makes
    each of the :math:`T - t - 1` later ones cheaper by :math:`c_t - c_{t+1}`. The criterion fires at the
    first measurement with

    .. math:: |\dot c_t| \, (T - t - 1) \le 1 - c_t, \quad c_t < 1

    where :math:`\dot c_t` is the slope of a straight line fitted to the last quarter of the :math:`c`, of
    three or more: the one-step look-ahead rule of optimal stopping. Nothing has to be tuned: time is
    measured in lengths of the run, and ranks in what they cost. A longer run waits for flatter ranks. While
    the ranks rest at their initialisation, as under a warm-up of the learning rate, a switch would save
    nothing and there is none.

    The ranks are those of :class:`~cuttlefish_jax.ScaledStableRank`, the costs forward FLOPs. All layers are
    declared stable at once, for it is their sum that counts: a layer that goes on moving, but costs little,
    does not hold up the others.

    Attributes:
      epochs: :math:`T`, the length of the whole run.
      layers: the costs of all layers that are tracked; see :meth:`of`.
    """

    epochs: int
    layers: tuple[LayerCost, ...] = dataclasses.field(repr=False)

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs must be 1 or more, got {self.epochs}")

    @classmethod
    def of(cls, kernels: cf.Kernels, *, epochs: int) -> MarginalBenefit:
        """The criterion for a network.

        Args:
          kernels: of the network, whether tracked or not.
          epochs: the length of the whole run, in measurements.
        """
        return cls(epochs=epochs, layers=tuple(LayerCost.of(kernel) for kernel in kernels.values()))

    @property
    def delay(self) -> int:
        """0: the very next epoch is low-rank."""
        return 0

    def newly_stable(self, histories: Mapping[Series, History], stable: Collection[Series]) -> set[Series]:
        """See :class:`cuttlefish_jax.Criterion`; a series is ``(path, index in the stack)``."""
        cost = self.cost(histories)
        measured = len(cost) - 1
        if measured < 2 or cost[-1] >= 1:
            return set()
        window = max(3, len(cost) // 4)
        slope = np.polyfit(np.arange(window), cost[-window:], 1)[0]
        pays = abs(slope) * (self.epochs - measured - 1) <= 1 - cost[-1]
        return {name for name in histories if name not in stable} if pays else set()

    def cost(self, histories: Mapping[Series, History]) -> History:
        """Cost of low-rank epochs at each measurement's ranks, as a share of that of full-rank ones."""
        layers = {layer.path: layer for layer in self.layers}
        tracked = [(layers[series[0]], history) for series, history in histories.items()]
        total = sum(layer.flops * layer.share(history) for layer, history in tracked)
        return np.asarray(total / sum(layer.flops for layer, _ in tracked))
