"""Factors and singular values in the metric of the inputs, judged in float64 NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_factorize import NETWORK, as_matrix, check_balanced, halves, matrix_of, network_params, plan_at

import cuttlefish_jax as cf
from cuttlefish_jax.whitening import RIDGE


def covariance(size, seed, decay):
    """Second moments of inputs whose variance falls from direction to direction, ``f64[size, size]``."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.standard_normal((size, size)))
    return (q * decay ** np.arange(size)) @ q.T


def calibrated(params, decay=0.5, kernels=NETWORK):
    """``S`` of every kernel, ``f64[*stack, m, m]``, and the calibration that says so."""
    moments, calibration = {}, {}
    for index, (path, kernel) in enumerate(kernels.items()):
        copies = range(math.prod(kernel.stack_shape))
        stack = np.stack([covariance(kernel.m, (index, copy), decay) for copy in copies])
        stack = stack.reshape(*kernel.stack_shape, kernel.m, kernel.m)
        moments[path] = stack
        product = jnp.asarray(stack @ matrix_of(params, kernel), jnp.float32)
        calibration[path] = kernel.from_matrix(product)
    return moments, calibration


def whitened(matrix, moments):
    """``L^T W``, in float64, with the share of white inputs that is added."""
    share = np.trace(np.swapaxes(matrix, -1, -2) @ moments @ matrix, axis1=-2, axis2=-1)
    share = RIDGE * share / np.sum(matrix**2, axis=(-2, -1))
    moments = moments + share[..., None, None] * np.eye(moments.shape[-1])
    return np.swapaxes(np.linalg.cholesky(moments), -1, -2)


@pytest.mark.parametrize("decay", [1.0, 0.7, 0.1])
def test_no_factors_of_the_same_rank_change_the_outputs_less(decay):
    params, plan = network_params(), plan_at(NETWORK, 0.25)
    moments, calibration = calibrated(params, decay)
    low = cf.factorize_params(params, plan, calibration=calibration)
    for path, kernel in NETWORK.items():
        matrix = matrix_of(params, kernel)
        root = whitened(matrix, moments[path])
        u, v = halves(low, plan, path)
        tail = np.linalg.svd(root @ matrix, compute_uv=False)[..., plan.ranks[path] :]
        best = np.linalg.norm(tail, axis=-1)
        error = np.linalg.norm(root @ (matrix - u @ v), axis=(-2, -1))
        whole = np.linalg.norm(root @ matrix, axis=(-2, -1))
        assert np.all(error <= best + 1e-3 * best + 1e-4 * whole), path
        check_balanced(u @ v, u, v)


def test_of_white_inputs_the_factors_are_those_of_the_plain_svd():
    params, plan = network_params(), plan_at(NETWORK, 0.5)
    _, calibration = calibrated(params, decay=1.0)
    low = cf.factorize_params(params, plan, calibration=calibration)
    plain = cf.factorize_params(params, plan)
    for path in NETWORK:
        (u, v), (a, b) = halves(low, plan, path), halves(plain, plan, path)
        np.testing.assert_allclose(u @ v, a @ b, atol=2e-3 * np.max(np.abs(a @ b)))


def test_at_full_rank_the_product_is_the_kernel():
    params, plan = network_params(), plan_at(NETWORK)
    _, calibration = calibrated(params, decay=0.3)
    low = cf.factorize_params(params, plan, calibration=calibration)
    for path in NETWORK:
        matrix = matrix_of(params, NETWORK[path])
        u, v = halves(low, plan, path)
        assert np.linalg.norm(u @ v - matrix) < 5e-6 * np.linalg.norm(matrix)


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_singular_values_are_the_whitened_ones_at_any_scale(scale):
    params = jax.tree.map(lambda leaf: leaf * np.float32(scale), network_params())
    moments, calibration = calibrated(params, decay=0.8)
    found = cf.singular_values(params, NETWORK, calibration=calibration)
    assert list(found) == list(NETWORK)
    for path, kernel in NETWORK.items():
        matrix = matrix_of(params, kernel)
        expected = np.linalg.svd(whitened(matrix, moments[path]) @ matrix, compute_uv=False)
        np.testing.assert_allclose(found[path], expected, atol=1e-3 * np.max(expected), rtol=0, err_msg=path)


@pytest.mark.parametrize("nothing", [0.0, np.nan, np.inf])
def test_a_layer_of_which_nothing_is_known_is_factorized_as_without(nothing):
    params, plan = network_params(), plan_at(NETWORK, 0.25)
    _, calibration = calibrated(params)
    for path in ("tall", "wide"):
        calibration[path] = jnp.full_like(calibration[path], nothing)
    low, plain = (cf.factorize_params(params, plan, calibration=x) for x in (calibration, None))
    sigmas, plain_sigmas = (cf.singular_values(params, NETWORK, calibration=x) for x in (calibration, None))
    for path in ("tall", "wide"):
        (u, v), (a, b) = halves(low, plan, path), halves(plain, plan, path)
        np.testing.assert_allclose(u @ v, a @ b, atol=1e-4)
        np.testing.assert_allclose(sigmas[path], plain_sigmas[path], rtol=1e-3)
    (u, v), (a, b) = (halves(tree, plan, "square") for tree in (low, plain))
    assert np.max(np.abs(u @ v - a @ b)) > 0.1


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (1, 5), (5, 1), (1, 1)])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_degenerate_kernels_have_finite_factors(shape, value):
    kernel = cf.Kernel(path="x", layer="Dense", shape=shape, reduction_axes=(0,), output_axes=(1,))
    kernels = cf.Kernels((kernel,))
    plan = cf.FactorizationPlan.from_ranks(kernels, {"x": min(shape)})
    matrix = np.full(shape, value, np.float32)  # zeros, or of rank one
    calibration = {"x": jnp.asarray(covariance(shape[0], 0, 0.5) @ matrix, jnp.float32)}
    low = cf.factorize_params({"x": {"kernel": jnp.asarray(matrix)}}, plan, calibration=calibration)
    u, v = (as_matrix(k, low["x"][k.path[-1]]["kernel"]) for k in kernel.factors(min(shape)))
    np.testing.assert_allclose(u @ v, matrix, atol=1e-5)
    sigmas = cf.singular_values({"x": {"kernel": matrix}}, kernels, calibration=calibration)
    assert np.all(np.isfinite(sigmas["x"]))


def test_a_broken_kernel_breaks_no_other():
    params, plan = network_params(), plan_at(NETWORK, 0.25)
    _, calibration = calibrated(params)
    whole = cf.factorize_params(params, plan, calibration=calibration)
    params["tall"]["kernel"] = params["tall"]["kernel"].at[0, 0].set(jnp.nan)
    low = cf.factorize_params(params, plan, calibration=calibration)
    assert np.all(np.isnan(halves(low, plan, "tall")[0]))
    assert np.all(np.isnan(cf.singular_values(params, NETWORK, calibration=calibration)["tall"]))
    for path in NETWORK:
        if path != "tall":
            for broken, intact in zip(halves(low, plan, path), halves(whole, plan, path), strict=True):
                np.testing.assert_array_equal(broken, intact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.pop("tall"), "the calibration has no 'tall': calibrate all kernels of the plan"),
        (
            lambda found: found.update(tall=jnp.ones((16, 48))),
            r"the calibration of 'tall' has shape \(16, 48\), expected \(48, 16\): it is of another model",
        ),
    ],
)
@pytest.mark.parametrize("use", ["factorize_params", "singular_values"])
def test_calibrations_of_other_models_are_refused(change, message, use):
    params, plan = network_params(), plan_at(NETWORK, 0.25)
    _, calibration = calibrated(params)
    change(calibration)
    second = plan if use == "factorize_params" else NETWORK
    with pytest.raises(ValueError, match=message):
        getattr(cf, use)(params, second, calibration=calibration)
