"""What layers are given in training batches, on eight devices, whole or split over them, against NumPy."""

import functools
from concurrent.futures import ThreadPoolExecutor

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from program_tools import collective_sizes
from test_recalibration import BATCH, DATA, FEATURES, TASK

import cuttlefish_jax as cf
from cuttlefish_jax.training.calibration import Calibrator
from cuttlefish_jax.training.parallelism import AXIS, DataParallel, FullySharded
from cuttlefish_jax.training.state import create_params, create_state
from cuttlefish_jax.training.step import abstract


class Network(nn.Module):
    """Wide enough to be split over devices."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(256, name="up")(x)
        x = nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name, name="norm")(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(3, name="down")(x)


@pytest.fixture(scope="module")
def network():
    model = Network()
    return model, cf.find_kernels(model, *TASK.inputs)


def layouts(model, kernels):
    params = jax.eval_shape(functools.partial(create_params, model, TASK.inputs))
    return {"pmap": DataParallel(), "fsdp": FullySharded.of(params, kernels)}


@pytest.fixture(scope="module")
def measured(network):
    """By layout: the state, the calibrator, and what it measured in two batches."""
    model, kernels = network
    found = {}
    for name, layout in layouts(model, kernels).items():
        state = layout.place(create_state(model, optax.sgd(0.1), TASK.inputs, seed=0, ema=False))
        calibrator = Calibrator(TASK, model, kernels, layout)
        calibration = calibrator.measure(state, DATA, epoch=2, batches=2)
        found[name] = state, calibrator, calibration
    return found


@pytest.mark.parametrize("layout", ["pmap", "fsdp"])
def test_the_mean_over_batches_and_devices(network, measured, layout):
    _, kernels = network
    state, _, calibration = measured[layout]
    assert calibration.keys() == kernels.keys() == {"up", "down"}
    parts = [np.asarray(batch["index"]) for batch in DATA.epoch(2)][:2]
    # float64[batches * devices, examples of one device, features]
    inputs = FEATURES.astype(np.float64)[np.stack(parts)].reshape(16, BATCH // 8, -1)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.params)
    hidden = np.maximum((inputs @ params["up"]["kernel"] + params["up"]["bias"]) / np.sqrt(1 + 1e-5), 0)
    centred = inputs - inputs.mean(1, keepdims=True)  # a device's batch norm takes the mean of its examples
    for path, given in {"up": centred, "down": hidden}.items():
        given = given.reshape(-1, given.shape[-1])
        expected = given.T @ given / len(given) @ params[path]["kernel"]
        np.testing.assert_allclose(calibration[path], expected, atol=1e-5 * np.max(np.abs(expected)))


def test_where_statistics_are_those_of_all_devices_so_is_the_mean(network, measured):
    state, _, _ = measured["pmap"]
    model, kernels = Network(axis_name=AXIS), network[1]
    calibration = Calibrator(TASK, model, kernels).measure(state, DATA, epoch=2, batches=1)
    inputs = FEATURES.astype(np.float64)[np.asarray(next(DATA.epoch(2))["index"])].reshape(BATCH, -1)
    given = inputs - inputs.mean(0)
    expected = given.T @ given / BATCH @ np.asarray(state.params["up"]["kernel"], np.float64)
    np.testing.assert_allclose(calibration["up"], expected, atol=1e-5 * np.max(np.abs(expected)))
    # On one device, where there is no such axis.
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    alone = cf.calibrate(model, kernels, variables, jnp.asarray(inputs, jnp.float32))
    np.testing.assert_allclose(alone["up"], expected, atol=1e-5 * np.max(np.abs(expected)))


@pytest.mark.parametrize("layout", ["pmap", "fsdp"])
def test_it_lies_as_the_kernels_do(network, measured, layout):
    state, calibrator, calibration = measured[layout]
    foreseen = calibrator.abstract(abstract(state))
    for path in network[1]:
        kernel = state.params[path]["kernel"]
        assert calibration[path].sharding == foreseen[path].sharding == kernel.sharding
    is_split = not calibration["up"].sharding.is_fully_replicated
    assert is_split == (layout == "fsdp")


def test_split_kernels_are_whitened_in_their_places(network, measured):
    _, kernels = network
    state, _, calibration = measured["fsdp"]
    plan = cf.FactorizationPlan.from_ranks(kernels, {"up": 2, "down": 2})
    whitened = jax.jit(lambda p, c: cf.factorize_params(p, plan, calibration=c)).lower(
        state.params, calibration
    )
    assert max(collective_sizes(whitened.compile().as_text()), default=0) < kernels["up"].num_params()
    low = cf.factorize_params(state.params, plan, calibration=calibration)
    other, _, of_whole = measured["pmap"]
    expected = cf.factorize_params(other.params, plan, calibration=of_whole)
    for path in plan.ranks:
        u, v, a, b = (np.asarray(tree[path][side]["kernel"]) for tree in (low, expected) for side in "uv")
        np.testing.assert_allclose(u @ v, a @ b, atol=1e-4)


def test_it_is_compiled_once(measured):
    state, calibrator, _ = measured["pmap"]
    (inputs,), before = calibrator.step.inputs, calibrator.step.compile_seconds
    calibrator.compile_for(abstract(state), [inputs])
    assert calibrator.step.inputs == [inputs]
    calibrator.measure(state, DATA, epoch=1, batches=1)
    assert calibrator.step.compile_seconds == before


def test_it_is_compiled_by_one_thread_for_another(network, measured):
    state, other, expected = measured["pmap"]
    calibrator = Calibrator(TASK, *network)
    with ThreadPoolExecutor() as pool:
        ahead = pool.submit(calibrator.compile_for, abstract(state), other.step.inputs)
        found = calibrator.measure(state, DATA, epoch=2, batches=2)
        ahead.result()
    assert calibrator.step.inputs == other.step.inputs
    for path, values in found.items():
        np.testing.assert_array_equal(values, expected[path])
