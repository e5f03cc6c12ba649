"""Methods as combinations of a criterion, a rank rule and a regulariser; and the settings they refuse."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cuttlefish_jax as cf
from cuttlefish_jax.errors import ConfigError
from cuttlefish_jax.models import create_model
from cuttlefish_jax.training.check import check_config
from cuttlefish_jax.training.config import default_config
from cuttlefish_jax.training.method import (
    METHODS,
    deadline,
    make_method,
    make_tracker,
    needs_singular_values,
    plan_from_config,
    rank_tolerance,
)


def make_config(**settings):
    config = default_config()
    config.update_from_flattened_dict(
        {
            "epochs": 30,
            "optimizer.frobenius_decay": 3e-4,
            "plan.keep": ("stem_conv",),
            "pufferfish.keep": ("stage1/*",),
            "si_fd.keep": ("classifier",),
        }
        | settings
    )
    check_config(config)
    return config


# Criterion, rank rule, layers kept, Frobenius decay, preconditioned factors; whether the profile and the
# stable ranks have a say.
EXPECTED = {
    "cuttlefish": (cf.RelativePlateau(), cf.ScaledStableRank(), ("stem_conv",), 3e-4, True, True, True),
    "full_rank": (cf.Never(), cf.ScaledStableRank(), ("stem_conv",), 3e-4, True, True, False),
    "vanilla_stable_rank": (cf.RelativePlateau(), cf.StableRank(), ("stem_conv",), 3e-4, True, True, True),
    "accumulative_rank": (
        cf.RelativePlateau(),
        cf.AccumulativeRank(0.8),
        ("stem_conv",),
        3e-4,
        True,
        True,
        True,
    ),
    "energy": (cf.RelativePlateau(), cf.EnergyRank(0.9), ("stem_conv",), 3e-4, True, True, True),
    # 80 of 300 epochs.
    "pufferfish": (cf.AtEpoch(8), cf.RankRatio(0.25), ("stage1/*",), 3e-4, False, False, False),
    "si_fd": (cf.AtEpoch(0), cf.RankRatio(0.08), ("classifier",), 1e-4, False, False, False),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_its_parts(name):
    method = make_method(make_config(method=name))
    parts = (method.criterion, method.rank_rule, method.keep, method.frobenius_decay, method.precondition)
    assert (*parts, method.uses_profile, method.awaits_ranks) == EXPECTED[name]


@pytest.mark.parametrize(
    ("settings", "criterion"),
    [
        ({"switch.criterion": "reference_cifar"}, cf.ReferencePlateau.cifar()),
        ({"switch.criterion": "reference_resnet50"}, cf.ReferencePlateau.resnet50()),
        ({"switch.criterion": "reference_deit"}, cf.ReferencePlateau.deit()),
        ({"switch.criterion": "at_epoch", "switch.epoch": 7}, cf.AtEpoch(7)),
        ({"method": "pufferfish", "pufferfish.switch_share": 0.5}, cf.AtEpoch(15)),
        ({"method": "full_rank", "switch.criterion": "at_epoch"}, cf.Never()),
    ],
)
def test_the_tracker_has_the_methods_criterion(settings, criterion):
    assert make_tracker(make_config(**settings)).criterion == criterion
    # The original's criteria stand for its results: their ranks are those of the day.
    assert (rank_tolerance(make_config(**settings)) == 0) == isinstance(criterion, cf.ReferencePlateau)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"plan.rank_rule": "rank_ratio", "plan.rank_ratio": 0.45}, cf.RankRatio(0.45)),
        (
            {"plan.rank_rule": "scaled_stable_rank+accumulative_rank"},
            cf.LargestOf((cf.ScaledStableRank(), cf.AccumulativeRank())),
        ),
        (
            {"plan.rank_rule": "energy+rank_ratio+vanilla_stable_rank"},
            cf.LargestOf((cf.EnergyRank(), cf.RankRatio(0.25), cf.StableRank())),
        ),
        ({"method": "energy", "plan.rank_rule": "rank_ratio"}, cf.EnergyRank()),
        ({"method": "pufferfish", "pufferfish.rank_ratio": 0.5}, cf.RankRatio(0.5)),
    ],
)
def test_the_rank_rule_is_the_settings_or_the_methods(settings, rule):
    assert make_method(make_config(**settings)).rank_rule == rule


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # 0.7 of 3 epochs is after the last chance: the third is the last one.
        ({"epochs": 3}, 2),
        ({"epochs": 1}, 1),
        ({"epochs": 300}, 210),
        ({"epochs": 11, "switch.deadline": 0.5}, 6),
        ({"switch.criterion": "at_epoch"}, None),
        ({"method": "full_rank"}, None),
        ({"method": "pufferfish"}, None),
        ({"method": "energy", "epochs": 10}, 7),
    ],
)
def test_the_deadline_is_of_ranks_that_are_awaited(settings, expected):
    assert deadline(make_config(**settings)) == expected


def small_kernels():
    model = create_model("resnet18", num_classes=10, width=16, stage_sizes=(1, 1))
    return cf.find_kernels(model, jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32), train=False)


def make_plan(now=0.2, initial=0.4, **settings):
    """The plan where every stable rank is the given share of the full one."""
    kernels = small_kernels()
    shares = ({path: share * kernel.max_rank for path, kernel in kernels.items()} for share in (now, initial))
    return plan_from_config(make_config(**{"plan.keep": ()} | settings), kernels, *shares)


def test_frozen_layers_and_patterns_are_kept():
    plan = make_plan(**{"optimizer.freeze": ("stage1/*",), "plan.keep": ("stage2/block1/conv1",)})
    assert list(plan.ranks) == ["stage2/block1/conv2"]
    assert plan.kept["stage1/block1/conv1"] == "rule 'stage1/*'"
    assert plan.kept["stage2/block1/conv1"] == "rule 'stage2/block1/conv1'"


def test_frozen_parameters_without_a_kernel_are_no_business_of_the_plan():
    # optimizer.freeze is checked against all layers elsewhere; a norm has no kernel to keep.
    assert make_plan(**{"optimizer.freeze": ("stem_norm",)}) == make_plan()


def test_layers_that_the_defaults_keep_can_be_factorized():
    assert "stage2/block1/shortcut_conv" in make_plan().kept
    plan = make_plan(**{"plan.factorize": ("*/shortcut_conv",), "plan.rank_rule": "rank_ratio"})
    assert plan.ranks["stage2/block1/shortcut_conv"] == 4


def test_stable_ranks_are_scaled_by_those_at_initialisation():
    kernels = small_kernels()
    for path, rank in make_plan(now=0.2, initial=0.5).ranks.items():
        assert rank == int(np.ceil(0.4 * kernels[path].max_rank))


def test_pretrained_weights_are_scaled_by_random_ones():
    """By the closed form: that they had little rank when the run began is not their initialisation."""
    plan = make_plan(now=0.1, initial=0.1, **{"model.pretrained": "weights.safetensors"})
    kernels = small_kernels()
    assert plan.ranks
    for path, rank in plan.ranks.items():
        m, n = kernels[path].m, kernels[path].n
        scale = (1 + np.sqrt(min(m, n) / max(m, n))) ** 2
        assert rank == int(np.ceil(scale * 0.1 * min(m, n)))
    # Without that, the ranks would be full, and nothing smaller.
    assert not make_plan(now=0.1, initial=0.1).ranks


def test_a_budget_lowers_the_ranks():
    kernels = small_kernels()
    sigmas = {path: np.linspace(1, 0.1, kernel.max_rank) for path, kernel in kernels.items()}
    shares = ({path: share * kernel.max_rank for path, kernel in kernels.items()} for share in (0.4, 0.4))
    config = make_config(**{"plan.keep": (), "plan.budget": "parameters:0.5"})
    assert needs_singular_values(config) and not needs_singular_values(make_config())
    plan = plan_from_config(config, kernels, *shares, singular_values=sigmas)
    assert plan.budget.budget == cf.Parameters(0.5) and plan.budget.asked == 1
    assert 0.45 < plan.num_params / plan.num_params_full <= 0.5
    config = make_config(**{"plan.keep": (), "plan.budget": "parameters:0.01"})
    ones = dict.fromkeys(kernels, 1.0)
    with pytest.raises(ConfigError, match=r"^config\.plan: budget Parameters\(share=0\.01\) cannot be met: "):
        plan_from_config(config, kernels, ones, ones, singular_values=sigmas)
    with pytest.raises(ConfigError, match=r"^config\.plan\.budget: 'third' is not a budget such as 'param"):
        check_config(make_config(**{"plan.budget": "third"}))
    check_config(make_config(**{"plan.budget": "time:0.5", "profile.enabled": True}))
    with pytest.raises(ConfigError, match=r"'time:0.5' needs measured times: set config.profile.enabled="):
        check_config(make_config(**{"plan.budget": "time:0.5", "profile.enabled": False}))


def test_a_pattern_that_matches_nothing_is_a_one_line_error():
    with pytest.raises(ConfigError, match=r"^config\.plan: rule 'stage9/\*' matches no layer; near it: "):
        make_plan(**{"plan.keep": ("stage9/*",)})


NAN = float("nan")


@pytest.mark.parametrize(
    ("key", "values", "rule"),
    [
        ("method", ["cutlefish", ""], "one of cuttlefish, full_rank, pufferfish, si_fd, vanilla_stable_rank"),
        ("switch.criterion", ["plateau"], "one of relative_plateau, reference_cifar"),
        ("switch.if_never", ["fail"], "one of full_rank, switch"),
        ("switch.optimizer", ["keep"], "one of carry, reset"),
        ("switch.learning_rate", ["warm"], "one of continue, rewarmup, restart"),
        ("ranks.method", ["svd"], "one of warm, lanczos, exact"),
        ("data.interpolation", ["nearest"], "one of bilinear, bicubic"),
        (
            "plan.rank_rule",
            ["foo", "energy+", "energy+foo", ""],
            r"one of scaled_stable_rank, .* joined by \+",
        ),
        ("model.stage_sizes", [("1", "x"), (1.5,)], "a tuple of integers, e.g."),
        ("data.lengths", [("8",)], "a tuple of integers, e.g."),
        ("schedule.milestones", [("a",)], "a tuple of numbers, e.g."),
        ("plan.keep", [(1,)], "a tuple of patterns, e.g."),
        ("optimizer.freeze", [(None,)], "a tuple of patterns, e.g."),
        ("epochs", [0, -1], "1 or more"),
        ("batch_size", [0], "1 or more"),
        ("optimizer.accumulation_steps", [0], "1 or more"),
        ("data.repeated_augmentation", [0], "1 or more"),
        ("data.max_length", [0], "1 or more"),
        ("plan.round_to", [0], "1 or more"),
        ("checkpoint.keep", [0], "1 or more"),
        ("checkpoint.every_epochs", [0], "1 or more"),
        ("evaluation.every_epochs", [0], "1 or more"),
        ("switch.epoch", [-1], "0 or more"),
        ("profile.min_speedup", [-0.5, NAN], "0 or more"),
        ("seed", [-1, 2**32, 2**64], r"from 0 to 2\*\*32 - 1"),
        ("data.workers", [-1], "0 or more"),
        ("data.train_examples", [-1], "0 or more"),
        ("data.validation_examples", [-4], "0 or more"),
        ("data.crop_padding", [-1], "0 or more"),
        ("data.color_jitter", [-0.4, NAN], "0 or more"),
        ("data.mixup", [-0.1, NAN], "0 or more"),
        ("data.cutmix", [-0.1, float("inf")], "0 or more"),
        ("switch.deadline", [0.0, 1.1, NAN], r"in \(0, 1\]"),
        ("plan.rank_ratio", [0.0, 1.1], r"in \(0, 1\]"),
        ("profile.ratio", [0.0, 2.0], r"in \(0, 1\]"),
        ("pufferfish.rank_ratio", [0.0, 1.5], r"in \(0, 1\]"),
        ("si_fd.rank_ratio", [0.0, 1.5], r"in \(0, 1\]"),
        ("data.random_erasing", [-0.1, 1.1], r"in \[0, 1\]"),
        ("optimizer.ema", [-0.1, 1.0], r"in \[0, 1\)"),
        ("pufferfish.switch_share", [-0.1, 1.0], r"in \[0, 1\)"),
        ("model.drop_path", [-0.1, 1.0], r"in \[0, 1\)"),
        ("switch.learning_rate_factor", [0.0, -1.0, NAN], "above 0"),
        ("switch.recalibration_batches", [-1], "0 or more"),
    ],
)
def test_settings_that_make_no_sense_are_one_line_errors(key, values, rule):
    for value in values:
        with pytest.raises(
            ConfigError, match=rf"^config\.{key} = {re.escape(repr(value))}: it must be {rule}"
        ) as error:
            make_config(**{key: value})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [{"optimizer.frobenius_decay": 1e-4}, {"method": "si_fd"}],
)
def test_a_norm_between_the_factors_and_what_looks_at_their_product_exclude_each_other(settings):
    settings_of_norms = {"plan.extra_batch_norm": True, "optimizer.frobenius_decay": 0.0}
    assert make_method(make_config()).precondition
    assert not make_method(make_config(**settings_of_norms)).precondition
    with pytest.raises(ConfigError, match="exclude each other: set one of them to False"):
        make_config(**settings_of_norms | settings)
