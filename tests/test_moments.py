"""What an optimizer remembers, in factor space: against the factorized model's own gradients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linen_zoo import CASES, once, plan_at, prepared
from scipy.linalg import hadamard

import cuttlefish_jax as cf
from cuttlefish_jax.kernels import Kernel, Kernels, subtree
from cuttlefish_jax.moments import project_average, project_momentum, project_second_moment

STACKED = Kernels(
    (
        Kernel(
            path="blocks/fc", layer="Dense", shape=(16, 3, 10), reduction_axes=(0,), output_axes=(2,),
            stack_axes=(1,),
        ),
        Kernel(path="conv", layer="Conv", shape=(3, 2, 9), reduction_axes=(0, 1), output_axes=(2,)),
        Kernel(path="kept", layer="Dense", shape=(4, 4), reduction_axes=(0,), output_axes=(1,)),
    )
)  # fmt: skip
PLAN = cf.FactorizationPlan.from_ranks(STACKED, {"blocks/fc": 4, "conv": 3})


def random_params(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)

    def layer(path):
        kernel = jnp.asarray(rng.standard_normal(STACKED[path].shape), dtype)
        return {"kernel": kernel, "bias": jnp.asarray(rng.standard_normal(5), dtype)}

    return {"blocks": {"fc": layer("blocks/fc")}, "conv": layer("conv"), "kept": layer("kept")}


def as_matrix(kernel, array):
    """A kernel read as a matrix, in float64 NumPy."""
    order = kernel.stack_axes + kernel.reduction_axes + kernel.output_axes
    return np.transpose(np.asarray(array, np.float64), order).reshape(*kernel.stack_shape, kernel.m, kernel.n)


def matrix(tree, path):
    return as_matrix(STACKED[path], subtree(tree, path)["kernel"])


def matrices(tree, path, plan=PLAN):
    """The matrices in the places of a layer's two factors."""
    factors = plan.kernels[path].factors(plan.ranks[path])
    return tuple(as_matrix(factor, subtree(tree, factor.path)["kernel"]) for factor in factors)


# --- First moments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["trained", "attention", "scan_last", "setup_shared"])
def test_momentum_is_what_would_have_gathered_in_the_frozen_factors(name):
    model, inputs, variables, kernels = prepared(name)
    args, kwargs = inputs[1:], CASES[name].kwargs
    plan = plan_at(kernels, 0.5)
    params_low = cf.factorize_params(variables["params"], plan)
    low = cf.factorize(model, plan)
    tx = optax.trace(decay=0.9, nesterov=True)

    batches = jnp.asarray(np.random.default_rng(2).standard_normal((4, *inputs[0].shape)), jnp.float32)

    def gather(apply, params):
        """The momentum after four batches."""

        def loss(params, x):
            return jnp.sum(jnp.tanh(apply({**variables, "params": params}, x, *args, **kwargs)) ** 2)

        def step(trace, x):
            return tx.update(jax.grad(loss)(params, x), trace)[1], None

        return jax.lax.scan(step, tx.init(params), batches)[0].trace

    def both(params_low):
        params = cf.merge_params(params_low, plan)  # the same function, so the same gradients
        return gather(low.apply, params_low), gather(model.apply, params)

    expected, full = once(both, params_low)
    actual = project_momentum(full, params_low, plan)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(expected) if leaf.size)
    size = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(expected))
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=2e-6 * size)


def test_momentum_of_stacked_layers_against_numpy():
    params_low, momentum = cf.factorize_params(random_params(0), PLAN), random_params(1)
    projected = project_momentum(momentum, params_low, PLAN)
    for path in PLAN.ranks:
        u, v = matrices(params_low, path)
        at_u, at_v = matrices(projected, path)
        expected_u = matrix(momentum, path) @ np.swapaxes(v, -1, -2)
        expected_v = np.swapaxes(u, -1, -2) @ matrix(momentum, path)
        np.testing.assert_allclose(at_u, expected_u, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(at_v, expected_v, rtol=1e-5, atol=1e-5)


# --- Second moments -----------------------------------------------------------------------------------------


def test_second_moments_of_uncorrelated_gradients_are_exact():
    # Gradients with the signs of a Hadamard matrix: over all of them, no two entries are correlated.
    rng, m, n = np.random.default_rng(0), 8, 4
    kernels = Kernels((Kernel(path="x", layer="Dense", shape=(m, n), reduction_axes=(0,), output_axes=(1,)),))
    plan = cf.FactorizationPlan.from_ranks(kernels, {"x": 2})
    params_low = cf.factorize_params({"x": {"kernel": jnp.asarray(rng.standard_normal((m, n)))}}, plan)
    gradients = hadamard(m * n).reshape(-1, m, n) * rng.uniform(0.5, 2, (m, n))
    second_moment = {"x": {"kernel": jnp.asarray(np.mean(gradients**2, axis=0), jnp.float32)}}
    projected = matrices(project_second_moment(second_moment, params_low, plan), "x", plan)
    u, v = matrices(params_low, "x", plan)
    np.testing.assert_allclose(projected[0], np.mean((gradients @ v.T) ** 2, axis=0), rtol=1e-5)
    np.testing.assert_allclose(projected[1], np.mean((u.T @ gradients) ** 2, axis=0), rtol=1e-5)


def test_second_moments_against_numpy_and_never_negative():
    params_low = cf.factorize_params(random_params(0), PLAN)
    second_moment = jax.tree.map(np.square, random_params(1))
    projected = project_second_moment(second_moment, params_low, PLAN)
    for path in PLAN.ranks:
        u, v = matrices(params_low, path)
        at_u, at_v = matrices(projected, path)
        expected_u = matrix(second_moment, path) @ np.swapaxes(v**2, -1, -2)
        expected_v = np.swapaxes(u**2, -1, -2) @ matrix(second_moment, path)
        np.testing.assert_allclose(at_u, expected_u, rtol=1e-5)
        np.testing.assert_allclose(at_v, expected_v, rtol=1e-5)
        assert min(at_u.min(), at_v.min()) >= 0


def test_second_moments_of_correlated_gradients_take_their_size_from_the_first_moment():
    # All gradients are multiples of one: what the factors see of it adds up, or cancels.
    rng = np.random.default_rng(4)
    kernels = Kernels((Kernel(path="x", layer="Dense", shape=(9, 7), reduction_axes=(0,), output_axes=(1,)),))
    plan = cf.FactorizationPlan.from_ranks(kernels, {"x": 3})
    params_low = cf.factorize_params({"x": {"kernel": jnp.asarray(rng.standard_normal((9, 7)))}}, plan)
    u, v = matrices(params_low, "x", plan)
    gradient = u @ v + 0.1 * rng.standard_normal((9, 7))
    square, mean = ({"x": {"kernel": jnp.asarray(x, jnp.float32)}} for x in (4 * gradient**2, 0.3 * gradient))
    actual = matrices(project_second_moment(square, params_low, plan, momentum=mean), "x", plan)
    apart = matrices(project_second_moment(square, params_low, plan), "x", plan)
    true = 4 * (gradient @ v.T) ** 2, 4 * (u.T @ gradient) ** 2
    left = (4 - 0.3**2) * gradient**2  # the square without that of the mean
    floors = left @ (v.T**2) + 0.3**2 / 4 * true[0], (u.T**2) @ left + 0.3**2 / 4 * true[1]
    for axis, found, uncorrelated, expected, floor in zip((0, 1), actual, apart, true, floors, strict=True):
        share = expected.sum(axis, keepdims=True) / uncorrelated.sum(axis, keepdims=True)
        assert np.max(share) > 2
        np.testing.assert_allclose(found, np.maximum(share * uncorrelated, floor), rtol=1e-4)
    none = jax.tree.map(jnp.zeros_like, mean)
    chex.assert_trees_all_equal(
        project_second_moment(square, params_low, plan, momentum=none),
        project_second_moment(square, params_low, plan),
    )


# --- Averages -----------------------------------------------------------------------------------------------


def test_the_average_of_constant_params_is_the_factors_themselves():
    params = random_params(0)
    params_low = cf.factorize_params(params, PLAN)
    chex.assert_trees_all_close(project_average(params, params_low, PLAN), params_low, rtol=1e-5, atol=1e-5)


def test_an_average_is_the_nearest_product_on_the_rows_of_v():
    params_low, average = cf.factorize_params(random_params(0), PLAN), random_params(1)
    projected = project_average(average, params_low, PLAN)
    for path in PLAN.ranks:
        _, v = matrices(params_low, path)
        at_u, at_v = matrices(projected, path)
        np.testing.assert_array_equal(at_v, v)
        np.testing.assert_allclose(
            at_u @ at_v, matrix(average, path) @ np.linalg.pinv(v) @ v, rtol=1e-4, atol=1e-5
        )


# Below full rank, and rounded to bfloat16, the rows of V are not orthogonal.
@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
@pytest.mark.parametrize(
    ("rank", "dtype", "tolerance"), [(0, jnp.float32, 0), (1, jnp.float32, 1e-5), (6, jnp.bfloat16, 1e-2)]
)
def test_an_average_of_rank_deficient_or_rounded_params_does_not_grow(shape, rank, dtype, tolerance):
    rng, (m, n) = np.random.default_rng(0), shape
    product = rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n))
    kernels = Kernels((Kernel(path="x", layer="Dense", shape=shape, reduction_axes=(0,), output_axes=(1,)),))
    plan = cf.FactorizationPlan.from_ranks(kernels, {"x": 6})
    params = {"x": {"kernel": jnp.asarray(product, dtype)}}
    params_low = cf.factorize_params(params, plan)
    at_u, at_v = matrices(project_average(params, params_low, plan), "x", plan)
    assert np.linalg.norm(at_u @ at_v - product) <= tolerance * np.linalg.norm(product)


# --- All three ----------------------------------------------------------------------------------------------

PROJECTIONS = (project_momentum, project_second_moment, project_average)


@pytest.mark.parametrize("project", PROJECTIONS)
def test_what_is_not_a_kernel_moves_and_stays_as_it_is(project):
    params_low, tree = cf.factorize_params(random_params(0), PLAN), random_params(1)
    projected = project(tree, params_low, PLAN)
    assert jax.tree.structure(projected) == jax.tree.structure(params_low)
    assert projected["conv"]["v"]["bias"] is tree["conv"]["bias"]
    assert projected["kept"]["kernel"] is tree["kept"]["kernel"]
    assert tree["conv"].keys() == {"kernel", "bias"}


@pytest.mark.parametrize("project", PROJECTIONS)
def test_masked_nodes_stay_masked(project):
    params_low, tree = cf.factorize_params(random_params(0), PLAN), random_params(1)
    masked = {**tree, "conv": {"kernel": optax.MaskedNode(), "bias": optax.MaskedNode()}}
    projected, expected = project(masked, params_low, PLAN), project(tree, params_low, PLAN)
    node = {"kernel": optax.MaskedNode()}
    assert projected["conv"] == {"u": node, "v": {**node, "bias": optax.MaskedNode()}}
    chex.assert_trees_all_close(projected["blocks"], expected["blocks"])


@pytest.mark.parametrize("project", PROJECTIONS)
def test_a_moment_keeps_its_dtype(project):
    params_low = cf.factorize_params(random_params(0), PLAN)
    projected = project(random_params(1, jnp.bfloat16), params_low, PLAN)
    assert {leaf.dtype for leaf in jax.tree.leaves(projected)} == {jnp.dtype(jnp.bfloat16)}
    exact = project(random_params(1), params_low, PLAN)
    for actual, expected in zip(jax.tree.leaves(projected), jax.tree.leaves(exact), strict=True):
        error = np.linalg.norm(np.asarray(actual, np.float32) - expected)
        assert error < 1e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("project", PROJECTIONS)
def test_params_that_are_not_factorized_are_refused(project):
    with pytest.raises(ValueError, match="the layer at 'blocks/fc' is not factorized"):
        project(random_params(1), random_params(0), PLAN)
