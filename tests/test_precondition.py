"""Preconditioned factors: the step of their product against the kernel's own, in float64 NumPy."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from linen_zoo import once, plan_at, prepared

import cuttlefish_jax as cf
from cuttlefish_jax.factorize import factor_matrices
from cuttlefish_jax.moments import project_momentum

M, N = 9, 6
KERNELS = cf.find_kernels(nn.Dense(N), jnp.ones((1, M)))
RNG = np.random.default_rng(0)
W, G = RNG.standard_normal((2, M, N))


def plan_of(rank):
    return cf.FactorizationPlan.from_ranks(KERNELS, {"": rank})


def pair(u, v):
    return {"u": {"kernel": jnp.asarray(u)}, "v": {"kernel": jnp.asarray(v)}}


def factors_of(w, rank):
    p, s, q = np.linalg.svd(w, full_matrices=False)
    return p[:, :rank] * np.sqrt(s[:rank]), np.sqrt(s[:rank])[:, None] * q[:rank]


def updated(tx, u, v, rate=1.0):
    """The product after a step against the gradient ``G`` of the kernel."""
    updates, _ = tx.update(pair(G @ v.T, u.T @ G), tx.init(None), pair(u, v))
    return (u - rate * np.asarray(updates["u"]["kernel"], np.float64)) @ (
        v - rate * np.asarray(updates["v"]["kernel"], np.float64)
    )


def tangent(g, u, v):
    """The projection of a kernel's step on what matrices of the rank can follow."""
    p_u, p_v = u @ np.linalg.pinv(u), np.linalg.pinv(v) @ v
    return g @ p_v + p_u @ g - p_u @ g @ p_v


@pytest.mark.parametrize(("options", "share"), [({}, 1.0), ({"once": False}, 0.5)])
def test_at_full_rank_it_is_the_kernels_own_step_to_second_order(options, share):
    errors = []
    with jax.enable_x64(True):
        tx = cf.precondition_factors(plan_of(N), damping=0.0, **options)
        # Published: at half the rate, as square factors move everything twice.
        w = W[:N] if options else W
        kernels = cf.find_kernels(nn.Dense(N), jnp.ones((1, len(w))))
        tx = cf.precondition_factors(
            cf.FactorizationPlan.from_ranks(kernels, {"": N}), damping=0.0, **options
        )
        u, v = factors_of(w, N)
        g = G[: len(w)]
        for rate in (1e-2, 1e-3, 1e-4):
            updates, _ = tx.update(pair(g @ v.T, u.T @ g), tx.init(None), pair(u, v))
            assert updates["u"]["kernel"].dtype == jnp.float64
            du, dv = (share * rate * np.asarray(updates[name]["kernel"]) for name in "uv")
            errors.append(np.linalg.norm((u - du) @ (v - dv) - (w - rate * g)))
    assert errors[0] > 0
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 100, rtol=1e-3)


@pytest.mark.parametrize("split", [1.0, 30.0])
def test_the_product_moves_by_the_projected_step_however_it_is_split(split):
    tx, rate = cf.precondition_factors(plan_of(3), damping=0.0), 1e-3
    u, v = factors_of(W, 3)
    mix = np.eye(3) + np.triu(RNG.standard_normal((3, 3)), 1)
    u, v = u @ mix / split, split * np.linalg.inv(mix) @ v
    step = (u @ v - updated(tx, u, v, rate)) / rate
    np.testing.assert_allclose(step, tangent(G, u, v), atol=3e-3)


def test_the_published_step_counts_twice_what_both_factors_move():
    tx, rate = cf.precondition_factors(plan_of(3), damping=0.0, once=False), 1e-3
    u, v = factors_of(W, 3)
    both = u @ np.linalg.pinv(u) @ G @ np.linalg.pinv(v) @ v
    step = (u @ v - updated(tx, u, v, rate)) / rate
    np.testing.assert_allclose(step, tangent(G, u, v) + both, atol=3e-3)


def test_normalized_updates_keep_their_norm_in_the_product():
    tx = cf.precondition_factors(plan_of(3), damping=0.0, normalized=True)
    u, v = factors_of(W, 3)
    u, v = 10 * u, v / 10
    a_u, a_v = RNG.standard_normal((M, 3)), RNG.standard_normal((3, N))
    updates, _ = tx.update(pair(a_u, a_v), tx.init(None), pair(u, v))
    du, dv = (np.asarray(updates[name]["kernel"], np.float64) for name in "uv")
    for moved, update in ((du @ v, a_u), (u @ dv, a_v)):
        np.testing.assert_allclose(np.linalg.norm(moved), np.linalg.norm(update), rtol=1e-5)


def test_damping_bounds_the_steps_of_vanishing_singular_values():
    u, v = factors_of(W, 3)
    u[:, 2] *= 1e-6
    v[2] *= 1e-6
    mean = np.trace(v @ v.T) / 3
    for damping in (0.0, 1e-2):
        updates, _ = (tx := cf.precondition_factors(plan_of(3), damping=damping, once=False)).update(
            pair(G @ v.T, u.T @ G), tx.init(None), pair(u, v)
        )
        found = np.asarray(updates["u"]["kernel"])
        assert np.all(np.isfinite(found))
        expected = G @ v.T @ np.linalg.inv(v @ v.T + damping * mean * np.eye(3))
        if damping:
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    zeros = pair(np.zeros((M, 3)), np.zeros((3, N)))
    updates, _ = tx.update(zeros, tx.init(None), zeros)
    chex.assert_trees_all_equal(updates, zeros)


@pytest.mark.parametrize("name", ["trained", "general_apart", "scan_last"])
def test_layers_of_every_kind(name):
    """Convolutions, several axes, stacks; and no other param is touched."""
    _, _, variables, kernels = prepared(name)
    plan = plan_at(kernels, 0.5)
    gradients = jax.tree.map(
        lambda leaf: np.random.default_rng(leaf.size).standard_normal(leaf.shape).astype(leaf.dtype),
        variables["params"],
    )
    params = cf.factorize_params(variables["params"], plan)
    tx = cf.precondition_factors(plan, damping=0.0)

    def step(params, gradients):
        updates = project_momentum(gradients, params, plan)  # the gradients of the factors
        return updates, tx.update(updates, tx.init(params), params)[0]

    before, after = once(step, params, gradients)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for path in plan.ranks:
        matrix = np.asarray(plan.kernels[path].to_matrix(cf.kernels.subtree(gradients, path)["kernel"]))
        (u, v), (du, dv) = factor_matrices(params, plan)[path], factor_matrices(after, plan)[path]
        stacks = (matrix, u, v, du @ v + u @ dv)
        flat = [np.reshape(np.asarray(x, np.float64), (-1, *x.shape[-2:])) for x in stacks]
        for g, u_one, v_one, moved in zip(*flat, strict=True):
            np.testing.assert_allclose(moved, tangent(g, u_one, v_one), rtol=1e-3, atol=1e-3)

    def others(tree):
        return [
            leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree) if str(keys[-1]) != "['kernel']"
        ]

    chex.assert_trees_all_equal(others(before), others(after))


def test_a_state_of_nnx():
    model = cf.factorize(nnx.Linear(M, N, rngs=nnx.Rngs(0)), plan_of(3))
    params = nnx.state(model, nnx.Param)
    updates = jax.tree.map(jnp.ones_like, params)
    tx = cf.precondition_factors(plan_of(3))
    found, _ = tx.update(updates, tx.init(params), params)
    plain = {name: {"kernel": params[name]["kernel"].get_value()} for name in "uv"}
    expected, _ = tx.update(jax.tree.map(jnp.ones_like, plain), tx.init(plain), plain)
    assert isinstance(found, nnx.State)
    for name in "uv":
        chex.assert_trees_all_close(found[name]["kernel"], expected[name]["kernel"])
    optimizer = nnx.Optimizer(model, optax.chain(tx, optax.sgd(0.1)), wrt=nnx.Param)
    optimizer.update(model, updates)
    assert np.all(np.isfinite(model.u.kernel.get_value()))


def test_the_next_step_after_a_switch_at_full_rank_is_the_kernels():
    """Momentum and decay included: a switch that training does not notice."""
    plan, rate = plan_of(N), 1e-3
    params = {"kernel": jnp.asarray(W, jnp.float32), "bias": jnp.zeros(N)}
    gradient = {"kernel": jnp.asarray(G, jnp.float32), "bias": jnp.ones(N)}

    def chain(decay, precondition):
        return optax.chain(decay, optax.trace(0.9), precondition, optax.scale(-rate))

    full = chain(optax.add_decayed_weights(0.1, mask={"kernel": True, "bias": False}), optax.identity())
    low = chain(cf.frobenius_decay(0.1, plan), cf.precondition_factors(plan, damping=0.0))
    _, state = full.update(jax.tree.map(jnp.square, gradient), full.init(params), params)
    expected, _ = full.update(gradient, state, params)

    params_low = cf.factorize_params(params, plan)
    carried = cf.carry_opt_state(state, params, params_low, low, plan)
    updates, _ = low.update(project_momentum(gradient, params_low, plan), carried, params_low)
    moved = cf.merge_params(optax.apply_updates(params_low, updates), plan)["kernel"] - params["kernel"]
    error = np.linalg.norm(moved - expected["kernel"]) / np.linalg.norm(expected["kernel"])
    assert error < 5e-3
    # The plain step is another one altogether.
    plain = chain(cf.frobenius_decay(0.1, plan), optax.identity())
    updates, _ = plain.update(project_momentum(gradient, params_low, plan), carried, params_low)
    moved = cf.merge_params(optax.apply_updates(params_low, updates), plan)["kernel"] - params["kernel"]
    assert np.linalg.norm(moved - expected["kernel"]) > 0.3 * np.linalg.norm(expected["kernel"])


# --- Errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [-1e-4, float("nan")])
def test_a_damping_below_zero_is_refused(damping):
    with pytest.raises(ValueError, match=r"precondition_factors damping .* is not a number >= 0"):
        cf.precondition_factors(plan_of(2), damping=damping)


def test_extra_batch_norms_are_refused():
    plan = cf.FactorizationPlan.from_ranks(KERNELS, {"": 2}, extra_batch_norm=True)
    with pytest.raises(ValueError, match="extra batch norms and preconditioned factors exclude each other"):
        cf.precondition_factors(plan)


def test_it_needs_params():
    tx = cf.precondition_factors(plan_of(2))
    with pytest.raises(ValueError, match="precondition_factors needs params"):
        tx.update(pair(*factors_of(W, 2)), tx.init(None))
