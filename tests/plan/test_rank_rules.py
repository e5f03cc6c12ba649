"""Rank rules: golden values, float64 NumPy as the judge, and what a plan does with them."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import NETWORK, ONES, conv, dense, network, single_rank

import cuttlefish_jax as cf
from cuttlefish_jax.kernels import Kernels


def spectrum_of(*sigmas):
    """What a rule sees of a kernel with these singular values."""
    size = len(sigmas)
    return cf.Measured(kernel=dense("fc", size, size), singular_values=np.array(sigmas, np.float64))


# --- Stable ranks -------------------------------------------------------------------------------------------


# Cuttlefish (Wang et al., MLSys 2023): R = 512, stable rank 286 at the initialisation.
@pytest.mark.parametrize(
    ("stable_rank", "rank"), [(1, 2), (10, 18), (14, 26), (20, 36), (57, 103), (150, 269), (286, 512)]
)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_golden_scaled_stable_ranks(stable_rank, rank, dtype):
    kernel = conv("conv", (3, 3), 512, 512)
    assert single_rank(kernel, dtype(stable_rank), dtype(286)) == rank


# Cuttlefish: a 3x3 convolution with cin = cout, a square matrix, 1:4, a joint qkv.
@pytest.mark.parametrize(
    ("m", "n", "scale"),
    [(9 * 64, 64, 1.78), (64, 9 * 64, 1.78), (64, 64, 4.0), (32, 128, 2.25), (768, 2304, 2.49)],
)
def test_golden_scale_of_gaussian_matrices(m, n, scale):
    assert cf.gaussian_scale(m, n) == pytest.approx(scale, abs=5e-3)


def test_the_gaussian_scale_is_that_of_a_gaussian_matrix():
    sigmas = np.linalg.svd(np.random.default_rng(0).standard_normal((400, 900)), compute_uv=False)
    measured = 400 * sigmas[0] ** 2 / np.sum(sigmas**2)
    assert cf.gaussian_scale(400, 900) == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("before", [None, 0.0])
def test_without_a_stable_rank_at_the_initialisation_the_scale_is_the_gaussian_one(before):
    assert single_rank(dense("fc", 64, 64), 5.3, before) == 22
    assert single_rank(dense("fc", 32, 128), 5.3, before) == 12


def test_a_matrix_at_the_stable_rank_of_its_initialisation_is_full_rank():
    for initial in np.random.default_rng(0).uniform(1, 60, 100).astype(np.float32):
        assert single_rank(dense("fc", 64, 64), initial, initial) == 64


def test_the_vanilla_stable_rank_is_rounded_up():
    now = [1.0, 1.2, 5, np.float32(5) * (1 + 1e-7), 5.01, 63.5, 70]
    ranks = [single_rank(dense("fc", 64, 64), rank, rank_rule=cf.StableRank()) for rank in now]
    assert ranks == [1, 2, 5, 5, 6, 64, 64]
    # The initialisation does not matter.
    assert single_rank(dense("fc", 64, 64), 5.0, 20.0, rank_rule=cf.StableRank()) == 5


# --- Shares of a spectrum -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sigmas", "p", "accumulative", "energy"),
    [
        ((6, 3, 1), 0.6, 1, 1),
        ((6, 3, 1), 0.61, 2, 1),
        ((6, 3, 1), 0.9, 2, 2),  # energies 36, 9, 1
        ((6, 3, 1), 1.0, 3, 3),
        ((1,) * 10, 0.8, 8, 8),  # exact ties count as reached
        ((1,) * 10, 0.81, 9, 9),
        ((4, 0, 0), 1.0, 1, 1),
        ((1, 6, 3), 0.9, 2, 2),  # in any order
    ],
)
def test_shares_of_a_spectrum(sigmas, p, accumulative, energy):
    for rule, rank in ((cf.AccumulativeRank(p), accumulative), (cf.EnergyRank(p), energy)):
        kernel = dense("fc", len(sigmas), 1000)
        kernels = network(kernel)
        given = {path: np.array(sigmas if path == "fc" else np.ones(16)) for path in kernels}
        plan = cf.make_plan(kernels, rank_rule=rule, singular_values=given)
        assert plan.ranks.get("fc", len(sigmas)) == rank


shares = st.floats(0.01, 1)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([(7, 7), (24, 9), (3, 40)]), st.integers(0, 10**6), st.floats(0, 3), shares)
def test_the_accumulative_rank_is_that_of_the_device(shape, seed, decay, p):
    rng = np.random.default_rng(seed)
    sigmas = np.exp(-decay * rng.uniform(0, 1, min(shape)))
    u, v = (np.linalg.qr(rng.standard_normal((size, min(shape))))[0] for size in shape)
    kernels = Kernels((dense("fc", *shape),))
    params = {"fc": {"kernel": jnp.asarray((u * sigmas) @ v.T, jnp.float32)}}
    values = np.asarray(cf.singular_values(params, kernels)["fc"])
    rank = cf.AccumulativeRank(p).rank(cf.Measured(kernel=kernels["fc"], singular_values=values))
    expected = int(cf.accumulative_ranks(params, kernels, p=p)["fc"])
    near = np.abs(np.cumsum(values) / np.sum(values) - p * (1 - 1e-5)) < 2e-6
    assert rank == expected or np.any(near)  # float32 sums; a share within their rounding may fall either way


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1e150, allow_subnormal=False), min_size=1, max_size=12), shares)
def test_the_energy_rank_bounds_the_error(sigmas, p):
    sigmas = np.sort(sigmas)[::-1]
    rank = cf.EnergyRank(p).rank(spectrum_of(*sigmas))
    scaled = sigmas / max(sigmas[0], 1e-300)
    error = np.sqrt(np.sum(scaled[rank:] ** 2))
    assert error <= math.sqrt(1 - p + 1.1e-5) * np.linalg.norm(scaled) + 1e-12
    if rank > 1:  # and it is the smallest that does
        assert np.sum(scaled[: rank - 1] ** 2) < p * np.sum(scaled**2)


def test_energies_and_entropies_of_huge_and_tiny_values():
    for scale in (1e-200, 1.0, 1e200, 8e307):
        assert cf.EnergyRank(0.9).rank(spectrum_of(2 * scale, scale, scale / 3)) == 2
        assert cf.EffectiveRank().rank(spectrum_of(2 * scale, scale, scale / 3)) == 3


# Roy and Vetterli, EUSIPCO 2007: between 1 and the rank, the rank itself where all singular values are equal.
@pytest.mark.parametrize(
    ("sigmas", "rank"),
    [
        ((3,), 1),
        ((1,) * 7, 7),
        ((0.3,) * 7 + (0,) * 5, 7),  # a whole number up to rounding is that number
        ((1, 0, 0), 1),
        ((4, 2, 1, 1), 4),  # exp(1.2130), 3.3636
        ((8, 1, 1), 2),  # exp(0.6390), 1.8946
        ((1, 8, 1), 2),  # in any order
        ((1e-30, 1), 1),
    ],
)
def test_golden_effective_ranks(sigmas, rank):
    assert cf.EffectiveRank().rank(spectrum_of(*sigmas)) == rank


def test_the_effective_rank_is_below_the_rank_and_above_the_stable_rank():
    for decay in (0.0, 0.05, 0.5):
        sigmas = np.exp(-decay * np.arange(40))
        rank = cf.EffectiveRank().rank(spectrum_of(*sigmas))
        assert np.sum(sigmas**2) <= rank <= 40


def test_copies_of_a_stack_share_the_largest_rank():
    sigmas = {"blocks/fc": np.array([[1] + [0] * 9, [1] * 3 + [0] * 7, [1] * 2 + [0] * 8], np.float32)}
    for rule in (cf.AccumulativeRank(1.0), cf.EnergyRank(1.0), cf.EffectiveRank()):
        rules = [cf.Rule("st*", keep=True)]
        plan = cf.make_plan(NETWORK, rank_rule=rule, rules=rules, singular_values=sigmas)
        assert plan.ranks == {"blocks/fc": 3}


def test_a_spectrum_of_zeros_is_that_of_a_zero_kernel():
    kernel = dense("fc", 4, 6)
    kernels = network(kernel)
    sigmas = {path: np.zeros(k.max_rank) for path, k in kernels.items()}
    for rule in (cf.AccumulativeRank(), cf.EnergyRank(), cf.EffectiveRank()):
        assert rule.rank(spectrum_of(0.0, 0.0)) == 1
        plan = cf.make_plan(kernels, rank_rule=rule, singular_values=sigmas)
        assert plan.kept["fc"] == "its kernel is zero"
    stack = np.ones((3, 10))
    stack[1] = 0
    rules = [cf.Rule("st*", keep=True)]
    plan = cf.make_plan(NETWORK, rank_rule=cf.EnergyRank(), rules=rules, singular_values={"blocks/fc": stack})
    assert plan.kept["blocks/fc"] == "its kernel is zero in 1 of 3 copies"


# --- Ratios and combinations --------------------------------------------------------------------------------


# Pufferfish's quarter (MLSys 2021), BERT's 0.45, SI&FD's 0.08 for ResNet-18 (Khodak et al., ICLR 2021).
@pytest.mark.parametrize(
    ("ratio", "full", "rank"),
    [(0.25, 512, 128), (0.45, 768, 345), (0.08, 512, 40), (0.29, 100, 29), (0.001, 64, 1), (1.0, 64, 64)],
)
def test_a_ratio_of_the_full_rank_is_rounded_down_and_needs_no_measurement(ratio, full, rank):
    kernels = network(dense("fc", full, 4000))
    rule = cf.RankRatio(ratio)
    assert rule.rank(cf.Measured(kernel=kernels["fc"])) == rank
    plan = cf.make_plan(kernels, None, rank_rule=rule)
    assert plan.ranks.get("fc", full) == rank
    assert cf.make_plan(kernels, rules=[cf.Rule("fc", rank_ratio=ratio)]).ranks.get("fc", full) == rank


def test_the_largest_of_several_rules():
    kernels = network(dense("fc", 40, 400))
    kept = cf.Rule("[sh]*", keep=True)
    sigmas = {"fc": np.concatenate([[10.0], np.full(39, 0.5)])}  # a dominant direction, and a long tail
    ranks = {"fc": np.sum(sigmas["fc"] ** 2) / 100}
    options = dict(ranks_t=ranks, singular_values=sigmas, rules=[kept])
    rules = (cf.ScaledStableRank(), cf.AccumulativeRank(), cf.RankRatio(0.1))
    each = [cf.make_plan(kernels, **options, rank_rule=rule).ranks["fc"] for rule in rules]
    assert each == [2, 29, 4]  # 10 + 28 * 0.5 is the first sum above 0.8 * 29.5
    for several, rank in ((rules, 29), (rules[::2], 4), (rules[:1], 2)):
        assert cf.make_plan(kernels, **options, rank_rule=cf.LargestOf(several)).ranks["fc"] == rank
    nested = cf.LargestOf([cf.LargestOf(rules[:2]), rules[2]])
    assert cf.make_plan(kernels, **options, rank_rule=nested).ranks["fc"] == 29


def test_the_plan_rounds_and_bounds_what_any_rule_gives():
    kernels = network(dense("fc", 60, 400))
    options = dict(rank_rule=cf.RankRatio(0.15))
    assert cf.make_plan(kernels, **options).ranks["fc"] == 9
    assert cf.make_plan(kernels, **options, round_to=8).ranks["fc"] == 16
    assert cf.make_plan(kernels, **options, min_rank_ratio=0.3).ranks["fc"] == 18
    assert cf.make_plan(kernels, **options, rules=[cf.Rule("fc", rank=5)]).ranks["fc"] == 5
    assert cf.make_plan(kernels, **options, rules=[cf.Rule("fc", rank_ratio=0.5)]).ranks["fc"] == 30
    assert "fc" in cf.make_plan(kernels, **options, rules=[cf.Rule("fc", keep=True)]).kept


@dataclasses.dataclass(frozen=True)
class Wild(cf.RankRule):
    """A rule of one's own, which gives what it is told."""

    value: int

    def rank(self, measured):
        assert measured.singular_values is None
        return self.value


@pytest.mark.parametrize(("value", "rank"), [(-5, 1), (0, 1), (7, 7), (10**9, 24), (np.int64(3), 3)])
def test_rules_of_ones_own_are_clamped(value, rank):
    plan = cf.make_plan(network(dense("fc", 24, 500)), rank_rule=Wild(value))
    assert plan.ranks.get("fc", 24) == rank
    assert cf.FactorizationPlan.from_json(plan.to_json()) == plan


def test_rules_are_values():
    rules = [
        cf.ScaledStableRank(), cf.StableRank(), cf.AccumulativeRank(0.7), cf.EnergyRank(0.7),
        cf.RankRatio(0.7),
        cf.LargestOf((cf.StableRank(), cf.RankRatio())), cf.LargestOf((cf.RankRatio(), cf.StableRank())),
    ]  # fmt: skip
    assert len(set(rules)) == len(rules)
    assert cf.LargestOf([cf.StableRank()]) == cf.LargestOf((cf.StableRank(),))
    needs = [(rule.needs_stable_ranks, rule.needs_singular_values) for rule in rules[:6]]
    assert needs == [
        (True, False),
        (True, False),
        (False, True),
        (False, True),
        (False, False),
        (True, False),
    ]
    both = cf.LargestOf((cf.ScaledStableRank(), cf.AccumulativeRank()))
    assert both.needs_stable_ranks and both.needs_singular_values


# --- Errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "missing"),
    [
        (cf.ScaledStableRank(), "stable ranks: pass ranks_t=cf.stable_ranks(params, kernels)"),
        (cf.StableRank(), "stable ranks: pass ranks_t=cf.stable_ranks(params, kernels)"),
        (cf.AccumulativeRank(), "singular values: pass singular_values=cf.singular_values(params, kernels)"),
        (cf.EnergyRank(), "singular values: pass singular_values=cf.singular_values(params, kernels)"),
        (cf.EffectiveRank(), "singular values: pass singular_values=cf.singular_values(params, kernels)"),
        (
            cf.LargestOf((cf.RankRatio(), cf.EnergyRank())),
            "singular values: pass singular_values=cf.singular_values(params, kernels)",
        ),
    ],
)
def test_what_a_rule_lacks_is_named_with_the_way_out(rule, missing):
    with pytest.raises(ValueError) as caught:
        cf.make_plan(NETWORK, rank_rule=rule)
    assert str(caught.value) == f"rank_rule {type(rule).__name__} needs {missing}"


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        (np.ones(10), r"^the spectrum of 'blocks/fc' has shape \(10,\), expected \(3, 10\)$"),
        (np.ones((3, 12)), r"^the spectrum of 'blocks/fc' has shape \(3, 12\), expected \(3, 10\)$"),
        (np.full((3, 10), np.nan), "^the spectrum of 'blocks/fc' is nan, expected a finite number >= 0$"),
        (-np.ones((3, 10)), "^the spectrum of 'blocks/fc' is -1.0, expected a finite number >= 0$"),
    ],
)
def test_spectra_that_are_none_are_refused(sigmas, message):
    values = {path: np.ones((*kernel.stack_shape, kernel.max_rank)) for path, kernel in NETWORK.items()}
    with pytest.raises(ValueError, match=message):
        cf.make_plan(NETWORK, rank_rule=cf.EnergyRank(), singular_values={**values, "blocks/fc": sigmas})
    del values["blocks/fc"]
    with pytest.raises(ValueError, match=r"^there is no spectrum for 'blocks/fc'$"):
        cf.make_plan(NETWORK, rank_rule=cf.EnergyRank(), singular_values=values)


def test_rules_that_see_nothing_say_so():
    nothing = cf.Measured(kernel=NETWORK["stage/fc"])
    for rule, what in ((cf.ScaledStableRank(), "stable rank"), (cf.EnergyRank(), "spectrum")):
        with pytest.raises(ValueError, match=f"^there is no {what} for 'stage/fc'$"):
            rule.rank(nothing)


@pytest.mark.parametrize("value", [0.0, -0.5, 1.01, math.nan])
def test_shares_out_of_range_are_refused(value):
    for rule, name in ((cf.AccumulativeRank, "p"), (cf.EnergyRank, "p"), (cf.RankRatio, "ratio")):
        with pytest.raises(ValueError, match=rf"^{rule.__name__}: {name} {value} is not in \(0, 1\]$"):
            rule(value)


def test_what_is_no_rule_is_refused():
    with pytest.raises(ValueError, match=r"^LargestOf needs at least one rank rule$"):
        cf.LargestOf(())
    for thing in (cf.RankRatio, 0.25, "energy", cf.Rule("x")):
        with pytest.raises(ValueError, match="is not a rank rule: give one such as ScaledStableRank"):
            cf.make_plan(NETWORK, ONES, rank_rule=thing)
        with pytest.raises(ValueError, match="is not a rank rule"):
            cf.LargestOf((cf.RankRatio(), thing))
