"""The history of the stable ranks during training, and the epoch at which to go low-rank.

Host code on Python floats: no JAX in here. What counts as converged is a criterion's business
(:mod:`cuttlefish_jax.criteria`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from cuttlefish_jax.criteria import Criterion, RelativePlateau

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


class RankTracker:
    """Collects the stable ranks measured during training and says when all of them have converged.

    Measurement ``i`` is made after ``i`` epochs of training, so the first is the initialisation. The layers
    of a stack (``nn.scan``, ``nn.vmap``, or nested), whose stable ranks come as one array, are judged one by
    one; the stack is stable when its last layer is. A layer that was once declared stable stays so.

    Attributes:
      criterion: when a layer counts as stable.
      history: ``path -> [stable rank, ...]``, one entry for each measurement: a float, or lists of floats
        for stacked layers, nested as the stacks are.
      converged_at: ``path -> i``, the measurement at which the layer was declared stable.

    Example:
      >>> from cuttlefish_jax.criteria import RelativePlateau
      >>> from cuttlefish_jax.tracker import RankTracker
      >>> tracker = RankTracker(criterion=RelativePlateau())
      >>> for rank in (288.0, 30.0, 30.2, 29.9, 30.1, 30.0):
      ...     converged = tracker.update({"stage2/conv1": rank})
      >>> converged, tracker.converged_at, tracker.switch_epoch
      (True, {'stage2/conv1': 5}, 5)

    References:
      Wang et al., `Cuttlefish: Low-Rank Model Training without All the Tuning
      <https://arxiv.org/abs/2305.02538>`_, MLSys 2023.
    """

    def __init__(self, criterion: Criterion | None = None) -> None:
        """Starts with an empty history.

        Args:
          criterion: when a layer counts as stable; ``RelativePlateau()`` if not given.

        Raises:
          ValueError: for a class of criteria.
        """
        if isinstance(criterion, type):
            raise ValueError(f"the criterion is a class, {criterion.__name__}: give {criterion.__name__}()")
        self.criterion = RelativePlateau() if criterion is None else criterion
        self.history: dict[str, list[Any]] = {}
        self.converged_at: dict[str, int] = {}
        # The layers of a stack are series of their own, (path, index in the stack).
        self._stable: dict[tuple[str, int], int] = {}

    def update(self, stable_ranks: Mapping[str, ArrayLike]) -> bool:
        """Adds one measurement.

        Args:
          stable_ranks: ``path -> stable rank``, floats or 0-d arrays, arrays ``[*stack]`` for stacked
            layers; the same paths and shapes in every call.

        Returns:
          Whether all layers have converged: :attr:`converged`.

        Raises:
          ValueError: if a stable rank is not a finite number >= 0, or the layers differ from those of the
            first call. The tracker is then unchanged.
        """
        self._append({path: np.asarray(value, np.float64) for path, value in stable_ranks.items()})
        index = self.num_measurements - 1
        for series in self.criterion.newly_stable(self._series(), self._stable.keys()):
            self._stable.setdefault(series, index)
        for path, measured in self.history.items():
            if path not in self.converged_at and all(
                (path, layer) in self._stable for layer in range(np.size(measured[0]))
            ):
                self.converged_at[path] = index
        return self.converged

    @property
    def num_measurements(self) -> int:
        """How many times :meth:`update` was called."""
        return len(next(iter(self.history.values()), []))

    @property
    def converged(self) -> bool:
        """Whether every layer has been declared stable; ``False`` before the first measurement."""
        return bool(self.history) and len(self.converged_at) == len(self.history)

    @property
    def switch_epoch(self) -> int | None:
        """First epoch, counted from 0, to be trained low-rank; ``None`` until all layers have converged."""
        return max(self.converged_at.values()) + self.criterion.delay if self.converged else None

    def converges_within(self, measurements: int) -> bool:
        """Whether all layers converge within so many more measurements if the ranks stay as they are.

        For what has to be made ready before the switch. It depends on the history alone, so a tracker made by
        :meth:`from_state` says the same. It is a forecast and not a promise: noise can bring a verdict
        earlier, or later.

        Args:
          measurements: 0 or more; with 0 it is :attr:`converged`.

        Raises:
          ValueError: if ``measurements`` is negative.

        Example:
          >>> from cuttlefish_jax.criteria import AtEpoch
          >>> from cuttlefish_jax.tracker import RankTracker
          >>> tracker = RankTracker(criterion=AtEpoch(7))
          >>> for epochs_trained in range(6):
          ...     converged = tracker.update({"stage2/conv1": 30.0})
          >>> tracker.converges_within(1), tracker.converges_within(2)
          (False, True)
        """
        if measurements < 0:
            raise ValueError(f"the number of measurements must not be negative, got {measurements}")
        if not self.history or self.converged:
            return self.converged
        ahead = self.from_state(self.criterion, self.to_state())
        last = {path: measured[-1] for path, measured in self.history.items()}
        return any(ahead.update(last) for _ in range(measurements))

    def to_state(self) -> dict[str, Any]:
        """Everything :meth:`from_state` needs, in JSON types (the criterion by its name and fields)."""
        return {
            "criterion": _describe(self.criterion),
            "history": {path: list(measured) for path, measured in self.history.items()},
            "stable": [[path, layer, index] for (path, layer), index in self._stable.items()],
            "converged_at": dict(self.converged_at),
        }

    @classmethod
    def from_state(cls, criterion: Criterion, state: Mapping[str, Any]) -> RankTracker:
        """The tracker that :meth:`to_state` described; it goes on as if never interrupted.

        Args:
          criterion: equal to the criterion of the tracker that was saved.
          state: what :meth:`to_state` returned, also after a round trip through JSON.

        Raises:
          ValueError: if the state was saved with another criterion.
        """
        if state["criterion"] != _describe(criterion):
            raise ValueError(
                f"the saved tracker used {state['criterion']}, not {_describe(criterion)}: "
                "resume with the same criterion, or start a new tracker"
            )
        tracker = cls(criterion)
        tracker.history = {path: list(measured) for path, measured in state["history"].items()}
        tracker.converged_at = dict(state["converged_at"])
        tracker._stable = {(path, layer): index for path, layer, index in state["stable"]}
        return tracker

    def _append(self, ranks: Mapping[str, np.ndarray]) -> None:
        if not ranks:
            raise ValueError("no stable ranks: there is no layer to track")
        if self.history and ranks.keys() != self.history.keys():
            path = min(ranks.keys() ^ self.history.keys())
            verb = "is new" if path in ranks else "is missing"
            raise ValueError(f"the layers differ from those of the first measurement: {path!r} {verb}")
        for path, value in ranks.items():
            if not np.all(np.isfinite(value) & (value >= 0)):
                raise ValueError(f"the stable rank of {path!r} is {value.tolist()}: has training diverged?")
            if self.history and np.shape(self.history[path][0]) != value.shape:
                raise ValueError(
                    f"the stable ranks of {path!r} have shape {value.shape}, "
                    f"but {np.shape(self.history[path][0])} at the first measurement"
                )
        for path, value in ranks.items():
            self.history.setdefault(path, []).append(value.tolist())

    def _series(self) -> dict[tuple[str, int], np.ndarray]:
        columns = {p: np.asarray(x, np.float64).reshape(len(x), -1) for p, x in self.history.items()}
        return {(p, layer): x[:, layer] for p, x in columns.items() for layer in range(x.shape[1])}


def _describe(criterion: Criterion) -> str:
    """A criterion's class and fields, as text that is equal for equal criteria."""
    if not dataclasses.is_dataclass(criterion):
        raise TypeError(f"a criterion must be a dataclass, got {type(criterion).__name__}")
    return repr(criterion)
