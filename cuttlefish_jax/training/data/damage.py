"""Examples that cannot be read: counted and named, and an error once they are too many."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from cuttlefish_jax.errors import UserError

DAMAGED = "damaged"  # the key under which a source reports them

_log = logging.getLogger(__name__)


class DataError(UserError):
    """Examples that are damaged, or that have impossible labels."""


def check_labels(labels: np.ndarray, largest: float, name_of: Callable[[int], str]) -> None:
    """Refuses labels that are none: a compiled loss would take them without a word.

    Args:
      labels: of some examples.
      largest: they are from 0 to this.
      name_of: says what the example at a place of ``labels`` is to the user.

    Raises:
      DataError: names the first bad one.
    """
    for place in np.flatnonzero(~((labels >= 0) & (labels <= largest)))[:1]:
        raise DataError(
            f"{name_of(int(place))} has label {labels[place]}, expected 0 to {largest:g}: "
            "prepare the data set again"
        )


class DamageLog:
    """Keeps count of the damaged examples of a source, from what its ``read`` reports.

    A source puts another example in the place of a damaged one, and says so in an array ``"damaged"``
    ``int32[...]``: the index of the example that was asked for, or -1. It can be read in other threads and
    processes; this object stands where the batches come together.

    Attributes:
      indices: of the damaged examples met so far.

    Example:
      >>> log = DamageLog(str, num_examples=1000)
      >>> sorted(log.take({"label": np.zeros(3, np.int32), "damaged": np.array([-1, -1, -1])}))
      ['label']
      >>> log.indices
      set()
    """

    def __init__(
        self,
        name_of: Callable[[int], str],
        num_examples: int,
        *,
        max_share: float = 0.001,
        least: int = 10,
    ) -> None:
        """Starts with none.

        Args:
          name_of: says what an index is to the user, e.g. its file.
          num_examples: of the source.
          max_share: more than this share of damaged examples is an error;
          least: but not so long as they are no more than this.
        """
        self.indices: set[int] = set()
        self._name_of = name_of
        self._num_examples = num_examples
        self._allowed = max(least, int(max_share * num_examples))

    def take(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch without its report of damage, which is remembered.

        Each damaged example is logged as a warning when it is first met.

        Raises:
          DataError: if they are too many by now.
        """
        if DAMAGED not in batch:
            return batch
        for index in np.unique(batch[DAMAGED]).tolist():
            if index < 0 or index in self.indices:
                continue
            self.indices.add(index)
            name = self._name_of(index)
            _log.warning(
                "%s cannot be decoded, and is left out (%d so far of %d)",
                name,
                len(self.indices),
                self._num_examples,
            )
            if len(self.indices) > self._allowed:
                raise DataError(
                    f"{len(self.indices)} of {self._num_examples} examples cannot be decoded, the last of "
                    f"them {name}; at most {self._allowed} are put up with: prepare the data set again"
                )
        return {name: array for name, array in batch.items() if name != DAMAGED}


def damage_taker(source: Any) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """:meth:`DamageLog.take` of a log for a source whose examples can be damaged, those that have names."""
    name_of = getattr(source, "name_of", None)
    return DamageLog(name_of, len(source)).take if name_of else lambda batch: batch
