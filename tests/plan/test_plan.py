"""Which layers a plan factorizes, at what ranks, and what it says about it."""

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linen_zoo import prepared

import cuttlefish_jax as cf
from cuttlefish_jax.kernels import Kernel, Kernels


def dense(path, m, n, stack=()):
    axes, k = tuple(range(len(stack))), len(stack)
    axes = dict(stack_axes=axes, reduction_axes=(k,), output_axes=(k + 1,))
    return Kernel(path=path, layer="Dense", shape=(*stack, m, n), **axes)


def conv(path, window, m, n):
    axes = dict(reduction_axes=tuple(range(len(window) + 1)), output_axes=(len(window) + 1,))
    return Kernel(path=path, layer="Conv", shape=(*window, m, n), **axes)


def network(*entries, skipped=()):
    """Kernels between a stem and a head, which the defaults keep."""
    entries = (dense("stem", 16, 16), *entries, dense("head", 16, 16))
    return Kernels(entries, skipped, sum(kernel.num_params() for kernel in entries))


def single_rank(kernel, now, before=None, **options):
    """The rank that a layer gets, or would get if it were not kept because of it."""
    kernels = network(kernel)
    before = None if before is None else dict.fromkeys(kernels, before)
    plan = cf.make_plan(kernels, dict.fromkeys(kernels, now), before, **options)
    if kernel.path in plan.ranks:
        return plan.ranks[kernel.path]
    return int(re.match(r"rank (\d+) of \d+ would not make it smaller$", plan.kept[kernel.path])[1])


NETWORK = network(
    conv("stage/conv", (3, 3), 8, 24),
    conv("stage/shortcut", (1, 1), 8, 24),
    dense("blocks/fc", 12, 10, stack=(3,)),
    dense("stage/fc", 40, 24),
    skipped=(("embed", "Embed is not a type that can be factorized"),),
)
ONES = dict.fromkeys(NETWORK, 1.0)


# --- Ranks --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("now", "rank"), [(1e-9, 1), (40.0, 64), (1e9, 64)])
def test_ranks_are_between_one_and_the_full_rank(now, rank):
    assert single_rank(dense("fc", 64, 64), now, 20.0) == rank


def test_round_to_rounds_up_and_not_above_the_full_rank():
    kernel, ranks = dense("fc", 60, 200), [1, 8, 9, 40, 57]
    rounded = [single_rank(kernel, rank, 60.0, round_to=8) for rank in ranks]
    assert rounded == [8, 8, 16, 40, 60]


def test_min_rank_ratio_is_a_floor():
    kernel = dense("fc", 60, 200)
    assert [single_rank(kernel, rank, 60.0, min_rank_ratio=0.2) for rank in (1, 12, 13)] == [12, 12, 13]
    assert single_rank(kernel, 1, 60.0, min_rank_ratio=0.21) == 13
    assert single_rank(kernel, 1, 60.0, min_rank_ratio=0.2, round_to=5) == 15


def test_stacked_layers_share_their_largest_rank():
    # Scaled each by its own initialisation: 10 * 1 / 5, 10 * 2 / 5, 10 * 2 / 4.
    ranks_t, ranks_0 = {**ONES, "blocks/fc": [1, 2, 2]}, {**ONES, "blocks/fc": [5, 5, 4]}
    assert cf.make_plan(NETWORK, ranks_t, ranks_0).ranks["blocks/fc"] == 5
    ranks_0["blocks/fc"] = [5, 5, 0]  # a copy that was initialised to zeros has the Gaussian scale, 3.66
    assert cf.make_plan(NETWORK, {**ranks_t, "blocks/fc": [1, 2, 1]}, ranks_0).ranks["blocks/fc"] == 4
    assert cf.make_plan(NETWORK, ranks_t, {**ranks_0, "blocks/fc": 6}).ranks["blocks/fc"] == 4  # 20 / 6


def test_stable_ranks_of_a_trained_stack_are_taken_as_they_come():
    _, _, variables, kernels = prepared("scan")
    ranks = cf.stable_ranks(variables["params"], kernels)
    path = "blocks/Block_0/up"
    assert ranks[path].shape == (3,)
    plan = cf.make_plan(kernels, {**ranks, path: ranks[path] / 3}, ranks)
    assert plan.ranks[path] == 2  # a third of 6
    assert plan.kept["blocks/Block_0/down"] == "rank 6 of 6 would not make it smaller"


# --- Which layers -------------------------------------------------------------------------------------------


def test_first_last_and_shortcuts_are_kept_with_the_reason():
    plan = cf.make_plan(NETWORK, ONES)
    assert list(plan.ranks) == ["stage/conv", "blocks/fc", "stage/fc"]
    default = {"stem": "first layer", "stage/shortcut": "shortcut", "head": "last layer"}
    assert plan.kept == default | {"embed": "Embed is not a type that can be factorized"}


@pytest.mark.parametrize(
    ("kernel", "kept"),
    [
        (conv("a/downsample", (1, 1), 8, 16), True),
        (conv("a/conv_proj", (1,), 8, 16), True),
        (conv("a/skip_0", (1, 1, 1), 8, 16), True),
        (conv("a/downsample", (3, 3), 8, 16), False),  # no 1x1
        (conv("skip/conv", (1, 1), 8, 16), False),  # the name of its block
        (conv("a/conv", (1, 1), 8, 16), False),
        (dense("a/proj", 8, 16), False),  # no convolution
    ],
)
def test_a_shortcut_is_a_pointwise_convolution_by_its_name(kernel, kept):
    kernels = network(kernel)
    plan = cf.make_plan(kernels, dict.fromkeys(kernels, 1.0))
    assert plan.kept.get(kernel.path) == ("shortcut" if kept else None)


@pytest.mark.parametrize(("m", "n", "last_smaller"), [(24, 24, 11), (30, 15, 9), (8, 100, 7)])
def test_layers_at_break_even_and_above_are_kept(m, n, last_smaller):
    kernel = dense("fc", m, n)
    kernels = network(kernel)
    for rank in range(1, kernel.max_rank + 1):
        plan = cf.make_plan(kernels, dict.fromkeys(kernels, 1.0), rules=[cf.Rule("fc", rank=rank)])
        smaller = rank * (m + n) < m * n
        assert smaller == (rank <= last_smaller)
        assert plan.ranks == ({"fc": rank} if smaller else {})
        if not smaller:
            assert plan.kept["fc"] == f"rank {rank} of {kernel.max_rank} would not make it smaller"


def test_extra_batch_norms_count_at_break_even():
    kernels = network(dense("fc", 16, 8))  # 128 = 5 * (16 + 8) + 8
    ranks = dict.fromkeys(kernels, 1.0)
    rules = [cf.Rule("fc", rank=5)]
    assert cf.make_plan(kernels, ranks, rules=rules).ranks == {"fc": 5}
    plan = cf.make_plan(kernels, ranks, rules=rules, extra_batch_norm=True)
    assert plan.kept["fc"] == "rank 5 of 8 would not make it smaller"


# --- Zeros --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank_rule", [cf.ScaledStableRank(), cf.StableRank(), cf.RankRatio()])
def test_a_kernel_of_zeros_is_kept(rank_rule):
    ranks = {**ONES, "stage/fc": 0.0, "blocks/fc": [1.0, 0.0, 0.0]}
    plan = cf.make_plan(NETWORK, ranks, rank_rule=rank_rule, min_rank_ratio=0.1)
    assert list(plan.ranks) == ["stage/conv"]
    assert plan.kept["stage/fc"] == "its kernel is zero"
    assert plan.kept["blocks/fc"] == "its kernel is zero in 2 of 3 copies"
    # At the initialisation it may be zero.
    assert "stage/fc" in cf.make_plan(NETWORK, ONES, ranks, rank_rule=rank_rule).ranks
    rules = [cf.Rule("blocks/*", rank_ratio=0.3), cf.Rule("stage/fc", rank=2), cf.Rule("stage/conv")]
    plan = cf.make_plan(NETWORK, {**ranks, "stage/conv": 0.0}, rank_rule=rank_rule, rules=rules)
    assert plan.ranks == {"blocks/fc": 3, "stage/fc": 2}  # only who asks for a rank gets it
    assert plan.kept["stage/conv"] == "its kernel is zero"


def test_factors_of_zeros_hardly_train():
    # Why kernels of zeros are kept: the gradient of either factor is a product with the other.
    plan = cf.FactorizationPlan.from_ranks(Kernels((dense("fc", 4, 5),)), {"fc": 2})
    params = cf.factorize_params({"fc": {"kernel": jnp.zeros((4, 5))}}, plan)

    def loss(params):
        return jnp.sum((params["fc"]["u"]["kernel"] @ params["fc"]["v"]["kernel"] - 1) ** 2)

    assert all(np.all(np.abs(leaf) < 1e-6) for leaf in jax.tree.leaves(jax.grad(loss)(params)))


# --- Rules --------------------------------------------------------------------------------------------------


def test_the_first_rule_that_matches_decides():
    rules = [cf.Rule("stage/fc", rank=3), cf.Rule("stage/*", keep=True), cf.Rule("*", rank=2)]
    plan = cf.make_plan(NETWORK, ONES, rules=rules)
    assert plan.ranks == {"stem": 2, "blocks/fc": 2, "stage/fc": 3, "head": 2}
    assert plan.kept_entries == (("stage/conv", "rule 'stage/*'"), ("stage/shortcut", "rule 'stage/*'"))
    assert cf.make_plan(NETWORK, ONES, rules=rules[::-1]).ranks == dict.fromkeys(NETWORK, 2)


def test_rules_come_before_the_defaults():
    plan = cf.make_plan(NETWORK, ONES, rules=[cf.Rule("head"), cf.Rule("stage/shortcut", rank_ratio=0.5)])
    assert plan.ranks["head"] == 4  # the Gaussian scale of a square matrix
    assert plan.ranks["stage/shortcut"] == 4
    assert plan.kept["stem"] == "first layer"


def test_a_fixed_rank_is_taken_as_it_is_and_needs_no_stable_rank():
    ranks = {path: 1.0 for path in NETWORK if path != "stage/fc"}
    rules = [cf.Rule("stage/fc", rank=7)]
    plan = cf.make_plan(NETWORK, ranks, rules=rules, round_to=4, min_rank_ratio=0.5)
    assert (plan.ranks["stage/fc"], plan.ranks["stage/conv"]) == (7, 12)


@pytest.mark.parametrize(("ratio", "rank"), [(1 / 4, 6), (0.45, 10), (0.29, 6), (0.001, 1), (1 / 3, 8)])
def test_a_rank_ratio_is_rounded_down(ratio, rank):
    assert single_rank(dense("fc", 40, 24), 1.0, rules=[cf.Rule("fc", rank_ratio=ratio)]) == rank
    assert 0.29 * 100 < 29  # a whole number of ranks but for rounding is that number
    assert single_rank(dense("fc", 100, 400), 1.0, rules=[cf.Rule("fc", rank_ratio=0.29)]) == 29


def test_a_rule_has_its_own_floor():
    rules = [cf.Rule("stage/fc", min_rank_ratio=0.25)]
    plan = cf.make_plan(NETWORK, ONES, rules=rules, min_rank_ratio=0.5)
    assert (plan.ranks["stage/fc"], plan.ranks["stage/conv"]) == (6, 12)


def test_a_rule_that_matches_nothing_is_an_error_with_near_names():
    with pytest.raises(ValueError, match=r"^rule 'stage9/fc' matches no layer; near it: stage/fc, "):
        cf.make_plan(NETWORK, ONES, rules=[cf.Rule("stage9/fc")])


def test_a_rule_that_matches_only_skipped_layers_says_why():
    message = r"^rule 'emb\*' matches only layers that cannot be factorized: embed: Embed is not a type"
    with pytest.raises(ValueError, match=message):
        cf.make_plan(NETWORK, ONES, rules=[cf.Rule("emb*")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(keep=True, rank=2), "rule 'x': give one of keep, rank and rank_ratio"),
        (dict(rank=2, rank_ratio=0.5), "rule 'x': give one of keep, rank and rank_ratio"),
        (dict(rank_ratio=0.0), r"rule 'x': rank_ratio 0.0 is not in \(0, 1\]"),
        (dict(min_rank_ratio=math.nan), r"rule 'x': min_rank_ratio nan is not in \(0, 1\]"),
    ],
)
def test_a_rule_that_contradicts_itself_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        cf.Rule("x", **options)


# --- Errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "rank 0 for 'stage/fc' is below 1"),
        (-3, "rank -3 for 'stage/fc' is below 1"),
        (25, r"rank 25 for 'stage/fc' exceeds min\(m, n\) = 24"),
        (True, "rank True for 'stage/fc' is not an integer"),
        (3.0, r"rank 3\.0 for 'stage/fc' is not an integer"),
        ("3", "rank '3' for 'stage/fc' is not an integer"),
    ],
)
def test_ranks_out_of_bounds_are_refused(rank, message):
    with pytest.raises(ValueError, match=message):
        cf.FactorizationPlan.from_ranks(NETWORK, {"stage/fc": rank})
    with pytest.raises(ValueError, match=message):
        cf.make_plan(NETWORK, ONES, rules=[cf.Rule("stage/fc", rank=rank)])


def test_from_ranks_keeps_all_other_layers():
    plan = cf.FactorizationPlan.from_ranks(NETWORK, {"head": np.int64(16), "stage/conv": 2})
    assert plan.ranks == {"stage/conv": 2, "head": 16}  # in call order
    assert {type(rank) for rank in plan.ranks.values()} == {int}
    others = ("stem", "stage/shortcut", "blocks/fc", "stage/fc")
    assert plan.kept == dict.fromkeys(others, "no rank given") | NETWORK.skipped


def test_from_ranks_names_what_is_near_an_unknown_path():
    with pytest.raises(ValueError, match=r"^path 'stage/conf' matches no layer; near it: stage/conv, "):
        cf.FactorizationPlan.from_ranks(NETWORK, {"stage/conf": 2})
    with pytest.raises(ValueError, match=r"^path 'head' matches no layer; near it: \(root\)$"):
        cf.FactorizationPlan.from_ranks(Kernels((dense("", 4, 4),)), {"head": 2})
    with pytest.raises(ValueError, match=r"^path 'head' matches no layer; the model has no kernels$"):
        cf.FactorizationPlan.from_ranks(Kernels(()), {"head": 2})


def test_every_layer_is_either_factorized_or_kept():
    for kept, what in (((), "neither factorized nor kept"), ((("stem", ""),), "both factorized and kept")):
        ranks = (("stem", 2), ("head", 2)) if kept else (("head", 2),)
        with pytest.raises(ValueError, match=rf"^'stem' is {what}$"):
            cf.FactorizationPlan(kernels=network(), rank_entries=ranks, kept_entries=kept)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "the stable rank of 'blocks/fc' is nan, expected a finite number >= 0"),
        ([1.0, math.inf, 1.0], "the stable rank of 'blocks/fc' is inf, expected a finite number >= 0"),
        (-1.0, "the stable rank of 'blocks/fc' is -1.0, expected a finite number >= 0"),
        ([1.0, 2.0], r"the stable rank of 'blocks/fc' has shape \(2,\), expected \(3,\)"),
        (np.ones((3, 1)), r"the stable rank of 'blocks/fc' has shape \(3, 1\), expected \(3,\)"),
    ],
)
def test_stable_ranks_that_are_none_are_refused(value, message):
    for ranks in (({**ONES, "blocks/fc": value}, ONES), (ONES, {**ONES, "blocks/fc": value})):
        with pytest.raises(ValueError, match=message):
            cf.make_plan(NETWORK, *ranks)


def test_a_missing_stable_rank_is_refused():
    missing = {path: 1.0 for path in NETWORK if path != "stage/fc"}
    for ranks in ((missing, ONES), (ONES, missing)):
        with pytest.raises(ValueError, match="there is no stable rank for 'stage/fc'"):
            cf.make_plan(NETWORK, *ranks)


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="round_to 0 is below 1"):
        cf.make_plan(NETWORK, ONES, round_to=0)
    for ratio in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=rf"min_rank_ratio {ratio} is not in \[0, 1\]"):
            cf.make_plan(NETWORK, ONES, min_rank_ratio=ratio)


# --- Sizes and report ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra_batch_norm", [False, True])
@pytest.mark.parametrize("name", ["trained", "tokens", "vmap_scan", "scan_shared", "refused", "general"])
def test_num_params_is_that_of_the_factorized_model(name, extra_batch_norm):
    _, _, variables, kernels = prepared(name)
    ranks = {path: 1 for path, kernel in kernels.items() if kernel.max_rank > 1}
    plan = cf.FactorizationPlan.from_ranks(kernels, ranks, extra_batch_norm=extra_batch_norm)
    low = jax.eval_shape(lambda: cf.factorize_params(variables["params"], plan))
    assert plan.num_params_full == sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert plan.num_params == sum(leaf.size for leaf in jax.tree.leaves(low))


def test_flops_of_the_plan_are_those_of_the_factorized_model():
    model, x = nn.Sequential([nn.Conv(8, (3, 3)), nn.Conv(12, (3, 3)), nn.Dense(6)]), jnp.ones((2, 6, 5, 3))
    kernels = cf.find_kernels(model, x)
    plan = cf.FactorizationPlan.from_ranks(kernels, {"layers_1": 3, "layers_2": 2})
    for module, ranks in ((model, {}), (cf.factorize(model, plan), plan.ranks)):
        variables = jax.eval_shape(lambda module=module: module.init(jax.random.key(0), x))
        measured = cf.count_flops(module.apply, variables, x) / x.shape[0]
        assert sum(kernel.flops(ranks.get(path)) for path, kernel in kernels.items()) == measured


def test_the_report_names_every_layer_and_its_totals_are_right():
    plan = cf.make_plan(NETWORK, ONES, rules=[cf.Rule("stage/fc", rank=7), cf.Rule("blocks/*")])
    report = plan.report()
    lines = {line.split()[0]: line.split() for line in report.splitlines() if line}
    assert lines["layer"][:6] == ["layer", "kernel", "rank", "of", "full", "factors"]
    assert lines["stage/fc"] == ["stage/fc", "40x24", "7", "24", "960", "448", "rule", "'stage/fc'"]
    both = ["rule", "'blocks/*',", "ScaledStableRank"]
    assert lines["blocks/fc"] == ["blocks/fc", "3x12x10", "4", "10", "360", "264", *both]
    assert lines["stage/conv"] == ["stage/conv", "3x3x8x24", "3", "24", "1,728", "288", "ScaledStableRank"]
    assert lines["stage/shortcut"] == ["stage/shortcut", "1x1x8x24", "-", "8", "192", "shortcut"]
    assert lines["stem"] == ["stem", "16x16", "-", "16", "256", "first", "layer"]
    assert lines["embed"][:2] == ["embed", "-"]
    assert report.splitlines()[-3:] == [
        "3 of 6 kernels are factorized",
        "parameters of the model: 3,752 -> 1,704 (2.20x fewer)",
        "forward FLOPs of the kernels, per example: 7,504 -> 3,408 (2.20x fewer)",
    ]


def test_the_report_of_a_plan_that_changes_nothing_or_grows_the_model():
    kernels = Kernels((dense("", 4, 4),), num_params=20)
    report = cf.FactorizationPlan.from_ranks(kernels, {}).report()
    assert "(root)  4x4" in report
    assert "0 of 1 kernels are factorized\nparameters of the model: 20, unchanged" in report
    grown = cf.FactorizationPlan.from_ranks(kernels, {"": 4}).report()
    assert "parameters of the model: 20 -> 36 (1.80x more)" in grown


# --- Properties ---------------------------------------------------------------------------------------------

sizes, stable_rank = st.integers(1, 300), st.floats(1e-6, 400)


@settings(max_examples=200, deadline=None)
@given(sizes, sizes, stable_rank, stable_rank, st.floats(0.5, 400), st.integers(1, 64), st.floats(0, 1))
def test_ranks_are_in_bounds_and_monotone_in_the_stable_rank(m, n, one, other, initial, round_to, floor):
    kernel = dense("fc", m, n)
    for before in (None, initial):
        options = dict(round_to=round_to, min_rank_ratio=floor)
        low, high = (single_rank(kernel, now, before, **options) for now in sorted([one, other]))
        assert 1 <= low <= high <= min(m, n)
        assert low >= floor * min(m, n) * (1 - 1e-5)
        assert low % round_to == 0 or low == min(m, n)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*map(st.integers, (1, 1, 1), (40, 40, 3))), min_size=1, max_size=6), st.data())
def test_a_plan_never_makes_a_model_larger(shapes, data):
    kernels = network(*(dense(f"fc{i}", m, n, stack=(k,)) for i, (m, n, k) in enumerate(shapes)))
    ranks = {path: data.draw(st.floats(0, 40), label=path) for path in kernels}
    options = dict(round_to=data.draw(st.integers(1, 8)), extra_batch_norm=data.draw(st.booleans()))
    plan = cf.make_plan(kernels, ranks, rules=[cf.Rule("*")], **options)
    assert plan.num_params < plan.num_params_full or not plan.ranks
    assert plan.ranks.keys() | plan.kept.keys() == set(kernels)
    assert not plan.ranks.keys() & plan.kept.keys()
    for path, rank in plan.ranks.items():
        u, v = kernels[path].factors(rank)
        assert u.num_params() + v.num_params() == kernels[path].num_params(rank) < kernels[path].num_params()
