"""Rules by pattern: bounds of the ranks, rounding to tiles, and what contradicts itself."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import NETWORK, ONES, dense, network, single_rank

import cuttlefish_jax as cf
from cuttlefish_jax.plan.rules import RankBounds

KERNEL = dense("fc", 60, 400)


def rank_of(wish, *, rule=None, **options):
    """The rank of a 60 x 400 kernel whose rank rule wishes for one."""
    rules = [] if rule is None else [cf.Rule("fc", **rule)]
    return single_rank(KERNEL, 1.0, rank_rule=cf.RankRatio(wish / 60), rules=rules, **options)


@pytest.mark.parametrize(
    ("rule", "ranks"),
    [
        (dict(), (3, 20, 50)),
        (dict(min_rank=10), (10, 20, 50)),
        (dict(min_rank_ratio=0.21), (13, 20, 50)),
        (dict(min_rank=10, min_rank_ratio=0.21), (13, 20, 50)),
        (dict(min_rank=14, min_rank_ratio=0.21), (14, 20, 50)),
        (dict(min_rank=1000), (60, 60, 60)),
        (dict(max_rank=18), (3, 18, 18)),
        (dict(max_rank_ratio=0.31), (3, 18, 18)),
        (dict(max_rank=25, max_rank_ratio=0.31), (3, 18, 18)),
        (dict(max_rank=16, max_rank_ratio=0.31), (3, 16, 16)),
        (dict(max_rank=1), (1, 1, 1)),
        (dict(max_rank_ratio=0.001), (1, 1, 1)),
        (dict(min_rank=10, max_rank=18), (10, 18, 18)),
        (dict(round_to=8), (8, 24, 56)),
        (dict(round_to=8, max_rank=18), (8, 16, 16)),  # a maximum is not exceeded by rounding
        (dict(round_to=8, min_rank=17, max_rank=18), (18, 18, 18)),  # no multiple is within
        (dict(round_to=128), (60, 60, 60)),
        (dict(round_to=128, max_rank=50), (50, 50, 50)),
        (dict(rank_ratio=0.5, max_rank=18), (18, 18, 18)),
        (dict(rank_ratio=0.5, round_to=7), (35, 35, 35)),
    ],
)
def test_bounds_and_rounding_of_a_rule(rule, ranks):
    assert tuple(rank_of(wish, rule=rule) for wish in (3, 20, 50)) == ranks


def test_a_rule_s_bounds_stand_in_place_of_the_plan_s():
    plan = dict(min_rank_ratio=0.25, max_rank_ratio=0.5, round_to=4)
    assert [rank_of(wish, **plan) for wish in (1, 17, 60)] == [16, 20, 28]
    assert [rank_of(wish, rule=dict(min_rank=2), **plan) for wish in (1, 60)] == [4, 28]
    assert [rank_of(wish, rule=dict(max_rank=40), **plan) for wish in (1, 60)] == [16, 40]
    assert [rank_of(wish, rule=dict(round_to=1), **plan) for wish in (1, 17, 60)] == [15, 17, 30]
    assert rank_of(60, rule=dict(rank=7), **plan) == 7


@settings(max_examples=100, deadline=None)
@given(*[st.integers(1, 50)] * 2, st.integers(1, 16), st.integers(0, 30))
def test_ranks_within_bounds(full, low, round_to, more):
    lowest = min(full, low)
    bounds = RankBounds(lowest=lowest, highest=min(full, lowest + more), round_to=round_to, full=full)
    fitted = [bounds.fit(rank) for rank in range(-3, 60)]
    assert fitted == sorted(fitted)  # who wishes for more does not get less
    assert set(fitted) == set(bounds.ranks())
    multiples = [r for r in range(bounds.lowest, bounds.highest + 1) if r % round_to == 0]
    assert set(multiples) <= set(fitted) <= set(range(bounds.lowest, bounds.highest + 1))
    # Anything else than a multiple is the full rank, or there is no multiple.
    assert set(fitted) - set(multiples) <= ({full} if multiples else {bounds.highest})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(keep=True, min_rank=3), "rule 'x': keep and min_rank contradict each other"),
        (dict(rank=4, round_to=8), "rule 'x': a fixed rank and round_to contradict each other"),
        (dict(min_rank=0), "rule 'x': min_rank 0 is below 1"),
        (dict(max_rank=2.5), "rule 'x': max_rank 2.5 is not an integer"),
        (dict(round_to=True), "rule 'x': round_to True is not an integer"),
        (dict(max_rank_ratio=0.0), r"rule 'x': max_rank_ratio 0.0 is not in \(0, 1\]"),
        (dict(min_rank=5, max_rank=4), "rule 'x': min_rank 5 is above max_rank 4"),
        (
            dict(min_rank_ratio=0.5, max_rank_ratio=0.25),
            "rule 'x': min_rank_ratio 0.5 is above max_rank_ratio 0.25",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        cf.Rule("x", **options)


def test_bounds_that_leave_no_rank_are_refused():
    message = r"^the lowest rank 20 for 'fc' is above the highest 15 by rule 'fc'$"
    with pytest.raises(ValueError, match=message):
        rank_of(3, rule=dict(min_rank=20, max_rank_ratio=0.25))
    with pytest.raises(ValueError, match=r"^the lowest rank 30 for 'fc' is above the highest 15$"):
        rank_of(3, min_rank_ratio=0.5, max_rank_ratio=0.25)
    for ratio in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match=rf"^max_rank_ratio {ratio} is not in \(0, 1\]$"):
            cf.make_plan(NETWORK, ONES, max_rank_ratio=ratio)


def test_tiles_of_the_device_at_hand():
    assert jax.default_backend() == "cpu" and cf.tile_size() == 1
    assert [cf.tile_size(name) for name in ("gpu", "cuda", "rocm", "tpu", "abacus")] == [8, 8, 8, 128, 1]
    kernels = network(dense("fc", 512, 512))
    rank_rule = cf.RankRatio(0.1)
    ranks = {
        name: cf.make_plan(kernels, rank_rule=rank_rule, round_to=cf.tile_size(name)).ranks["fc"]
        for name in ("cpu", "gpu", "tpu")
    }
    assert ranks == {"cpu": 51, "gpu": 56, "tpu": 128}
    assert cf.make_plan(kernels, rank_rule=rank_rule, round_to=np.int64(8)).ranks["fc"] == 56


def test_a_plan_says_what_decided():
    rules = [cf.Rule("stage/fc", rank=3), cf.Rule("stage/s*"), cf.Rule("stem", keep=True)]
    plan = cf.make_plan(NETWORK, ONES, rules=rules)
    assert plan.decided == {
        "stage/conv": "ScaledStableRank",
        "stage/shortcut": "rule 'stage/s*', ScaledStableRank",
        "blocks/fc": "ScaledStableRank",
        "stage/fc": "rule 'stage/fc'",
    }
    assert plan.kept["stem"] == "rule 'stem'"
    assert cf.FactorizationPlan.from_json(plan.to_json()) == plan
