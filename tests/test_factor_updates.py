"""Preconditioned factors and Frobenius decay in optimizers that change some of the layers alone."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import cuttlefish_jax as cf

X = jnp.ones((2, 6))
MODEL = nn.Sequential([nn.Dense(6), nn.Dense(6), nn.Dense(6)])
RNG = np.random.default_rng(0)
PLAN = cf.FactorizationPlan.from_ranks(cf.find_kernels(MODEL, X), {"layers_0": 2, "layers_1": 3})
PARAMS = cf.factorize_params(MODEL.init(jax.random.key(0), X)["params"], PLAN)
GRADIENTS = jax.tree.map(lambda leaf: jnp.asarray(RNG.standard_normal(leaf.shape), jnp.float32), PARAMS)
CHANGES = {
    "frobenius_decay": lambda: cf.frobenius_decay(0.3, PLAN),
    "precondition_factors": lambda: cf.precondition_factors(PLAN),
}
BY_LAYER = {"layers_0": True, "layers_1": False, "layers_2": True}  # a prefix of the params
BY_PARAM = {layer: jax.tree.map(lambda _: BY_LAYER[layer], PARAMS[layer]) for layer in PARAMS}  # noqa: B023


def updated(tx, gradients=GRADIENTS, params=PARAMS):
    return jax.jit(lambda *args: tx.update(args[0], tx.init(args[1]), args[1])[0])(gradients, params)


def expected_of(name):
    """All layers' updates: as they are without a mask."""
    found = updated(CHANGES[name]())
    assert np.max(np.abs(found["layers_1"]["u"]["kernel"] - GRADIENTS["layers_1"]["u"]["kernel"])) > 0.01
    return found


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("mask", [BY_LAYER, BY_PARAM])
def test_layers_that_are_masked_are_left_out(name, mask):
    expected = expected_of(name) | {"layers_1": GRADIENTS["layers_1"]}
    chex.assert_trees_all_close(updated(optax.masked(CHANGES[name](), mask)), expected, rtol=1e-6)


@pytest.mark.parametrize("name", CHANGES)
def test_two_optimizers_each_of_its_own_layers(name):
    labels = {"layers_0": "first", "layers_1": "second", "layers_2": "second"}
    tx = optax.multi_transform({label: CHANGES[name]() for label in ("first", "second")}, labels)
    chex.assert_trees_all_close(updated(tx), expected_of(name), rtol=1e-6)
    tx = optax.multi_transform({"first": CHANGES[name](), "second": optax.set_to_zero()}, labels)
    expected = expected_of(name)
    expected |= {layer: optax.tree.zeros_like(expected[layer]) for layer in ("layers_1", "layers_2")}
    chex.assert_trees_all_close(updated(tx), expected, rtol=1e-6)


@pytest.mark.parametrize("name", CHANGES)
def test_biases_alone_leave_their_layer_out(name):
    mask = jax.tree.map(lambda _: True, PARAMS)
    for factor in "uv":
        mask["layers_1"][factor]["kernel"] = False
    expected = expected_of(name) | {"layers_1": GRADIENTS["layers_1"]}
    chex.assert_trees_all_close(updated(optax.masked(CHANGES[name](), mask)), expected, rtol=1e-6)


@pytest.mark.parametrize("name", CHANGES)
def test_an_nnx_optimizer_of_some_layers(name):
    full = nnx.Sequential(*(nnx.Linear(6, 6, rngs=nnx.Rngs(i)) for i in range(3)))
    plan = cf.FactorizationPlan.from_ranks(cf.find_kernels(full, X), {"layers/0": 2, "layers/1": 3})
    change = cf.frobenius_decay(0.3, plan) if name == "frobenius_decay" else cf.precondition_factors(plan)
    moved = {}
    for which, wrt in (("all", nnx.Param), ("some", nnx.All(nnx.Param, nnx.PathContains(1)))):
        model = cf.factorize(full, plan)
        optimizer = nnx.Optimizer(model, optax.chain(change, optax.sgd(0.1)), wrt=wrt)
        nnx.jit(lambda model, optimizer, wrt=wrt: optimizer.update(model, nnx.state(model, wrt)))(
            model, optimizer
        )
        moved[which] = nnx.to_pure_dict(nnx.state(model, nnx.Param))["layers"]
    before = nnx.to_pure_dict(nnx.state(cf.factorize(full, plan), nnx.Param))["layers"]
    chex.assert_trees_all_close(moved["some"], before | {1: moved["all"][1]}, rtol=1e-6)
    change_of = np.abs(moved["some"][1]["u"]["kernel"] - before[1]["u"]["kernel"])
    assert np.max(change_of) > 0.01


@pytest.mark.parametrize("name", CHANGES)
def test_params_that_are_not_the_plans_are_refused_all_the_same(name):
    tx, full = CHANGES[name](), MODEL.init(jax.random.key(0), X)["params"]
    with pytest.raises(ValueError, match="the layer at 'layers_0' is not factorized"):
        updated(tx, full, full)
    with pytest.raises(ValueError, match="the layer at 'layers_0' is not factorized"):
        updated(optax.masked(tx, BY_LAYER), full, full)
    mixed = PARAMS | {"layers_1": full["layers_1"]}
    with pytest.raises(ValueError, match="the layer at 'layers_1' is not factorized"):
        updated(tx, mixed, mixed)
    other = {"layers_0": PARAMS["layers_0"], "head": full["layers_2"]}
    with pytest.raises(ValueError, match="params have no 'layers_1'"):
        updated(tx, other, other)
    with pytest.raises(ValueError, match="params have no 'layers_0'"):
        updated(tx, nnx.State({"head": full["layers_2"]}), nnx.State({"head": full["layers_2"]}))


@pytest.mark.parametrize("name", CHANGES)
def test_one_factor_without_the_other_is_refused(name):
    mask = jax.tree.map(lambda _: True, PARAMS)
    mask["layers_1"]["u"]["kernel"] = False
    with pytest.raises(ValueError, match="the kernel at 'layers_1/u' is a MaskedNode"):
        updated(optax.masked(CHANGES[name](), mask))


def test_a_plan_of_some_of_its_layers():
    seen = PLAN.restricted(["layers_1"], "not optimized")
    assert seen.ranks == {"layers_1": 3}
    assert seen.kept == PLAN.kept | {"layers_0": "not optimized"}
    assert PLAN.restricted(PLAN.ranks, "not optimized") is PLAN
