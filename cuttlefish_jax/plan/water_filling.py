r"""Water-filling: how much each layer keeps of its energy when all of them share one budget.

Every layer :math:`l` has a few options, of cost :math:`c_l(o)` and energy :math:`e_l(o)`; one is chosen for
each, so that :math:`\sum_l e_l` is as large as :math:`\sum_l c_l \le B` allows. Relaxed by a multiplier
:math:`\lambda`, the water level, the layers come apart: each takes the option with the largest
:math:`e_l(o) - \lambda c_l(o)`. Where the options are the ranks of a factorization, whose energies are
sums of squared singular values, that is a threshold: a rank is raised as long as the next singular value's
square is worth more than :math:`\lambda` times what one more rank costs.

The level is found by bisection; no other choice of the same cost keeps more energy. What the budget has left
then, less than the next step costs, goes to the steps that still fit, the best energy per cost first. So the
energy falls short of the best possible by less than the first step that no longer fitted would have added,
and it never falls when the budget grows.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float64

_BISECTIONS = 60


def water_fill(
    costs: Sequence[Float64[np.ndarray, " options"]],
    energies: Sequence[Float64[np.ndarray, " options"]],
    budget: float,
) -> list[int]:
    """The option that each layer takes: as much energy as the budget can buy.

    Args:
      costs: of every layer's options.
      energies: of the same.
      budget: the sum of costs that is allowed. One below the cheapest choice's gives the cheapest choice.

    Returns:
      An index into the options of each layer.

    Example:
      >>> import numpy as np
      >>> costs = [np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0])]
      >>> water_fill(costs, [np.array([0.5, 0.9, 1.0]), np.array([0.6, 1.0])], budget=5.0)
      [2, 0]
    """
    everything = _at_level(costs, energies, 0.0)
    if _total(costs, everything) <= budget:
        return everything
    chosen = _at_level(costs, energies, np.inf)
    low, high = 0.0, _steepest(costs, energies, chosen)  # above it, nothing is worth its cost
    for _ in range(_BISECTIONS):
        level = (low + high) / 2
        candidate = _at_level(costs, energies, level)
        if _total(costs, candidate) <= budget:
            chosen, high = candidate, level
        else:
            low = level
    return _fill_up(costs, energies, chosen, budget)


def _at_level(costs, energies, level: float) -> list[int]:
    """What each layer takes at a water level; of options worth the same, the cheapest."""
    if np.isinf(level):
        # The dearest of energies breaks the ties of the cheapest costs.
        return [int(np.lexsort((-energy, cost))[0]) for cost, energy in zip(costs, energies, strict=True)]
    chosen = []
    for cost, energy in zip(costs, energies, strict=True):
        worth = energy - level * cost
        best = np.flatnonzero(worth == np.max(worth))
        chosen.append(int(best[np.argmin(cost[best])]))
    return chosen


def _total(costs, chosen: list[int]) -> float:
    return float(sum(cost[option] for cost, option in zip(costs, chosen, strict=True)))


def _steepest(costs, energies, chosen: list[int]) -> float:
    """The largest energy per cost that any layer can gain from where it is."""
    steps = (_best_step(*layer, np.inf) for layer in zip(costs, energies, chosen, strict=True))
    return max((slope for slope, _ in filter(None, steps)), default=0.0)


def _best_step(cost, energy, current: int, left: float) -> tuple[float, int] | None:
    """The affordable option that gains most energy per cost, as ``(energy per cost, option)``."""
    more, gained = cost - cost[current], energy - energy[current]
    (options,) = np.nonzero((more > 0) & (gained > 0) & (more <= left))
    if not options.size:
        return None
    slopes = gained[options] / more[options]
    return float(np.max(slopes)), int(options[np.argmax(slopes)])


def _fill_up(costs, energies, chosen: list[int], budget: float) -> list[int]:
    """Takes steps, the best first, until none fits into what is left of the budget."""
    chosen, left = list(chosen), budget - _total(costs, chosen)
    queue: list[tuple[float, int, int]] = []

    def enqueue(layer: int) -> None:
        if step := _best_step(costs[layer], energies[layer], chosen[layer], left):
            heapq.heappush(queue, (-step[0], layer, step[1]))

    for layer in range(len(costs)):
        enqueue(layer)
    while queue:
        _, layer, option = heapq.heappop(queue)
        more = costs[layer][option] - costs[layer][chosen[layer]]
        if more <= left:  # or the queue's entry is older than other steps that were taken since
            raised = [*chosen[:layer], option, *chosen[layer + 1 :]]
            spent = _total(costs, raised)
            if spent <= budget:
                chosen, left = raised, budget - spent
            else:  # what was left had been rounded up: no step of this cost fits
                left = float(np.nextafter(more, -np.inf))
        enqueue(layer)
    return chosen
