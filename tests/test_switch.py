"""Training states across the switch, with the optimizers that people use."""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from flax.core import freeze
from flax.training.train_state import TrainState
from linen_zoo import once, plan_at, prepared

import cuttlefish_jax as cf
from cuttlefish_jax.moments import project_average, project_momentum, project_second_moment


class Net(nn.Module):
    """A convolution, a layer that the plan keeps, and a dense layer; batch norm; a bias here and there."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3), strides=2, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = nn.relu(nn.Dense(8, name="kept")(x.mean((1, 2))))
        return nn.Dense(5, use_bias=False, name="fc")(x)


X = jnp.asarray(np.random.default_rng(0).standard_normal((4, 5, 5, 4)), jnp.float32)
MODEL = Net()
VARIABLES = jax.jit(MODEL.init)(jax.random.key(0), X)
PARAMS = VARIABLES["params"]
KERNELS = cf.find_kernels(MODEL, X)
PLAN = cf.FactorizationPlan.from_ranks(KERNELS, {"conv": 3, "fc": 2})
PARAMS_LOW = cf.factorize_params(PARAMS, PLAN)
LOW = cf.factorize(MODEL, PLAN)


class State(TrainState):
    """A state with what training states have besides params."""

    batch_stats: Any = None
    ema_params: Any = None
    rng: Any = None


def new_state(tx):
    ema = jax.tree.map(lambda leaf: 0.9 * leaf, PARAMS)
    fields = dict(batch_stats=VARIABLES["batch_stats"], ema_params=ema, rng=jax.random.key(7))
    return State.create(apply_fn=MODEL.apply, params=PARAMS, tx=tx, **fields)


def loss_of(apply, params, x, batch_stats=VARIABLES["batch_stats"]):
    return jnp.mean((apply({"params": params, "batch_stats": batch_stats}, x) - 1) ** 2)


def train_step(state, x=X):
    """One step; the running statistics change too."""

    def loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        y, updated = state.apply_fn(variables, x, train=True, mutable=["batch_stats"])
        return jnp.mean((y - 1) ** 2), updated["batch_stats"]

    gradients, batch_stats = jax.grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=gradients, batch_stats=batch_stats)


def not_biases(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def by_ndim(params):
    return jax.tree.map(lambda leaf: "vectors" if leaf.ndim < 2 else "kernels", params)


BY_LAYER = {layer: "kernels" if layer == "conv" else "vectors" for layer in PARAMS}  # a prefix of the params
SCHEDULE = optax.linear_schedule(0.1, 0.01, 10)
PARTS = {"kernels": optax.sgd(0.1, momentum=0.9), "vectors": optax.adam(1e-3)}

# What of each optimizer's state is linear in the gradients, and hence carried without any loss.
OPTIMIZERS = {
    "sgd": (lambda: optax.sgd(0.1), ()),
    "momentum": (lambda: optax.sgd(0.1, momentum=0.9), ("trace",)),
    "nesterov": (lambda: optax.sgd(SCHEDULE, momentum=0.9, nesterov=True), ("trace",)),
    "bfloat16": (lambda: optax.sgd(0.1, momentum=0.9, accumulator_dtype=jnp.bfloat16), ()),
    "adam": (lambda: optax.adam(1e-3), ("mu",)),
    "adamw": (lambda: optax.adamw(SCHEDULE, weight_decay=1e-2, mask=not_biases), ("mu",)),
    "amsgrad": (lambda: optax.amsgrad(1e-3), ("mu",)),
    "lion": (lambda: optax.lion(1e-3), ("mu",)),
    "rmsprop": (lambda: optax.rmsprop(1e-3, momentum=0.9), ()),
    "adagrad": (lambda: optax.adagrad(1e-2), ()),
    "clipped_nested": (
        lambda: optax.chain(optax.chain(optax.clip(1e9), optax.ema(0.9)), optax.trace(0.9), optax.scale(-1)),
        ("ema", "trace"),
    ),
    "masked": (lambda: optax.masked(optax.adam(1e-3), not_biases), ("mu",)),
    "partition": (lambda: optax.partition(PARTS, by_ndim), ("trace",)),
    "partition_by_layer": (lambda: optax.partition(PARTS, BY_LAYER), ("trace", "mu")),
    "hyperparams": (lambda: optax.inject_hyperparams(optax.adam)(learning_rate=SCHEDULE), ("mu",)),
    "multi_steps": (lambda: optax.MultiSteps(optax.adam(1e-3), 3), ("acc_grads", "mu")),
    "apply_if_finite": (lambda: optax.apply_if_finite(optax.adam(1e-3), 5), ("mu",)),
}
# Second moments as sums of rows and columns: nothing in factor space is like them.
ADAFACTOR = {
    "small": (lambda: optax.adafactor(1e-2), ()),
    "large": (lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4, momentum=0.9), ()),
}


@functools.cache
def gradients(low):
    """Params and their gradients on four batches: in full space or, of the same function, in factors."""
    apply, params = (LOW.apply, PARAMS_LOW) if low else (MODEL.apply, cf.merge_params(PARAMS_LOW, PLAN))
    batches = jnp.asarray(np.random.default_rng(1).standard_normal((4, *X.shape)), jnp.float32)
    gradient = jax.grad(functools.partial(loss_of, apply))
    return params, once(lambda params: jax.lax.map(lambda x: gradient(params, x), batches), params)


@functools.cache
def gathered(name, low=False):
    """An optimizer's state after these four gradients, the params held fixed."""
    tx = (OPTIMIZERS | ADAFACTOR)[name][0]()

    def run(params, gradients):
        def step(opt_state, gradient):
            return tx.update(gradient, opt_state, params)[1], None

        return jax.lax.scan(step, tx.init(params), gradients)[0]

    return once(run, *gradients(low))


def check_structure(opt_state, tx, params):
    expected = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(opt_state) == jax.tree.structure(expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(opt_state, expected)


def fields(opt_state, name):
    """Everything called ``name`` in an optimizer's state."""
    return [value for _, value in optax.tree.get_all_with_path(opt_state, name)]


# --- The optimizer's state ----------------------------------------------------------------------------------


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


# --- The state ----------------------------------------------------------------------------------------------


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
