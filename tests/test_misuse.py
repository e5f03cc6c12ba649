"""What people give by mistake: one line that says what is wrong, and what to give instead."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import cuttlefish_jax as cf

X = jnp.ones((2, 8))
MODEL = nn.Sequential([nn.Dense(8), nn.Dense(8), nn.Dense(8)])
KERNELS = cf.find_kernels(MODEL, X)
RANKS = {"layers_1": 2}
PLAN = cf.FactorizationPlan.from_ranks(KERNELS, RANKS)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0), X)["params"]


def one_line(error):
    return len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("rules", ["a", [("a", 3)], cf.Rule("layers_0"), {"layers_0": 3}, 3, ["layers_0"]])
def test_rules_that_are_no_list_of_rules(rules):
    with pytest.raises(ValueError, match=r"are no list of rules: give \[cf\.Rule\(pattern") as error:
        cf.make_plan(KERNELS, dict.fromkeys(KERNELS, 2.0), rules=rules)
    assert one_line(error)
    rules = (cf.Rule("layers_0", rank=2), cf.Rule("layers_1", keep=True))
    assert cf.make_plan(KERNELS, dict.fromkeys(KERNELS, 2.0), rules=rules).ranks == {"layers_0": 2}


def test_a_plan_of_no_kernels():
    with pytest.raises(ValueError, match="needs what find_kernels returned first, got dict") as error:
        cf.make_plan(dict.fromkeys(KERNELS, 2.0), KERNELS)  # pyright: ignore
    assert one_line(error)


def test_ranks_in_the_place_of_a_plan(params):
    layers = nnx.Sequential(*(nnx.Linear(8, 8, rngs=nnx.Rngs(0)) for _ in range(3)))
    low = cf.factorize_params(params, PLAN)
    for use in (
        lambda: cf.factorize(MODEL, RANKS),
        lambda: cf.factorize(layers, {"layers/1": 2}),
        lambda: cf.factorize_params(params, RANKS),
        lambda: cf.factorize_params(layers, {"layers/1": 2}),
        lambda: cf.merge_params(low, RANKS),
        lambda: cf.frobenius_decay(1e-4, RANKS),
        lambda: cf.precondition_factors(RANKS),
    ):
        with pytest.raises(ValueError, match=r"^dict is no FactorizationPlan: .*from_ranks") as error:
            use()
        assert one_line(error)


def test_a_class_in_the_place_of_a_criterion():
    with pytest.raises(ValueError, match=r"is a class, RelativePlateau: give RelativePlateau\(\)$"):
        cf.RankTracker(cf.RelativePlateau)
    assert isinstance(cf.RankTracker(cf.RelativePlateau()).criterion, cf.RelativePlateau)


def test_a_switch_of_what_is_no_state(params):
    tx = optax.sgd(0.1)
    for state, message in (
        ({"params": params}, "got dict: it has no params"),
        (MODEL, "got Sequential: it has no params"),
        (tx.init(params), r"needs \(model, nnx.Optimizer\)"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            cf.switch(state, PLAN, tx)
        assert one_line(error)


def test_calibration_of_params_without_their_name(params):
    with pytest.raises(
        ValueError, match=r"variables, \{'params': params, \.\.\.\}, got \['layers_0'"
    ) as error:
        cf.calibrate(MODEL, KERNELS, params, X)
    assert one_line(error)
    assert set(cf.calibrate(MODEL, KERNELS, {"params": params}, X)) == set(KERNELS)
