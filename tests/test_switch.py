"""Training states across the switch."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from flax.core import freeze
from flax.training.train_state import TrainState
from linen_zoo import once, plan_at, prepared
from switch_cases import (
    KERNELS,
    LOW,
    MODEL,
    PARAMS,
    PARAMS_LOW,
    PLAN,
    State,
    X,
    check_structure,
    fields,
    loss_of,
    new_state,
    train_step,
)

import cuttlefish_jax as cf
from cuttlefish_jax.moments import project_average, project_momentum


@pytest.mark.parametrize("stack", ["scan_last", "vmap_scan_axes"])
def test_stacked_layers(stack):
    model, inputs, variables, kernels = prepared(stack)
    plan, tx = plan_at(kernels), optax.adam(1e-3)

    def run(params):
        state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

        def loss(params, state=state):
            return jnp.mean(state.apply_fn({"params": params}, *inputs) ** 2)

        state = state.apply_gradients(grads=jax.grad(loss)(params))
        low = cf.switch(state, plan, tx)
        later = low.apply_gradients(grads=jax.grad(lambda params: loss(params, low))(low.params))
        return loss(state.params), loss(low.params, low), later

    before, after, later = once(run, variables["params"])
    np.testing.assert_allclose(after, before, rtol=1e-5)
    check_structure(later.opt_state, tx, later.params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(later))


def test_the_loss_after_a_full_rank_switch_is_that_before_it():
    plan, state = plan_at(KERNELS), new_state(optax.sgd(0.1, momentum=0.9))
    step = jax.jit(train_step)
    for _ in range(3):
        state = step(state)
    low = cf.switch(state, plan, state.tx)
    trained = step(low)  # compiles anew: apply_fn and tx are static
    losses = [
        once(functools.partial(loss_of, s.apply_fn), s.params, X, s.batch_stats)
        for s in (state, low, trained)
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert losses[2] < losses[1] - 1e-3


def test_all_fields_of_a_state():
    state = new_state(optax.adam(1e-3)).replace(step=11)
    low = cf.switch(state, PLAN, state.tx)
    chex.assert_trees_all_equal(low.params, PARAMS_LOW)
    chex.assert_trees_all_equal(low.batch_stats, state.batch_stats)
    chex.assert_trees_all_equal(low.ema_params, project_average(state.ema_params, PARAMS_LOW, PLAN))
    expected = jax.tree.map(lambda leaf: 0.9 * leaf, cf.merge_params(PARAMS_LOW, PLAN))
    chex.assert_trees_all_close(cf.merge_params(low.ema_params, PLAN), expected, rtol=1e-4, atol=1e-5)
    assert (low.step, low.rng, low.tx) == (11, state.rng, state.tx)
    assert state.params is PARAMS  # the old state is as it was
    assert low.apply_fn.__self__ == LOW


def test_frozen_params_and_no_average():
    tx = optax.adam(1e-3)
    frozen = State.create(apply_fn=MODEL.apply, params=freeze(PARAMS), tx=tx)
    low = cf.switch(frozen, PLAN, tx)
    chex.assert_trees_all_equal(low.params, PARAMS_LOW)
    assert low.ema_params is None
    assert low.batch_stats is None
    check_structure(low.opt_state, tx, low.params)


def test_averages_inside_of_a_field():
    state = new_state(optax.sgd(0.1))
    average, expected = state.ema_params, cf.switch(state, PLAN, state.tx).ema_params

    def switched(field):
        return cf.switch(state.replace(ema_params=field), PLAN, state.tx).ema_params

    assert np.any(expected["conv"]["u"]["kernel"])
    low = switched({"fast": average, "slow": average, "decay": 0.9})
    chex.assert_trees_all_equal(low, {"fast": expected, "slow": expected, "decay": 0.9})
    chex.assert_trees_all_equal(switched((average, average)), (expected, expected))
    chex.assert_trees_all_equal(switched(freeze(average)), expected)
    ema = optax.ema(0.9).init(average)._replace(ema=average, count=jnp.asarray(3))
    chex.assert_trees_all_equal(switched(ema), optax.EmaState(jnp.asarray(3), expected))


@pytest.mark.parametrize("leaf", [0.5, True])
def test_what_has_only_the_structure_of_the_params_is_no_average(leaf):
    field = {"mine": jax.tree.map(lambda _: leaf, PARAMS)}
    state = new_state(optax.sgd(0.1)).replace(ema_params=field)
    with pytest.warns(
        UserWarning, match=r"^state\.ema_params is left as it is, .* not their shapes"
    ) as caught:
        low = cf.switch(state, PLAN, state.tx)
    assert low.ema_params == field
    assert caught[0].filename == __file__  # where switch was called


def test_a_mask_of_the_shapes_of_the_params_is_no_average():
    field = jax.tree.map(lambda leaf: leaf > 0, PARAMS)
    state = new_state(optax.sgd(0.1)).replace(ema_params=field)
    with pytest.warns(UserWarning, match=r"^state\.ema_params is left as it is"):
        chex.assert_trees_all_equal(cf.switch(state, PLAN, state.tx).ema_params, field)


def test_a_state_that_is_no_train_state():
    @struct.dataclass
    class Mine:
        params: Any
        opt_state: Any
        average: Any
        tx: Any = struct.field(pytree_node=False)
        apply_fn: Any = struct.field(pytree_node=False)

    tx = optax.adam(1e-3)
    mine = Mine(params=PARAMS, opt_state=tx.init(PARAMS), average=PARAMS, tx=tx, apply_fn=MODEL.apply)
    low = cf.switch(mine, PLAN, tx)
    assert type(low) is Mine
    chex.assert_trees_all_close(low.average, PARAMS_LOW, rtol=1e-5, atol=1e-6)


def test_extra_batch_norms():
    plan = cf.FactorizationPlan.from_ranks(KERNELS, PLAN.ranks, extra_batch_norm=True)
    tx = optax.adam(1e-3)

    def run(state):
        before = train_step(state)
        after = cf.switch(before, plan, tx)
        return before, after, train_step(after)

    before, after, later = once(run, new_state(tx))
    made = jax.eval_shape(lambda: cf.factorize(MODEL, plan).init(jax.random.key(0), X))
    variables = {"params": after.params, "batch_stats": after.batch_stats}
    chex.assert_trees_all_equal_shapes_and_dtypes(variables, made)
    check_structure(after.opt_state, tx, after.params)
    identity = {"scale": jnp.ones(3), "bias": jnp.zeros(3)}
    chex.assert_trees_all_equal(after.params["conv"]["norm"], identity)
    chex.assert_trees_all_equal(after.ema_params["conv"]["norm"], identity)
    chex.assert_trees_all_equal(after.batch_stats["norm"], before.batch_stats["norm"])
    old, moment = (fields(state.opt_state, "mu")[0] for state in (before, after))
    assert not np.any(moment["conv"]["norm"]["scale"])
    expected = project_momentum(old, after.params, plan)["conv"]["u"]
    chex.assert_trees_all_close(moment["conv"]["u"], expected, rtol=1e-5, atol=1e-7)
    assert np.any(later.batch_stats["conv"]["norm"]["mean"])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((later.params, later.batch_stats)))


def test_a_train_step_may_donate_a_state_with_extra_batch_norms():
    plan = cf.FactorizationPlan.from_ranks(KERNELS, PLAN.ranks, extra_batch_norm=True)
    # Its own copies: the params of the other tests are not to be donated.
    state = jax.tree.map(jnp.copy, new_state(optax.sgd(0.1, momentum=0.9)).replace(rng=None))
    low = cf.switch(state, plan, state.tx)
    arrays = [leaf for leaf in jax.tree.leaves(low) if isinstance(leaf, jax.Array) and leaf.size > 1]
    pointers = [leaf.unsafe_buffer_pointer() for leaf in arrays]
    assert len(set(pointers)) == len(pointers)
    expected = once(train_step, jax.tree.map(jnp.copy, low))
    chex.assert_trees_all_close(jax.jit(train_step, donate_argnums=0)(low), expected, rtol=1e-5, atol=1e-6)


# --- Errors -------------------------------------------------------------------------------------------------


def test_an_apply_function_that_is_not_a_models_bound_apply():
    state = new_state(optax.sgd(0.1))
    for apply_fn in (lambda *args: MODEL.apply(*args), functools.partial(MODEL.apply, mutable=False)):
        with pytest.raises(ValueError, match=r"not a model's bound apply: pass switch\(\.\.\., apply_fn="):
            cf.switch(state.replace(apply_fn=apply_fn), PLAN, state.tx)
        low = cf.switch(state.replace(apply_fn=apply_fn), PLAN, state.tx, apply_fn=LOW.apply)
        assert low.apply_fn == LOW.apply


def test_a_second_switch_and_params_of_another_model_are_refused():
    state = new_state(optax.sgd(0.1))
    with pytest.raises(ValueError, match="the model is factorized already"):
        cf.switch(state.replace(apply_fn=LOW.apply), PLAN, state.tx)
    with pytest.raises(ValueError, match="params have no 'conv'"):
        cf.switch(state.replace(params={"other": jnp.ones(3)}), PLAN, state.tx)
