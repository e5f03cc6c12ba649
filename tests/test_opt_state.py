"""The optimizer's state across the switch, of the optimizers that people use."""

import warnings

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linen_zoo import once
from switch_cases import (
    ADAFACTOR,
    OPTIMIZERS,
    PARAMS,
    PARAMS_LOW,
    PLAN,
    SCHEDULE,
    check_structure,
    fields,
    gathered,
    gradients,
    new_state,
)

import cuttlefish_jax as cf
from cuttlefish_jax.moments import project_momentum, project_second_moment


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_on(name):
    tx = OPTIMIZERS[name][0]()
    before = new_state(tx).replace(opt_state=gathered(name), step=jnp.asarray(4))
    after = cf.switch(before, PLAN, tx)
    gradient = jax.tree.map(lambda leaf: leaf[0], gradients(low=True)[1])
    later = once(lambda state: state.apply_gradients(grads=gradient), after)
    check_structure(after.opt_state, tx, PARAMS_LOW)
    check_structure(later.opt_state, tx, PARAMS_LOW)
    states = after.opt_state, later.opt_state, later.params
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(states))
    assert int(later.step) == 5
    for counter in ("count", "mini_step", "gradient_step"):
        chex.assert_trees_all_equal(fields(before.opt_state, counter), fields(after.opt_state, counter))
    for moment in ("nu", "nu_max", "sum_of_squares"):
        assert all(np.all(leaf >= 0) for leaf in jax.tree.leaves(fields(after.opt_state, moment)))


@pytest.mark.parametrize("name", [name for name, (_, linear) in OPTIMIZERS.items() if linear])
def test_what_is_linear_in_the_gradients_is_as_if_the_factors_had_always_been_there(name):
    tx = OPTIMIZERS[name][0]()
    carried = cf.carry_opt_state(gathered(name), PARAMS, PARAMS_LOW, tx, PLAN)
    expected = gathered(name, low=True)
    for field in OPTIMIZERS[name][1]:
        assert any(np.any(leaf) for leaf in jax.tree.leaves(fields(expected, field)))
        chex.assert_trees_all_close(fields(carried, field), fields(expected, field), rtol=1e-4, atol=1e-6)


def test_second_moments_are_projected_with_the_first_ones_correlations():
    tx, old = optax.amsgrad(1e-3), gathered("amsgrad")
    carried = cf.carry_opt_state(old, PARAMS, PARAMS_LOW, tx, PLAN)
    for field in ("nu", "nu_max"):
        momentum = fields(old, "mu")[0]
        expected = project_second_moment(fields(old, field)[0], PARAMS_LOW, PLAN, momentum=momentum)
        assert float(optax.tree.norm(expected)) > 0
        chex.assert_trees_all_equal(fields(carried, field)[0], expected)


def test_averages_of_params_in_the_optimizer_are_projected():
    tx = optax.contrib.schedule_free_sgd(0.1, b1=0.9)
    z = cf.carry_opt_state(tx.init(PARAMS), PARAMS, PARAMS_LOW, tx, PLAN).z
    chex.assert_trees_all_close(z, PARAMS_LOW, rtol=1e-5, atol=1e-6)


def test_a_factored_second_moment_is_named_and_only_what_belongs_to_the_factors_is_lost():
    tx, old = ADAFACTOR["large"][0](), gathered("large")
    with pytest.warns(UserWarning, match=r"re-initialised at the switch: .*/v_row/conv/u/kernel") as caught:
        carried = cf.carry_opt_state(old, PARAMS, PARAMS_LOW, tx, PLAN)
    assert ["kept" in str(warning.message) for warning in caught] == [False]
    check_structure(carried, tx, PARAMS_LOW)
    for field in ("v_row", "v_col", "v"):
        before, after = (getattr(state[0], field) for state in (old, carried))
        chex.assert_trees_all_equal({**after, "conv": 0, "fc": 0}, {**before, "conv": 0, "fc": 0})
    assert np.any(carried[0].v_row["kept"]["kernel"])
    expected = project_momentum(fields(old, "ema")[0], PARAMS_LOW, PLAN)
    chex.assert_trees_all_equal(fields(carried, "ema")[0], expected)


def test_small_kernels_whose_second_moment_adafactor_does_not_factor_keep_it():
    tx, old = ADAFACTOR["small"][0](), gathered("small")
    with pytest.warns(UserWarning, match=r"re-initialised at the switch: .*/v_row/conv/u/kernel"):
        carried = cf.carry_opt_state(old, PARAMS, PARAMS_LOW, tx, PLAN)
    chex.assert_trees_all_equal(carried[0].v, project_second_moment(old[0].v, PARAMS_LOW, PLAN))


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_another_chain_at_the_switch_takes_what_it_has_in_common(name):
    old = gathered(name)
    tx = optax.chain(optax.clip(1.0), cf.frobenius_decay(1e-4, PLAN), OPTIMIZERS[name][0](), optax.scale(2))
    carried = cf.carry_opt_state(old, PARAMS, PARAMS_LOW, tx, PLAN)
    check_structure(carried, tx, PARAMS_LOW)
    (field,) = OPTIMIZERS[name][1]
    expected = project_momentum(fields(old, field)[0], PARAMS_LOW, PLAN)
    chex.assert_trees_all_equal(fields(carried, field)[0], expected)


def test_a_chain_may_have_less_memory_or_another_precision():
    old = gathered("momentum")
    assert jax.tree.leaves(cf.carry_opt_state(old, PARAMS, PARAMS_LOW, optax.sgd(0.1), PLAN)) == []
    tx = OPTIMIZERS["bfloat16"][0]()
    carried = cf.carry_opt_state(old, PARAMS, PARAMS_LOW, tx, PLAN)
    check_structure(carried, tx, PARAMS_LOW)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(carried))


def test_what_an_optimizer_remembers_of_whole_layers_stays():
    old = optax.EmaState(jnp.asarray(3), {layer: jnp.asarray(len(layer)) for layer in PARAMS})
    tx = optax.GradientTransformation(lambda params: optax.tree.zeros_like(old), lambda *_: None)
    chex.assert_trees_all_equal(cf.carry_opt_state(old, PARAMS, PARAMS_LOW, tx, PLAN), old)


def test_another_optimizer_keeps_the_schedules_count_and_names_what_is_new():
    old = optax.tree.set(gathered("nesterov"), count=jnp.asarray(17))
    tx = optax.adamw(SCHEDULE)
    with pytest.warns(UserWarning, match=r"at the switch: ScaleByAdamState#0/count, .* and 14 more$"):
        carried = cf.carry_opt_state(old, PARAMS, PARAMS_LOW, tx, PLAN)
    check_structure(carried, tx, PARAMS_LOW)
    chex.assert_trees_all_equal(carried[0], tx.init(PARAMS_LOW)[0])
    assert [int(count) for count in fields(carried, "count")] == [0, 17]


def test_equal_parts_are_told_apart_by_their_order():
    tx = optax.chain(optax.trace(0.9), optax.trace(0.5), optax.scale(-0.1))
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    old = (optax.TraceState(ones), optax.TraceState(optax.tree.scale(2.0, ones)), optax.ScaleState())
    carried = cf.carry_opt_state(old, PARAMS, PARAMS_LOW, tx, PLAN)
    first = project_momentum(ones, PARAMS_LOW, PLAN)
    chex.assert_trees_all_close(carried[0].trace, first)
    chex.assert_trees_all_close(carried[1].trace, optax.tree.scale(2.0, first))


def test_random_keys_of_the_optimizer_stay():
    tx = optax.chain(optax.add_noise(1e-3, 0.5, 0), optax.sgd(0.1))
    noise, *rest = tx.init(PARAMS)
    old = (noise._replace(rng_key=jax.random.key(3), count=jnp.asarray(9)), *rest)
    assert cf.carry_opt_state(old, PARAMS, PARAMS_LOW, tx, PLAN) == old


def test_hyperparameters_that_were_changed_by_hand_stay():
    tx = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
    old = optax.tree.set(tx.init(PARAMS), learning_rate=jnp.asarray(0.025))
    carried = cf.carry_opt_state(old, PARAMS, PARAMS_LOW, tx, PLAN)
    assert float(carried.hyperparams["learning_rate"]) == pytest.approx(0.025)


# Of a layer as small as can be. What is lost, and named: nothing in factor space is like it.
DENSE = cf.FactorizationPlan.from_ranks(cf.find_kernels(nn.Dense(6), jnp.ones((1, 8))), {"": 3})
TABLE = {
    "masked_decay": (lambda: optax.inject_hyperparams(optax.adamw)(0.1, weight_decay=0.1), ()),
    "lamb": (lambda: optax.lamb(0.1), ()),
    "adabelief": (lambda: optax.adabelief(0.1), ()),
    "radam": (lambda: optax.radam(0.1), ()),
    "adan": (lambda: optax.adan(0.1), ()),
    "centered_rmsprop": (lambda: optax.rmsprop(0.1, centered=True), ()),
    "optimistic": (lambda: optax.optimistic_gradient_descent(0.1), ()),
    "muon": (lambda: optax.contrib.muon(0.1), ()),
    "ademamix": (lambda: optax.contrib.ademamix(0.1), ()),
    "prodigy": (lambda: optax.contrib.prodigy(0.1), ()),
    "schedule_free": (lambda: optax.contrib.schedule_free_adamw(0.1), ()),
    "reduce_on_plateau": (lambda: optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau()), ()),
    "adadelta": (lambda: optax.adadelta(0.1), ("e_x",)),
    "novograd": (lambda: optax.novograd(0.1), ("nu",)),
    "rprop": (lambda: optax.rprop(0.1), ("step_sizes", "prev_updates")),
}


@pytest.mark.parametrize("name", TABLE)
def test_all_other_optimizers_are_carried_or_name_what_is_lost(name):
    make, lost = TABLE[name]
    tx, rng = make(), np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.standard_normal((8, 6)), jnp.float32), "bias": jnp.ones(6)}
    gradient = jax.tree.map(lambda leaf: 0.1 * leaf + 0.01, params)

    def update(gradient, state, params):
        return optax.with_extra_args_support(tx).update(gradient, state, params, value=jnp.float32(1))

    low = cf.factorize_params(params, DENSE)
    _, old = once(update, gradient, tx.init(params), params)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        carried = cf.carry_opt_state(old, params, low, tx, DENSE)
    found = [str(warning.message).partition(": ")[2] for warning in caught]
    assert len(found) == bool(lost)
    if lost:
        names = [part for part in found[0].split(", ") if "and" not in part]
        assert {field for field in lost if any(f"/{field}/" in part for part in names)} == set(lost)
        assert all(any(f"/{field}/" in part for field in lost) for part in names)
    check_structure(carried, tx, low)
    updates, later = once(update, project_momentum(gradient, low, DENSE), carried, low)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((updates, later)))


def test_differences_of_gradients_are_no_second_moments():
    tx, params = optax.adan(0.1), {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)}
    low = cf.factorize_params(params, DENSE)
    down = jax.tree.map(lambda leaf: -leaf, params)
    old = optax.tree.set(tx.init(params), v=down)
    carried = cf.carry_opt_state(old, params, low, tx, DENSE)
    chex.assert_trees_all_equal(fields(carried, "v")[0], project_momentum(down, low, DENSE))


def test_squares_around_the_mean_are_not_corrected_by_it():
    """AdaBelief's: of what the gradients have beside their mean."""
    tx, old = optax.adabelief(1e-3), gathered("adam")
    belief = optax.ScaleByBeliefState(*old[0])
    carried = cf.carry_opt_state((belief, *old[1:]), PARAMS, PARAMS_LOW, tx, PLAN)
    apart = project_second_moment(belief.nu, PARAMS_LOW, PLAN)
    chex.assert_trees_all_equal(carried[0].nu, apart)
    corrected = project_second_moment(belief.nu, PARAMS_LOW, PLAN, momentum=belief.mu)
    assert not np.allclose(corrected["fc"]["u"]["kernel"], apart["fc"]["u"]["kernel"], rtol=0.1, atol=0)


def test_a_variance_stays_one():
    """Centered RMSProp divides by the root of ``nu - mu^2``."""
    rng = np.random.default_rng(0)
    params, gradient = ({"kernel": jnp.asarray(rng.standard_normal((8, 6)), jnp.float32)} for _ in range(2))
    plan = cf.FactorizationPlan.from_ranks(DENSE.kernels, {"": 3})
    low = cf.factorize_params(params, plan)
    tx = optax.scale_by_stddev(0.9)
    old = tx.init(params)._replace(mu=gradient, nu=jax.tree.map(lambda x: x**2 + 1e-3, gradient))
    carried = cf.carry_opt_state(old, params, low, tx, plan)
    expected = project_second_moment(jax.tree.map(lambda x: 0 * x + 1e-3, gradient), low, plan)
    for nu, mu, least in zip(*map(jax.tree.leaves, (carried.nu, carried.mu, expected)), strict=True):
        assert np.all(nu - mu**2 >= 0.9 * least - 1e-6)


def test_lookahead_carries_its_fast_optimizer():
    tx = optax.lookahead(optax.sgd(0.1, momentum=0.9), 3, 0.5)
    params = {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)}
    low = cf.factorize_params(params, DENSE)
    both, both_low = (optax.LookaheadParams.init_synced(tree) for tree in (params, low))
    old = tx.init(both)
    old = old._replace(
        fast_state=jax.tree.map(lambda leaf: leaf + 2, old.fast_state), steps_since_sync=jnp.asarray(2)
    )
    carried = cf.carry_opt_state(old, both, both_low, tx, DENSE)
    check_structure(carried, tx, both_low)
    assert int(carried.steps_since_sync) == 2
    twos = jax.tree.map(lambda leaf: 0 * leaf + 2, params)
    chex.assert_trees_all_equal(fields(carried, "trace")[0], project_momentum(twos, low, DENSE))
