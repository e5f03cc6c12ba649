"""Water-filling against every possible choice, in float64 NumPy."""

import itertools

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cuttlefish_jax.plan.water_filling import water_fill


def best_of_all(costs, energies, budget):
    """The largest energy of any choice within the budget."""
    choices = itertools.product(*(range(len(cost)) for cost in costs))
    within = [
        sum(energy[i] for energy, i in zip(energies, choice, strict=True))
        for choice in choices
        if sum(cost[i] for cost, i in zip(costs, choice, strict=True)) <= budget
    ]
    return max(within)


def total(values, choice):
    return float(sum(value[i] for value, i in zip(values, choice, strict=True)))


def ranks_of(rng, *, whole):
    """Costs and energies of a layer's ranks, and of the whole kernel."""
    sigmas = np.sort(rng.exponential(size=rng.integers(2, 6)))[::-1]
    unit, energy = rng.integers(1, 9), np.cumsum(sigmas**2) / np.sum(sigmas**2)
    costs = unit * np.arange(1.0, len(sigmas) + 1)
    if whole:  # the last ranks would be dearer than the whole
        costs[-1] = costs[-1] * 0.8
    return costs, energy


seeds = st.integers(0, 10**6)


@settings(max_examples=150, deadline=None)
@given(seeds, st.booleans())
@example(1612, True)  # what was left had been rounded up
def test_it_keeps_the_most_energy_that_the_budget_can_buy(seed, whole):
    rng = np.random.default_rng(seed)
    costs, energies = zip(*(ranks_of(rng, whole=whole) for _ in range(4)), strict=True)
    lowest, highest = sum(map(np.min, costs)), sum(map(np.max, costs))
    for budget in np.linspace(lowest, highest, 7):
        choice = water_fill(costs, energies, budget)
        kept, spent = total(energies, choice), total(costs, choice)
        assert spent <= budget
        # No other choice of the same cost keeps more than by the step that did not fit any more.
        steps = [np.max(energy) - energy[i] for energy, i in zip(energies, choice, strict=True)]
        assert kept >= best_of_all(costs, energies, budget) - max(steps) - 1e-9
        # And no step is left that would fit.
        for cost, energy, i in zip(costs, energies, choice, strict=True):
            assert not np.any((energy > energy[i]) & (cost <= cost[i] + budget - spent))


@settings(max_examples=150, deadline=None)
@given(seeds)
def test_at_a_level_it_is_the_best_of_all(seed):
    # Where the budget is just what the threshold's solution costs, nothing is left to fill up.
    rng = np.random.default_rng(seed)
    costs, energies = zip(*(ranks_of(rng, whole=True) for _ in range(4)), strict=True)
    level = rng.exponential() / 10
    threshold = [int(np.argmax(energy - level * cost)) for cost, energy in zip(costs, energies, strict=True)]
    budget = total(costs, threshold)
    kept = total(energies, water_fill(costs, energies, budget))
    assert abs(kept - best_of_all(costs, energies, budget)) < 1e-9
    assert abs(kept - total(energies, threshold)) < 1e-9


@settings(max_examples=150, deadline=None)
@given(seeds, st.floats(0, 1), st.floats(0, 1))
def test_a_larger_budget_never_keeps_less(seed, one, other):
    rng = np.random.default_rng(seed)
    costs, energies = zip(*(ranks_of(rng, whole=i % 2 == 0) for i in range(6)), strict=True)
    lowest, highest = sum(map(np.min, costs)), sum(map(np.max, costs))
    budgets = [lowest + share * (highest - lowest) for share in sorted((one, other))]
    kept = [total(energies, water_fill(costs, energies, budget)) for budget in budgets]
    assert kept[0] <= kept[1] + 1e-9


def test_options_in_any_order_and_of_equal_cost():
    # A cost that does not fall below a measured rank: the best energy of those that cost the same.
    costs, energies = [np.array([2.0, 2.0, 2.0, 3.0])], [np.array([0.1, 0.5, 0.8, 1.0])]
    assert [water_fill(costs, energies, budget) for budget in (2.0, 2.9, 3.0)] == [[2], [2], [3]]
    backwards = [cost[::-1] for cost in costs], [energy[::-1] for energy in energies]
    assert [water_fill(*backwards, budget) for budget in (2.0, 2.9, 3.0)] == [[1], [1], [0]]


def test_a_flat_spectrum_is_filled_layer_by_layer():
    costs, energies = [np.arange(1.0, 5)] * 3, [np.arange(1.0, 5) / 4] * 3
    choices = [water_fill(costs, energies, budget) for budget in range(3, 13)]
    assert [int(sum(choice)) for choice in choices] == list(range(10))


def test_many_layers_of_many_ranks_are_quick():
    rng = np.random.default_rng(0)
    sigmas = np.sort(rng.exponential(size=(100, 2048)), axis=1)[:, ::-1]
    energies = list(np.cumsum(sigmas**2, axis=1) / np.sum(sigmas**2, axis=1, keepdims=True))
    costs = list(rng.integers(100, 9000, (100, 1)) * np.arange(1.0, 2049))
    budget = 0.3 * sum(cost[-1] for cost in costs)
    choice = water_fill(costs, energies, budget)
    assert 0.999 * budget < total(costs, choice) <= budget
    # One threshold for all: what was taken last is worth about as much everywhere.
    gains = [
        (energy[i] - energy[i - 1]) / cost[0]
        for cost, energy, i in zip(costs, energies, choice, strict=True)
        if i
    ]
    missed = [
        (energy[i + 1] - energy[i]) / cost[0]
        for cost, energy, i in zip(costs, energies, choice, strict=True)
        if i + 1 < len(cost)
    ]
    assert min(gains) > 0.99 * max(missed)
