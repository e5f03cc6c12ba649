"""Frobenius decay: value and gradients against the penalty itself, and what is computed for them."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linen_zoo import once, plan_at, prepared

import cuttlefish_jax as cf
from cuttlefish_jax.factorize import factor_matrices

# Convolutions, several reduction and output axes, stacks in front and behind, a layer without a path.
NAMES = ("dense", "trained", "conv_3d", "attention", "general_apart", "scan_last", "vmap_scan")


def factorized(name, **options):
    _, _, variables, kernels = prepared(name)
    plan = plan_at(kernels, 0.5, **options)
    return plan, cf.factorize_params(variables["params"], plan)


def penalty(params, plan, coefficient):
    """The penalty as the paper has it, through the products."""
    total = 0.0
    for u, v in factor_matrices(params, plan).values():
        total += jnp.sum(jnp.matmul(u, v, precision="highest") ** 2)
    return 0.5 * coefficient * total


def zeros(params):
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradients_are_those_of_the_penalty(name):
    plan, params = factorized(name)
    tx = cf.frobenius_decay(0.3, plan)

    def both(params):
        return tx.update(zeros(params), tx.init(params), params)[0], jax.grad(penalty)(params, plan, 0.3)

    actual, expected = once(both, params)
    assert max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(expected)) > 0.01
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_the_gradients_in_float64_numpy():
    plan, params = factorized("dense")
    u, v = (np.asarray(params[name]["kernel"], np.float64) for name in "uv")
    tx = cf.frobenius_decay(0.3, plan)
    actual, _ = tx.update(zeros(params), tx.init(params), params)
    np.testing.assert_allclose(actual["u"]["kernel"], 0.3 * u @ v @ v.T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(actual["v"]["kernel"], 0.3 * u.T @ u @ v, rtol=1e-5, atol=1e-6)


def test_it_adds_to_the_gradients_of_factors_and_leaves_all_others():
    _, _, variables, kernels = prepared("trained")
    plan = cf.FactorizationPlan.from_ranks(kernels, {"conv": 2})
    params = cf.factorize_params(variables["params"], plan)
    gradients = jax.tree.map(np.ones_like, params)
    tx = cf.frobenius_decay(0.3, plan)
    actual, state = once(lambda *args: tx.update(args[0], tx.init(args[1]), args[1]), gradients, params)
    added = jax.tree.map(lambda new, old: np.max(np.abs(new - old)), actual, gradients)
    expected = once(jax.grad(lambda params: penalty(params, plan, 0.3)), params)
    chex.assert_trees_all_close(actual, jax.tree.map(np.add, gradients, expected), rtol=1e-5)
    assert added["conv"]["u"]["kernel"] > 0
    assert added["conv"]["v"]["kernel"] > 0
    assert added["conv"]["v"]["bias"] == 0
    assert max(jax.tree.leaves([added["conv_1"], added["head"], added["norm"]])) == 0
    chex.assert_trees_all_equal(gradients, jax.tree.map(np.ones_like, params))  # not changed
    assert jax.tree.leaves(state) == []


def test_gradient_descent_on_it_is_gradient_descent_on_the_penalty():
    plan, params = factorized("attention")
    tx = optax.chain(cf.frobenius_decay(0.5, plan), optax.sgd(0.2))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(zeros(params), state, params)
        return optax.apply_updates(params, updates), state

    state, values = tx.init(params), []
    for _ in range(8):
        values.append(float(penalty(params, plan, 0.5)))
        params, state = step(params, state)
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.7 * values[0]


def equations(jaxpr):
    """All equations of a jaxpr, those of nested calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for sub in jax.tree.leaves(
            [*equation.params.values()], is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            sub = getattr(sub, "jaxpr", sub)
            if hasattr(sub, "eqns"):
                yield from equations(sub)


def largest_array(fn, *args):
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    return max(np.prod(var.aval.shape) for equation in equations(jaxpr) for var in equation.outvars)


def test_the_product_is_never_formed():
    model, x = nn.Dense(80), jnp.ones((1, 96))
    plan = cf.FactorizationPlan.from_ranks(cf.find_kernels(model, x), {"": 5})
    params = {"u": {"kernel": jnp.ones((96, 5))}, "v": {"kernel": jnp.ones((5, 80)), "bias": jnp.ones(80)}}
    tx = cf.frobenius_decay(0.3, plan)
    assert largest_array(tx.update, params, tx.init(params), params) <= 96 * 5
    assert largest_array(jax.jit(jax.grad(lambda p: penalty(p, plan, 0.3))), params) >= 96 * 80  # it counts


def test_together_with_weight_decay_on_everything_else():
    # As the recipes do: L2 on the kernels that are not factorized, none on one-dimensional parameters.
    _, _, variables, kernels = prepared("trained")
    plan = cf.FactorizationPlan.from_ranks(kernels, {"conv": 2, "head": 3})
    params = cf.factorize_params(variables["params"], plan)

    def kernels_but_factors(tree):
        return {
            key: jax.tree.map(lambda leaf, path=key: leaf.ndim > 1 and path not in plan.ranks, layer)
            for key, layer in tree.items()
        }

    weight_decay = optax.add_decayed_weights(0.1, mask=kernels_but_factors)
    tx = optax.chain(weight_decay, cf.frobenius_decay(0.3, plan), optax.sgd(1.0))
    actual, _ = once(lambda params: tx.update(zeros(params), tx.init(params), params), params)
    expected = once(lambda params: jax.grad(penalty)(params, plan, -0.3), params)
    expected["conv_1"]["kernel"] = -0.1 * params["conv_1"]["kernel"]
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert not np.any(actual["norm"]["scale"])


def test_gradients_keep_their_dtype():
    plan, params = factorized("dense")
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    tx = cf.frobenius_decay(0.3, plan)
    for gradients, weights in ((zeros(params), half), (zeros(half), params), (zeros(half), half)):
        actual, _ = tx.update(gradients, tx.init(weights), weights)
        chex.assert_trees_all_equal_dtypes(actual, gradients)
        expected = jax.grad(penalty)(params, plan, 0.3)["u"]["kernel"]
        np.testing.assert_allclose(
            np.asarray(actual["u"]["kernel"], np.float32), expected, atol=2e-2 * np.max(np.abs(expected))
        )


def test_no_decay_and_no_layers_change_nothing():
    plan, params = factorized("sequential")
    gradients = jax.tree.map(np.ones_like, params)
    for tx in (
        cf.frobenius_decay(0, plan),
        cf.frobenius_decay(0.3, cf.FactorizationPlan.from_ranks(plan.kernels, {})),
    ):
        chex.assert_trees_all_equal(tx.update(gradients, tx.init(params), params)[0], gradients)


# --- Errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coefficient", [-1e-4, float("nan"), -float("inf")])
def test_a_coefficient_below_zero_is_refused(coefficient):
    plan, _ = factorized("dense")
    with pytest.raises(ValueError, match=r"frobenius_decay coefficient .* is not a number >= 0"):
        cf.frobenius_decay(coefficient, plan)


def test_extra_batch_norms_are_refused():
    plan = plan_at(prepared("dense")[-1], extra_batch_norm=True)
    with pytest.raises(ValueError, match="extra batch norms and Frobenius decay exclude each other"):
        cf.frobenius_decay(1e-4, plan)


def test_it_needs_the_factorized_params():
    plan, params = factorized("sequential")
    full = prepared("sequential")[2]["params"]
    tx = cf.frobenius_decay(1e-4, plan)
    with pytest.raises(ValueError, match="frobenius_decay needs params"):
        tx.update(zeros(params), tx.init(params))
    with pytest.raises(ValueError, match="the layer at 'layers_0' is not factorized"):
        tx.update(zeros(full), tx.init(full), full)
