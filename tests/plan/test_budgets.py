"""Plans within a budget: what is counted, what is lowered, and what stays."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linen_zoo import prepared
from test_plan import dense, network
from test_plan_profile import profile_of

import cuttlefish_jax as cf
from cuttlefish_jax.kernels import Kernels

FULL = cf.RankRatio(1.0)
FC = {"a/fc": (24, 40), "b/fc": (32, 32), "c/fc": (16, 64)}


def spectra_of(kernels, seed=0):
    """Random singular values, each layer's with a decay of its own."""
    rng = np.random.default_rng(seed)
    return {
        path: np.sort(rng.exponential(size=(*kernel.stack_shape, kernel.max_rank)) ** rng.uniform(0.3, 3))[
            ..., ::-1
        ]
        for path, kernel in kernels.items()
    }


KERNELS = network(*(dense(path, *shape) for path, shape in FC.items()))
SIGMAS = spectra_of(KERNELS)


def planned(budget, *, kernels=KERNELS, sigmas=SIGMAS, rank_rule=FULL, **options):
    return cf.make_plan(kernels, rank_rule=rank_rule, singular_values=sigmas, budget=budget, **options)


def kept_energy(plan, sigmas):
    """Shares of the squared Frobenius norms that are left, summed over all matrices."""
    total = 0.0
    for path, kernel in plan.kernels.items():
        squares = np.asarray(sigmas[path], np.float64).reshape(-1, kernel.max_rank) ** 2
        total += np.sum(squares[:, : plan.ranks.get(path)] / np.sum(squares, axis=1, keepdims=True))
    return total


def flops(plan):
    return sum(kernel.flops(plan.ranks.get(path)) for path, kernel in plan.kernels.items())


# --- What is counted ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.3, 0.5, 0.75])
def test_parameters_are_those_of_the_whole_model(share):
    kernels = dataclasses.replace(KERNELS, num_params=KERNELS.num_params + 300)  # biases, say
    plan = planned(cf.Parameters(share), kernels=kernels)
    # The next rank of the layer with the fewest parameters per rank, 64, would be too much.
    assert share - 64 / kernels.num_params <= plan.num_params / plan.num_params_full <= share
    assert plan.budget.used == pytest.approx(plan.num_params / plan.num_params_full)
    low = planned(cf.Parameters(share), kernels=kernels, extra_batch_norm=True)
    assert low.num_params / low.num_params_full <= share and low.num_params > plan.num_params - 66


def test_flops_are_those_of_the_kernels():
    positions = {"a/fc": 100, "b/fc": 1, "c/fc": 1}
    entries = tuple(
        dataclasses.replace(kernel, positions=positions.get(path, 1)) for path, kernel in KERNELS.items()
    )
    kernels = Kernels(entries, num_params=KERNELS.num_params)
    plan = planned(cf.FLOPs(0.5), kernels=kernels)
    full = sum(kernel.flops() for kernel in kernels.values())
    assert 0.45 < flops(plan) / full <= 0.5
    assert plan.budget.used == pytest.approx(flops(plan) / full)
    # Where nearly all of them are is where they are saved.
    assert list(plan.ranks) == ["a/fc"]


def test_time_is_that_of_the_profiled_kernels_as_predicted():
    profile = profile_of(KERNELS, {"a": 2.0, "b": 4.0, "c": 2.0})  # a second each, at a quarter of the rank
    options = dict(profile=profile, min_speedup=1.0)
    plan = planned(cf.Time(0.6), **options)
    seconds = sum(
        profile.predicted_seconds(path, plan.ranks[path]) if path in plan.ranks else 1.0 for path in FC
    )
    assert seconds / 3 <= 0.6 and plan.budget.used == pytest.approx(seconds / 3)
    # Below the measured rank it is not predicted to fall: no rank is below it, and no smaller share possible.
    for path, rank in plan.ranks.items():
        assert rank >= KERNELS[path].max_rank // 4
    floor = {path: KERNELS[path].max_rank // 4 for path in FC}
    assert planned(cf.Time(1.25 / 3), **options).ranks == floor
    message = (
        r"^budget Time\(share=0.4\) cannot be met: the smallest share of the measured time of the kernels is"
    )
    with pytest.raises(ValueError, match=rf"{message} 0\.4167, with every layer at the lowest rank"):
        planned(cf.Time(0.4), **options)
    with pytest.raises(ValueError, match=r"^budget Time needs a profile: pass profile=cf.profile_kernels"):
        planned(cf.Time(0.6))
    with pytest.raises(ValueError, match=r"^the profile has no 'head': time that layer too, or keep it by a"):
        planned(cf.Time(0.6), rules=[cf.Rule("head", rank=2)], **options)


# --- What is lowered ----------------------------------------------------------------------------------------


def test_a_plan_within_its_budget_is_left_alone():
    plain = cf.make_plan(KERNELS, rank_rule=cf.RankRatio(0.25))
    share = plain.num_params / plain.num_params_full
    plan = planned(cf.Parameters(share), rank_rule=cf.RankRatio(0.25))
    assert (plan.ranks, plan.kept, plan.decided) == (plain.ranks, plain.kept, plain.decided)
    assert plan.budget == cf.BudgetUse(budget=cf.Parameters(share), asked=share, used=share)
    assert plan.report().splitlines()[-1] == f"budget: {share:g} of the parameters; the plan uses {share:.4g}"
    # And just below, only a rank or two are lower.
    less = planned(cf.Parameters(share - 1e-6), rank_rule=cf.RankRatio(0.25))
    assert sum(plain.ranks.values()) - sum(less.ranks.values()) == 1


def test_no_choice_of_ranks_within_the_budget_keeps_more_energy():
    entries = (dense("x", 7, 9), dense("y", 8, 8, stack=(2,)), dense("z", 6, 20))
    kernels = Kernels(entries, num_params=sum(kernel.num_params() for kernel in entries))
    for seed in range(10):
        sigmas = spectra_of(kernels, seed)
        plan = planned(cf.Parameters(0.7), kernels=kernels, sigmas=sigmas, rules=[cf.Rule("*")])
        best, step = 0.0, 0.0
        for ranks in itertools.product(*([None, *range(1, kernel.max_rank)] for kernel in entries)):
            chosen = {path: rank for path, rank in zip(kernels, ranks, strict=True) if rank}
            other = cf.FactorizationPlan.from_ranks(kernels, chosen)
            if other.num_params <= 0.7 * other.num_params_full:
                best = max(best, kept_energy(other, sigmas))
        for path in plan.ranks:  # to raise one rank is all that the budget has no room for
            more = cf.FactorizationPlan.from_ranks(kernels, plan.ranks | {path: plan.ranks[path] + 1})
            step = max(step, kept_energy(more, sigmas) - kept_energy(plan, sigmas))
        assert best - step - 1e-9 <= kept_energy(plan, sigmas) <= best + 1e-9


@settings(max_examples=60, deadline=None)
@given(st.floats(0.15, 1), st.floats(0.15, 1), st.integers(1, 8), st.integers(0, 99))
def test_a_larger_budget_never_keeps_less(one, other, round_to, seed):
    sigmas = spectra_of(KERNELS, seed)
    options = dict(sigmas=sigmas, round_to=round_to, rank_rule=cf.RankRatio(0.8))
    try:
        low, high = (planned(cf.Parameters(share), **options) for share in sorted((one, other)))
    except ValueError as error:
        possible = float(str(error).split(" is ")[1].split(",")[0])
        assert min(one, other) < possible  # what is said to be possible is
        assert planned(cf.Parameters(possible), **options).budget.used <= possible
        return
    assert low.num_params <= min(one, other) * low.num_params_full * (1 + 1e-9)
    assert kept_energy(low, sigmas) <= kept_energy(high, sigmas) + 1e-9
    asked = cf.make_plan(KERNELS, rank_rule=cf.RankRatio(0.8), round_to=round_to)
    for path, rank in {**low.ranks, **high.ranks}.items():
        assert rank <= asked.ranks.get(path, KERNELS[path].max_rank)
        assert rank % round_to == 0 or rank == KERNELS[path].max_rank
    assert cf.FactorizationPlan.from_json(low.to_json()) == low


def test_rules_hold_within_a_budget():
    rules = [cf.Rule("a/*", keep=True), cf.Rule("b/*", min_rank=10), cf.Rule("head", rank=6)]
    lowest = planned(cf.Parameters(0.72), rules=rules)
    assert lowest.ranks["b/fc"] >= 10 and lowest.ranks["head"] == 6
    assert lowest.kept == {"stem": "first layer", "a/fc": "rule 'a/*'"}
    assert lowest.decided["head"] == "rule 'head'"
    rules = [cf.Rule("b/*", max_rank=3), cf.Rule("c/*", round_to=5)]
    plan = planned(cf.Parameters(0.6), rules=rules)
    assert plan.ranks["b/fc"] <= 3 and plan.ranks["c/fc"] in (5, 10)
    assert plan.decided["b/fc"].endswith("rule 'b/*', RankRatio") or "gave 3" in plan.decided["b/fc"]


def test_layers_whose_rank_was_too_high_are_lowered_too_and_the_report_says_so():
    plan = planned(cf.Parameters(0.5))
    assert list(plan.ranks) == list(FC)
    assert plan.decided["b/fc"] == "budget; rank 32 of 32 would not make it smaller"
    lower = planned(cf.Parameters(0.35), rank_rule=cf.RankRatio(0.4))
    assert lower.decided["b/fc"] == f"budget; RankRatio gave {int(0.4 * 32)}"
    asked = cf.make_plan(KERNELS, rank_rule=cf.RankRatio(0.4))
    share = asked.num_params / asked.num_params_full
    last = lower.report().splitlines()[-1]
    used = lower.num_params / lower.num_params_full
    assert (
        last
        == f"budget: 0.35 of the parameters; the rank rule asked for {share:.4g}, the plan uses {used:.4g}"
    )


def test_where_the_energy_is_the_ranks_stay():
    sharp, flat = np.array([1.0] * 4 + [1e-3] * 28), np.ones(32)
    kernels = network(dense("sharp", 32, 32), dense("flat", 32, 32))
    sigmas = {"sharp": sharp, "flat": flat}
    plan = planned(cf.Parameters(0.6), kernels=kernels, sigmas=sigmas, rank_rule=cf.RankRatio(0.49))
    assert plan.ranks["sharp"] == 4 and plan.ranks["flat"] > 8


def test_copies_of_a_stack_share_one_rank_and_all_count():
    kernels = network(dense("stack", 20, 20, stack=(3,)), dense("fc", 20, 20))
    first = np.r_[np.ones(8), np.full(12, 1e-4)]
    sigmas = {"stack": np.stack([first, first * 7, first]), "fc": first * 100}
    plan = planned(cf.Parameters(0.97), kernels=kernels, sigmas=sigmas, rank_rule=cf.RankRatio(0.45))
    assert plan.ranks == {"stack": 9, "fc": 9}
    # The same cost per rank and copy, and the same relative energies: neither is favoured for its scale.
    plan = planned(cf.Parameters(0.85), kernels=kernels, sigmas=sigmas, rank_rule=cf.RankRatio(0.45))
    assert plan.ranks == {"stack": 8, "fc": 8}


def test_a_model_from_its_parameters():
    _, _, variables, kernels = prepared("scan")
    sigmas = cf.singular_values(variables["params"], kernels)
    options = dict(rank_rule=FULL, rules=[cf.Rule("*")], singular_values=jax.device_get(sigmas))
    plan = cf.make_plan(kernels, budget=cf.Parameters(0.6), **options)
    assert 0.4 < plan.num_params / plan.num_params_full <= 0.6
    low = cf.factorize_params(variables["params"], plan)
    assert sum(leaf.size for leaf in jax.tree.leaves(low)) == plan.num_params


# --- Errors -------------------------------------------------------------------------------------------------


def test_a_budget_that_cannot_be_met_says_what_can():
    lowest = KERNELS.num_params - sum(m * n - (m + n) for m, n in FC.values())
    message = (
        r"^budget Parameters\(share=0.1\) cannot be met: the smallest share of the parameters is 0\.\d+, with"
    )
    with pytest.raises(ValueError, match=message) as caught:
        planned(cf.Parameters(0.1))
    possible = float(str(caught.value).split(" is ")[1].split(",")[0])
    assert possible - 1e-4 < lowest / KERNELS.num_params <= possible
    assert set(planned(cf.Parameters(possible)).ranks.values()) == {1}
    with pytest.raises(ValueError, match="cannot be met"):
        planned(cf.Parameters(possible), min_rank_ratio=0.1)


def test_what_a_budget_lacks_is_named_with_the_way_out():
    message = (
        r"^budget FLOPs\(share=0.5\) needs singular values: pass singular_values=cf.singular_values\(params"
    )
    with pytest.raises(ValueError, match=message):
        cf.make_plan(KERNELS, rank_rule=FULL, budget=cf.FLOPs(0.5))
    missing = {path: value for path, value in SIGMAS.items() if path != "b/fc"}
    with pytest.raises(ValueError, match=r"^there is no spectrum for 'b/fc'$"):
        planned(cf.FLOPs(0.5), sigmas=missing)
    assert planned(cf.FLOPs(0.6), sigmas=missing, rules=[cf.Rule("b/*", keep=True)]).ranks
    for thing in (0.3, cf.Parameters, "parameters:0.3"):
        with pytest.raises(ValueError, match=r"is not a budget: give one such as Parameters\(0\.3\)$"):
            planned(thing)


def test_budgets_as_text():
    for budget in (cf.Parameters(0.3), cf.FLOPs(1 / 3), cf.Time(1.0)):
        assert cf.Budget.parse(str(budget)) == budget
    assert str(cf.Time(0.7)) == "time:0.7"
    for text in ("", "parameters", "parameters:", "parameters:x", "params:0.3", "flops:0", "time:nan", "0.3"):
        with pytest.raises(
            ValueError, match=r"is not a budget such as 'parameters:0.5', 'flops:0.5', 'time:"
        ):
            cf.Budget.parse(text)
    for share in (0.0, -1, 1.01, float("nan")):
        with pytest.raises(ValueError, match=rf"^FLOPs: share {share} is not in \(0, 1\]$"):
            cf.FLOPs(share)
