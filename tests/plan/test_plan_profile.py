"""What measured speed-ups make of a plan."""

import dataclasses
import math

import pytest
from test_plan import NETWORK, ONES, dense, network

import cuttlefish_jax as cf
from cuttlefish_jax.profiling.kernel_profile import KernelProfile, KernelTiming

RANK_RULE = cf.RankRatio(0.25)


def profile_of(kernels, speedups):
    """Speed-ups at a quarter of the full rank as if measured, ``{stack: speed-up}``."""
    timings = (
        KernelTiming(
            path=path, stack=stack, layer=kernel.layer, shape=kernel.shape, rank=kernel.max_rank // 4,
            input_shape=(1, kernel.m), input_dtype="float32", calls=1,
            full_seconds=1.0, factorized_seconds=1 / speedups[stack],
        )
        for path, kernel in kernels.items()
        if (stack := path.split("/")[0]) in speedups
    )  # fmt: skip
    return KernelProfile(timings=tuple(timings), ratio=0.25, device="cpu")


def test_stacks_that_do_not_get_faster_are_kept_with_the_numbers():
    profile = profile_of(NETWORK, {"stage": 1.499, "blocks": 1.51})
    plan = cf.make_plan(NETWORK, rank_rule=RANK_RULE, profile=profile)
    assert plan.ranks == {"blocks/fc": 2}
    reason = "stack 'stage' gets only 1.49x faster at ratio 0.25, less than 1.5x"
    assert plan.kept_entries == (
        ("stem", "first layer"), ("stage/conv", reason), ("stage/shortcut", "shortcut"),
        ("stage/fc", reason), ("head", "last layer"),
    )  # fmt: skip
    assert cf.FactorizationPlan.from_json(plan.to_json()) == plan and reason in plan.report()


def test_the_smallest_speed_up_is_an_option():
    profile = profile_of(NETWORK, {"stage": 1.45, "blocks": 1.51})
    lax = cf.make_plan(NETWORK, rank_rule=RANK_RULE, profile=profile, min_speedup=1.4)
    assert list(lax.ranks) == ["stage/conv", "blocks/fc", "stage/fc"]
    strict = cf.make_plan(NETWORK, rank_rule=RANK_RULE, profile=profile, min_speedup=2)
    assert strict.kept["blocks/fc"] == "stack 'blocks' gets only 1.51x faster at ratio 0.25, less than 2x"
    for speedup in (-1, math.nan, math.inf):
        for option in ("min_speedup", "min_layer_speedup"):
            with pytest.raises(ValueError, match=rf"{option} {speedup} is not a number >= 0"):
                cf.make_plan(NETWORK, ONES, **{option: speedup})


@pytest.mark.parametrize(
    ("rank", "kept"),
    [
        (8, None),
        (9, "predicted 1.00x as fast at rank 9"),
        (10, "predicted 0.90x as fast at rank 10"),
        (24, "rank 24 of 24 would not make it smaller"),
    ],
)
def test_a_layer_that_at_its_own_rank_would_not_get_faster_is_kept(rank, kept):
    profile = profile_of(NETWORK, {"stage": 1.5, "blocks": 1.5})
    plan = cf.make_plan(NETWORK, rank_rule=cf.RankRatio(rank / 24), profile=profile, min_speedup=1.4)
    assert plan.kept.get("stage/fc") == kept
    assert plan.ranks.get("stage/fc") == (None if kept else rank)


def test_a_layer_need_not_get_faster_where_being_smaller_is_enough():
    profile = profile_of(NETWORK, {"stage": 1.5, "blocks": 1.5})
    rule = cf.RankRatio(10 / 24)
    plan = cf.make_plan(NETWORK, rank_rule=rule, profile=profile, min_layer_speedup=0.0)
    assert plan.ranks["stage/fc"] == 10
    strict = cf.make_plan(NETWORK, rank_rule=rule, profile=profile, min_layer_speedup=0.9)
    assert strict.kept["stage/fc"] == "predicted 0.90x as fast at rank 10"


@pytest.mark.parametrize("option", [{}, {"rank": 7}, {"rank_ratio": 0.25}, {"min_rank_ratio": 0.1}])
def test_rules_come_before_the_profile(option):
    profile = profile_of(NETWORK, {"stage": 0.9, "blocks": 3.0})
    rules = [cf.Rule("stage/fc", **option), cf.Rule("blocks/fc", keep=True)]
    plan = cf.make_plan(NETWORK, ONES, rules=rules, profile=profile)
    assert list(plan.ranks) == ["stage/fc"]
    assert plan.kept["blocks/fc"] == "rule 'blocks/fc'"


def test_a_layer_that_was_not_timed_is_an_error_unless_it_is_kept_anyway():
    profile = profile_of(NETWORK, {"stage": 2.0})
    message = r"^the profile has no 'blocks/fc': time that layer too, or give it a rule$"
    with pytest.raises(ValueError, match=message):
        cf.make_plan(NETWORK, ONES, profile=profile)
    plan = cf.make_plan(NETWORK, ONES, profile=profile, rules=[cf.Rule("blocks/*")])
    assert list(plan.ranks) == ["stage/conv", "blocks/fc", "stage/fc"]


def test_a_profile_of_another_model_is_refused():
    profile = profile_of(network(dense("other/fc", 9, 9)), {"other": 2.0})
    with pytest.raises(ValueError, match="profile is of another model: this one has no kernel 'other/fc'"):
        cf.make_plan(NETWORK, ONES, profile=profile)


def test_a_plan_that_a_profile_keeps_whole_is_that_of_no_layer():
    slow = profile_of(NETWORK, {"stage": 0.5, "blocks": 0.25})
    plan = cf.make_plan(NETWORK, ONES, profile=slow)
    assert plan.ranks == {} and plan.num_params == plan.num_params_full
    assert dataclasses.replace(plan) == plan and hash(plan) == hash(dataclasses.replace(plan))
