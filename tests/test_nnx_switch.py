"""NNX models and their optimizers across the switch."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nnx_zoo import once, plan_at, prepared

import cuttlefish_jax as cf

X = jnp.asarray(np.random.default_rng(0).standard_normal((16, 8)), jnp.float32)
Y = jnp.sin(X.sum(axis=1, keepdims=True))


class Net(nnx.Module):
    """Eleven layers in a list, so that "10" sorts before "2"; a batch norm; a head."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(11)])
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = x + nnx.tanh(layer(x)) / 4
        return self.head(self.norm(x))


def loss_of(model):
    return jnp.mean((model(X) - Y) ** 2)


@nnx.jit
def train_step(model, optimizer):
    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


def not_vectors(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def by_ndim(params):
    return jax.tree.map(lambda leaf: "vectors" if leaf.ndim < 2 else "kernels", params)


PARTS = {"kernels": optax.sgd(0.1, momentum=0.9), "vectors": optax.adam(1e-3)}
# Each with the momentum that it has of every kernel.
OPTIMIZERS = {
    "momentum": (lambda: optax.sgd(0.02, momentum=0.9), "trace"),
    "adamw": (
        lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, mask=not_vectors)),
        "mu",
    ),
    "masked": (lambda: optax.masked(optax.adam(1e-3), not_vectors), "mu"),
    "partition": (lambda: optax.partition(PARTS, by_ndim), "trace"),
    "hyperparams": (lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.1), "mu"),
    "multi_steps": (lambda: optax.MultiSteps(optax.adam(1e-3), 3).gradient_transformation(), "acc_grads"),
}


@functools.cache
def filled(name):
    """A model, an optimizer that remembers random things after three steps, and a plan at half rank."""
    model, rng = Net(nnx.Rngs(0)), np.random.default_rng(0)
    optimizer = nnx.Optimizer(model, OPTIMIZERS[name][0](), wrt=nnx.Param)

    def fill(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf + 3
        return jnp.asarray(rng.uniform(0.1, 1, leaf.shape), leaf.dtype)

    nnx.update(optimizer, jax.tree.map(fill, nnx.state(optimizer)))
    kernels = cf.find_kernels(model, X)
    return (
        model,
        optimizer,
        cf.FactorizationPlan.from_ranks(kernels, {path: 4 for path in kernels if path != "head"}),
    )


def moment(optimizer, field, *path):
    """What an optimizer remembers of a param, in float64."""
    trees = [tree for _, tree in optax.tree.get_all_with_path(optimizer.opt_state, field)]
    for tree in trees:
        for name in path:
            tree = tree[name]
        if not isinstance(tree.get_value(), optax.MaskedNode):
            return np.asarray(tree[...], np.float64)
    raise AssertionError(f"no {field} of {path}")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_momentum_is_what_the_factors_would_have_gathered(name):
    (model, optimizer, plan), (make, field) = filled(name), OPTIMIZERS[name]
    low, low_optimizer = cf.switch((model, optimizer), plan, make())
    for i in (2, 10):
        m = moment(optimizer, field, "layers", i, "kernel")
        u, v = (np.asarray(getattr(low.layers[i], f).kernel[...], np.float64) for f in "uv")
        actual = [moment(low_optimizer, field, "layers", i, f, "kernel") for f in "uv"]
        np.testing.assert_allclose(actual[0], m @ v.T, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(actual[1], u.T @ m, rtol=1e-4, atol=1e-5)
    kept = [moment(o, field, "head", "kernel") for o in (optimizer, low_optimizer)]
    np.testing.assert_array_equal(*kept)


def test_second_moments_are_projected_by_squares_and_as_correlated():
    model, optimizer, plan = filled("adamw")
    low, low_optimizer = cf.switch((model, optimizer), plan, OPTIMIZERS["adamw"][0]())
    s, v = moment(optimizer, "nu", "layers", 3, "kernel"), np.asarray(low.layers[3].v.kernel[...], np.float64)
    actual = moment(low_optimizer, "nu", "layers", 3, "u", "kernel")
    m = moment(optimizer, "mu", "layers", 3, "kernel").astype(np.float64)
    share = np.sum((m @ v.T) ** 2, 0) / np.sum(m**2 @ (v**2).T, 0)
    floor = np.maximum(s - m**2, 0) @ (v**2).T + (m @ v.T) ** 2
    np.testing.assert_allclose(actual, np.maximum(share * (s @ (v**2).T), floor), rtol=1e-3, atol=1e-6)
    biases = [
        moment(o, "nu", "layers", 3, *p) for o, p in ((optimizer, ["bias"]), (low_optimizer, ["v", "bias"]))
    ]
    np.testing.assert_array_equal(*biases)
    assert int(optax.tree.get(low_optimizer.opt_state, "count")[...]) == 3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_is_that_of_the_factorized_models_own_optimizer(name):
    model, optimizer, plan = filled(name)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state((model, optimizer))))
    tx = OPTIMIZERS[name][0]()
    low, low_optimizer = cf.switch((model, optimizer), plan, tx)
    assert int(low_optimizer.step[...]) == 3
    assert low_optimizer.tx is tx and low_optimizer.wrt is nnx.Param
    fresh = nnx.Optimizer(low, tx, wrt=nnx.Param)
    chex.assert_trees_all_equal_shapes_and_dtypes(*map(nnx.state, (low_optimizer, fresh)))
    assert nnx.graphdef(low_optimizer) == nnx.graphdef(fresh)
    np.testing.assert_array_equal(low.norm.mean[...], model.norm.mean[...])
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state((model, optimizer))), before)


def test_the_loss_after_a_full_rank_switch_goes_on():
    model, optimizer = Net(nnx.Rngs(1)), None
    optimizer = nnx.Optimizer(model, OPTIMIZERS["adamw"][0](), wrt=nnx.Param)
    losses = [float(train_step(model, optimizer)) for _ in range(20)]
    plan = plan_at(cf.find_kernels(model, X))
    goes_on = [
        float(train_step(*pair)) for pair in [(nnx.clone(model), nnx.clone(optimizer))] for _ in range(5)
    ]
    model, optimizer = cf.switch((model, optimizer), plan, OPTIMIZERS["adamw"][0]())
    low_losses = [float(train_step(model, optimizer)) for _ in range(20)]
    np.testing.assert_allclose(low_losses[0], goes_on[0], rtol=1e-3)  # the function is the same
    assert max(low_losses) <= losses[-1] * 1.02  # no spike
    assert low_losses[-1] < 0.8 * losses[-1]
    assert int(optimizer.step[...]) == 40


def test_averages_of_params_are_projected():
    model, optimizer, plan = filled("momentum")
    ema = nnx.EMA(model, 0.9, only=nnx.Param)
    ema.update(jax.tree.map(lambda leaf: 2 * leaf, nnx.state(model, nnx.Param)))
    low, _, low_ema = cf.switch((model, optimizer, ema), plan, optimizer.tx)
    full = jnp.asarray(ema.params["layers"][10]["kernel"][...])
    u, v = (np.asarray(low_ema.params["layers"][10][f]["kernel"][...], np.float64) for f in "uv")
    np.testing.assert_array_equal(v, low.layers[10].v.kernel[...])
    np.testing.assert_allclose(u @ v, np.asarray(full, np.float64) @ np.linalg.pinv(v) @ v, atol=1e-5)
    np.testing.assert_array_equal(low_ema.params["head"]["kernel"][...], ema.params["head"]["kernel"][...])
    low_ema.update(nnx.state(low, nnx.Param))  # fits


def test_frobenius_decay_in_an_nnx_optimizer():
    model, optimizer, plan = filled("momentum")
    tx = optax.chain(cf.frobenius_decay(0.1, plan), optax.sgd(1.0))
    low, low_optimizer = cf.switch((model, optimizer), plan, tx)
    u, v = (np.asarray(getattr(low.layers[10], f).kernel[...], np.float64) for f in "uv")
    zeros = jax.tree.map(jnp.zeros_like, nnx.state(low, nnx.Param))
    nnx.jit(lambda model, optimizer, zeros: optimizer.update(model, zeros))(low, low_optimizer, zeros)
    np.testing.assert_allclose(low.layers[10].u.kernel[...], u - 0.1 * u @ v @ v.T, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(low.layers[10].v.kernel[...], v - 0.1 * u.T @ u @ v, rtol=1e-4, atol=1e-6)


def test_an_optimizer_of_some_params():
    model = Net(nnx.Rngs(0))
    wrt = nnx.All(nnx.Param, nnx.Any(nnx.PathContains("head"), nnx.PathContains(10)))
    tx = optax.adam(1e-2)
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, wrt)))
    low, low_optimizer = cf.switch((model, optimizer), plan_at(cf.find_kernels(model, X), 0.5), tx)
    assert moment(low_optimizer, "mu", "layers", 10, "u", "kernel").shape == (8, 4)
    assert set(optax.tree.get(low_optimizer.opt_state, "mu")["layers"]) == {10}
    assert isinstance(low.layers[0].u, nnx.Linear)


@pytest.mark.parametrize("name", ["scan_remat_last", "shared"])
def test_gradients_and_steps_in_other_contexts(name):
    model, x, kernels = prepared(name)
    plan, tx = plan_at(kernels), optax.adam(1e-3)
    graphdef, state = nnx.split((nnx.clone(model), nnx.Optimizer(model, tx, wrt=nnx.Param)))

    def run(state):
        def loss(model):
            return jnp.mean(model(x) ** 2)

        model, optimizer = nnx.merge(graphdef, state)
        optimizer.update(model, nnx.grad(loss)(model))
        low, low_optimizer = cf.switch((model, optimizer), plan, tx)
        before, after = loss(model), loss(low)
        low_optimizer.update(low, nnx.grad(loss)(low))
        return before, after, loss(low), nnx.state((low, low_optimizer))

    before, after, later, state = once(run, state)
    np.testing.assert_allclose(after, before, rtol=1e-5)
    assert later < after
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.float32)


def test_pmap_over_eight_devices():
    model, (x,), kernels = prepared("shared")[0], [prepared("shared")[1]], prepared("shared")[2]
    low = cf.factorize(model, plan_at(kernels, 0.5))
    batch = jax.random.normal(jax.random.key(0), (8, *x.shape))

    def gradient(model, x):
        return nnx.grad(lambda model: jnp.mean(jnp.sin(model(x))))(model)

    def mean_gradient(model, x):
        return jax.lax.pmean(gradient(model, x), "devices")

    assert jax.local_device_count() == 8
    axes = nnx.StateAxes({...: None})
    mapped = nnx.pmap(mean_gradient, axis_name="devices", in_axes=(axes, 0), out_axes=None)
    expected = once(
        lambda state: gradient(nnx.merge(nnx.graphdef(low), state), batch.reshape(16, -1)), nnx.state(low)
    )
    chex.assert_trees_all_close(jax.device_get(mapped(low, batch)), expected, rtol=1e-4, atol=1e-6)


def test_what_is_no_model_and_its_optimizer():
    model, optimizer, plan = filled("momentum")
    with pytest.raises(ValueError, match=r"use switch\(\(model, optimizer\), plan, tx\)"):
        cf.switch(optimizer, plan, optimizer.tx)
    with pytest.raises(ValueError, match=r"needs \(model, nnx.Optimizer\), .*, got \(Optimizer, Net\)"):
        cf.switch((optimizer, model), plan, optimizer.tx)
    abstract = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    with pytest.raises(ValueError, match="'head/bias' has no value: the model is abstract"):
        cf.switch((abstract, optimizer), plan, optimizer.tx)
    low = cf.switch((model, optimizer), plan, optimizer.tx)
    with pytest.raises(ValueError, match="'layers/0' is factorized already"):
        cf.switch(low, plan, optimizer.tx)
