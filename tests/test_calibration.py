"""What layers are given: measured in one backward pass, judged by their inputs in float64 NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import linen_zoo
import nnx_zoo
import numpy as np
import pytest
from flax import nnx
from linen_modules import Block

import cuttlefish_jax as cf
from cuttlefish_jax.kernels import subtree, unboxed
from cuttlefish_jax.nnx.params import to_dict


def matrix(kernel, array):
    return np.asarray(kernel.to_matrix(unboxed(array)), np.float64)


def output_moments(kernels, params, calibration):
    """``W^T S W`` of every kernel, ``f64[*stack, n, n]``: what has to be symmetric, and have no signs."""
    for path, kernel in kernels.items():
        of_outputs = np.swapaxes(matrix(kernel, subtree(params, path)[kernel.param]), -1, -2)
        yield path, of_outputs @ matrix(kernel, calibration[path])


def check_moments(kernels, params, calibration):
    assert calibration.keys() == kernels.keys()
    for path, moments in output_moments(kernels, params, calibration):
        assert calibration[path].shape == kernels[path].shape and calibration[path].dtype == jnp.float32
        if "embedding" in kernels[path].param:
            assert not np.any(calibration[path])
            continue
        largest = np.max(np.abs(moments))
        assert largest > 0, path
        np.testing.assert_allclose(moments, np.swapaxes(moments, -1, -2), atol=1e-5 * largest, err_msg=path)
        assert np.min(np.linalg.eigvalsh(moments)) > -1e-5 * largest, path


# Of "projection" the outputs are scaled one by one: no moments of its inputs alone would do.
@pytest.mark.parametrize(
    "name", [name for name, case in linen_zoo.CASES.items() if case.positions and name != "projection"]
)
def test_every_linen_layer_is_observed(name):
    case = linen_zoo.CASES[name]
    model, inputs, variables, kernels = linen_zoo.prepared(name)
    rngs = {"dropout": jax.random.key(1)}
    mutable = [key for key in variables if key != "params"]
    calibration = linen_zoo.once(
        lambda variables: cf.calibrate(
            model, kernels, variables, *inputs, rngs=rngs, mutable=mutable, **case.kwargs
        ),
        variables,
    )
    check_moments(kernels, variables["params"], calibration)


@pytest.mark.parametrize("name", [name for name, case in nnx_zoo.CASES.items() if case.positions])
def test_every_nnx_layer_is_observed(name):
    case = nnx_zoo.CASES[name]
    model, inputs, kernels = nnx_zoo.prepared(name)
    options = {key: value for key, value in case.options.items() if key != "include_embeddings"}
    graphdef, state = nnx.split(model)
    calibration = nnx_zoo.once(
        lambda state: cf.calibrate(nnx.merge(graphdef, state), kernels, inputs, **options), state
    )
    check_moments(kernels, to_dict(nnx.state(model, nnx.Param)), calibration)


class Normed(nn.Module):
    """A convolution before a batch norm, one before a relu, and a dense layer."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3), name="normed")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = nn.Conv(7, (2, 2), strides=2, name="later")(x)
        x = nn.BatchNorm(use_running_average=not train, name="last")(nn.relu(x))
        return nn.Dense(4, name="out")(x.reshape(len(x), -1))


class NormedNNX(nnx.Module):
    """The same."""

    def __init__(self, rngs):
        self.normed = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)
        self.later = nnx.Conv(6, 7, (2, 2), strides=2, rngs=rngs)
        self.last = nnx.BatchNorm(7, use_running_average=True, rngs=rngs)
        self.out = nnx.Linear(112, 4, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.norm(self.normed(x)))
        x = self.last(jax.nn.relu(self.later(x)))
        return self.out(x.reshape(len(x), -1))


@pytest.fixture(scope="module")
def normed():
    model, x = Normed(), jax.random.normal(jax.random.key(0), (5, 8, 8, 3)) + 1
    variables = model.init(jax.random.key(1), x)
    # Biases that would show.
    params = jax.tree.map(lambda leaf: leaf + (leaf.ndim == 1) * 0.7, variables["params"])
    return model, {**variables, "params": params}, x


def windows(x, size, stride, padding):
    """The inputs of a convolution, position by position, ``f64[positions, size * size * channels]``."""
    x = np.pad(np.asarray(x, np.float64), [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    found = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))[:, ::stride, ::stride]
    return np.moveaxis(found, 3, -1).reshape(-1, size * size * x.shape[-1])


def test_the_moments_are_those_of_the_inputs(normed):
    model, variables, x = normed
    kernels = cf.find_kernels(model, x)
    calibration = jax.jit(lambda v, x: cf.calibrate(model, kernels, v, x))(variables, x)
    _, state = model.apply(variables, x, capture_intermediates=True)
    outputs = jax.tree.map(lambda leaf: leaf[0], state["intermediates"], is_leaf=lambda x: type(x) is tuple)
    of_norm, of_last = (np.maximum(outputs["norm"]["__call__"], 0), outputs["last"]["__call__"])
    inputs = {
        "normed": windows(x, 3, 1, 1),
        "later": windows(of_norm, 2, 2, 0),
        "out": np.asarray(of_last, np.float64).reshape(5, -1),
    }
    inputs["normed"] -= inputs["normed"].mean(0)  # which the batch norm takes away
    for path, given in inputs.items():
        expected = given.T @ given / len(given) @ matrix(kernels[path], variables["params"][path]["kernel"])
        np.testing.assert_allclose(
            matrix(kernels[path], calibration[path]), expected, atol=1e-5 * np.max(np.abs(expected))
        )


def test_an_nnx_model_is_measured_as_the_linen_model(normed):
    model, variables, x = normed
    same = NormedNNX(nnx.Rngs(0))
    for path, params in variables["params"].items():
        for name, value in params.items():
            getattr(getattr(same, path), name)[...] = value
    expected = cf.calibrate(model, cf.find_kernels(model, x), variables, x)
    kernels = cf.find_kernels(same, x)
    found = nnx.jit(lambda model, x: cf.calibrate(model, kernels, x))(same, x)
    assert found.keys() == expected.keys()
    for path, values in found.items():
        largest = np.max(np.abs(expected[path]))
        np.testing.assert_allclose(values, expected[path], atol=1e-5 * largest, err_msg=path)


def test_a_layer_that_no_output_depends_on_has_zeros():
    class Detached(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="used")(x) + jax.lax.stop_gradient(nn.Dense(3, name="cut")(x))

    model, x = Detached(), jnp.ones((2, 4))
    variables = model.init(jax.random.key(0), x)
    kernels = cf.find_kernels(model, x)
    calibration = cf.calibrate(model, kernels, variables, x)
    assert not np.any(calibration["cut"]) and np.any(calibration["used"])
    plan = cf.FactorizationPlan.from_ranks(kernels, {"cut": 1, "used": 1})
    low = cf.factorize_params(variables["params"], plan, calibration=calibration)
    plain = cf.factorize_params(variables["params"], plan)
    np.testing.assert_allclose(low["cut"]["u"]["kernel"], plain["cut"]["u"]["kernel"], atol=1e-5)


def test_nothing_is_left_of_a_measurement_in_compiled_submodules():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.jit(Block)(name="block")(x)

    model, x = Outer(), jax.random.normal(jax.random.key(0), (4, 6))
    variables = model.init(jax.random.key(0), x)
    kernels = cf.find_kernels(model, x)
    before = model.apply(variables, x)
    first = cf.calibrate(model, kernels, variables, x)
    np.testing.assert_array_equal(model.apply(variables, x), before)
    gradients = jax.grad(lambda v: jnp.sum(model.apply(v, x)))(variables)["params"]
    assert np.any(gradients["block"]["up"]["kernel"] != first["block/up"])
    np.testing.assert_array_equal(cf.calibrate(model, kernels, variables, x)["block/up"], first["block/up"])
    check_moments(kernels, variables["params"], first)


def test_only_flax_modules_are_calibrated(normed):
    model, _, x = normed
    with pytest.raises(TypeError, match="calibrate needs a Flax module, got function"):
        cf.calibrate(lambda x: x, cf.find_kernels(model, x), x)
    plan = cf.FactorizationPlan.from_ranks(cf.find_kernels(model, x), {"out": 1})
    with pytest.raises(ValueError, match="a Linen module has no params: give the calibration to"):
        cf.factorize(model, plan, calibration={})
