"""Training states that are split over devices, against states that are whole on each of them."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from program_tools import collective_sizes

import cuttlefish_jax as cf
from cuttlefish_jax.training.config import default_config
from cuttlefish_jax.training.data import ArraySource, EvalInput, TrainInput
from cuttlefish_jax.training.epoch import evaluate, train_epoch
from cuttlefish_jax.training.losses import cross_entropy
from cuttlefish_jax.training.parallelism import AXIS, DataParallel, FullySharded, bytes_per_device
from cuttlefish_jax.training.recalibration import recalibrate
from cuttlefish_jax.training.recipe import make_optimizer
from cuttlefish_jax.training.state import create_params, create_state
from cuttlefish_jax.training.step import make_eval_step, make_train_step
from cuttlefish_jax.training.tasks import Task

NUM, CLASSES, BATCH = 48, 4, 32


class Network(nn.Module):
    """A convolution, heads and dense layers; with batch norm and dropout."""

    norm_axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(32, (3, 3), use_bias=False, name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, axis_name=self.norm_axis_name, name="norm")(x)
        x = nn.relu(x).mean((1, 2))
        x = nn.gelu(nn.Dense(256, name="up")(x))
        x = nn.DenseGeneral((4, 16), name="heads")(x)
        x = nn.DenseGeneral(40, axis=(-2, -1), name="merge")(x)
        x = nn.Dropout(0.3, deterministic=not train)(x)
        return nn.Dense(CLASSES, name="classifier")(x)


def noisy_inputs(key, examples):
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(examples["index"])
    noise = jax.vmap(lambda key: jax.random.normal(key, (5, 5, 8)))(keys)
    return (examples["features"] + 0.3 * noise,), examples["label"]


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """A program runs a few times here: optimising it takes longer than it saves."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


@pytest.fixture(scope="module")
def source():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(NUM, 5, 5, 8)).astype(np.float32)
    return ArraySource({"features": features, "label": rng.integers(0, CLASSES, NUM).astype(np.int32)})


@pytest.fixture(scope="module")
def task(source):
    return Task(
        num_outputs=CLASSES,
        inputs=(jax.ShapeDtypeStruct((1, 5, 5, 8), jnp.float32),),
        train=source,
        evaluation={"test": source},
        train_inputs=noisy_inputs,
        eval_inputs=lambda examples: (examples["features"],),
        train_loss=cross_entropy,
        eval_loss=cross_entropy,
        predict=lambda logits: jnp.argmax(logits, axis=-1),
        metrics=("accuracy",),
    )


def optimizer(plan=None, **changes):
    config = default_config().optimizer.copy_and_resolve_references()
    config.update(changes)
    return make_optimizer(config, optax.constant_schedule(0.05), plan=plan)


def layout_of(kind, model, task, plan=None, devices=None):
    if kind == "pmap":
        return DataParallel(devices)
    kernels = cf.find_kernels(Network(), *task.inputs, train=False)
    params = jax.eval_shape(functools.partial(create_params, model, task.inputs))
    return FullySharded.of(params, kernels, plan, devices=devices)


def low_rank(model, task):
    kernels = cf.find_kernels(model, *task.inputs, train=False)
    return cf.FactorizationPlan.from_ranks(kernels, {"conv": 11, "up": 7, "heads": 12, "merge": 9})


def start(task, layout, model, tx, **options):
    """A state in its layout, the input, and the step for it."""
    make = functools.partial(create_state, model, tx, task.inputs, seed=0, ema=True)
    state = jax.jit(make, out_shardings=layout.shardings(jax.eval_shape(make)))()
    data = TrainInput(task.train, batch_size=BATCH, seed=0, on_device=True)
    return state, data, make_train_step(task, layout, ema=0.9, **options)


CASES = {
    "sgd": (dict(clip_norm=0.5, nesterov=True), {}, {}, False),
    "adamw, frozen, in parts": (dict(name="adamw", freeze=("up",)), {}, dict(accumulation_steps=2), False),
    "batch norm of all": ({}, dict(norm_axis_name=AXIS), {}, False),
    "frobenius": (dict(frobenius_decay=1e-2), {}, {}, True),
    "preconditioned": (dict(name="adamw", precondition=True), {}, dict(skip_nonfinite=True), True),
}


_MARKS = {
    "preconditioned": [pytest.mark.slow],
    "adamw, frozen, in parts": [pytest.mark.slow],
    "frobenius": [pytest.mark.large],
}


@pytest.mark.parametrize("case", [pytest.param(name, marks=_MARKS.get(name, ())) for name in CASES])
def test_a_split_state_takes_the_steps_of_a_whole_one(case, task):
    settings, model_options, options, is_low = CASES[case]
    model = Network(**model_options)
    plan = low_rank(model, task) if is_low else None
    model = cf.factorize(model, plan) if plan else model
    tx = optimizer(plan, **settings)
    results = {}
    for kind in ("pmap", "fsdp"):
        layout = layout_of(kind, model, task, plan)
        state, data, step = start(task, layout, model, tx, **options)
        metrics, batch = {}, next(data.epoch(0))
        for _ in range(3):
            state, metrics = step(state, data.resident, batch)
        assert jax.tree.map(lambda x: x.sharding, state) == layout.shardings(state)
        arrays = jax.device_get(state.replace(key=jax.random.key_data(state.key)))
        results[kind] = arrays, jax.device_get(metrics)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5), results["fsdp"], results["pmap"]
    )


def test_evaluation_and_batch_statistics_of_a_split_state(task):
    model, results = Network(), {}
    for kind in ("pmap", "fsdp"):
        layout = layout_of(kind, model, task)
        state, data, _ = start(task, layout, model, optimizer())
        step = make_eval_step(model.apply, task, layout)
        held_out = EvalInput(task.train, batch_size=BATCH, on_device=True)
        found = evaluate(step, state.eval_variables, held_out, ("accuracy",))
        anew = recalibrate(task, state, data, layout, epoch=0, batches=1).batch_stats
        results[kind] = found, jax.device_get(anew)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), results["fsdp"], results["pmap"]
    )


def test_steps_of_a_split_state_bring_nothing_to_the_devices_but_batches(task):
    """And the old state's memory is the new one's."""
    layout = layout_of("fsdp", Network(), task)
    state, data, step = start(task, layout, Network(), optimizer(name="adamw"))
    size = bytes_per_device(state, layout.shardings(state))
    state, _ = train_epoch(step, state, data, 0)
    with jax.transfer_guard("disallow"):
        state, _ = train_epoch(step, state, data, 1)
    assert step.memory.alias_size_in_bytes >= size
    assert int(state.step) == 2 * data.steps_per_epoch


def test_kernels_are_split_along_their_longer_side_and_factors_not_by_their_rank(task):
    model = Network()
    plan = low_rank(model, task)
    assert layout_of("fsdp", model, task).specs == {
        "conv": {"kernel": P(None, None, AXIS, None)},
        "norm": {"scale": P(), "bias": P()},
        "up": {"kernel": P(None, AXIS), "bias": P()},
        "heads": {"kernel": P(AXIS, None, None), "bias": P()},
        # The rows are 4 x 16.
        "merge": {"kernel": P(None, AXIS, None), "bias": P()},
        # Small.
        "classifier": {"kernel": P(), "bias": P()},
    }
    low = layout_of("fsdp", cf.factorize(model, plan), task, plan)
    assert low.specs["up"] == {"u": {"kernel": P()}, "v": {"kernel": P(None, AXIS), "bias": P()}}
    assert low.specs["heads"]["u"]["kernel"] == P(AXIS, None)
    # Nothing is split unevenly, and by one device not at all.
    five = layout_of("fsdp", model, task, devices=jax.devices()[:5])
    assert five.specs["merge"]["kernel"] == P(None, None, AXIS) and five.specs["up"]["kernel"] == P()
    one = layout_of("fsdp", model, task, devices=jax.devices()[:1])
    assert set(jax.tree.leaves(one.specs)) == {P()}


def test_what_the_optimizer_remembers_is_split_like_the_params(task):
    layout = layout_of("fsdp", Network(), task)
    tx = optimizer(name="adamw", freeze=("up",))
    state = jax.eval_shape(lambda: create_state(Network(), tx, task.inputs, seed=0, ema=True))
    shardings = layout.shardings(state)
    moments = [s for s in jax.tree.leaves(shardings.opt_state) if s.spec == P(AXIS, None, None)]
    assert len(moments) == 2  # of the heads
    # The frozen kernel is the one that has no moments.
    assert not [s for s in jax.tree.leaves(shardings.opt_state) if s.spec == P(None, AXIS)]
    assert shardings.ema_params == shardings.params
    assert shardings.step.spec == shardings.key.spec == P()


def test_whole_parameters_are_forgotten_between_the_passes(task):
    """They are gathered once more for the gradient, and not kept for it; neither is a cast one."""
    params = jax.eval_shape(functools.partial(create_params, Network(), task.inputs))
    layout = layout_of("fsdp", Network(), task)
    split = sum(AXIS in spec for spec in jax.tree.leaves(layout.specs, is_leaf=lambda x: isinstance(x, P)))

    def of_whole(params):
        halves = [x.astype(jnp.bfloat16) for x in jax.tree.leaves(params)]
        return sum(jnp.sum(x * x) for x in halves)  # whose gradient needs x itself

    def on_device(params, shared, batch):
        return jax.grad(layout.whole(of_whole))(params), shared

    program = layout.on_each_device(on_device, gives_gradients=True)
    batch = np.zeros((jax.device_count(), 1))
    text = str(jax.make_jaxpr(program)(params, np.zeros(()), batch))
    assert split >= 3
    assert text.count("all_gather[") == 2 * split


def test_a_switch_gathers_no_kernel(task):
    model, tx = Network(), optimizer(name="adamw")
    kernels = cf.find_kernels(model, *task.inputs, train=False)
    plan = low_rank(model, task)
    layout = layout_of("fsdp", model, task)
    state, _, _ = start(task, layout, model, tx)
    low = cf.factorize(model, plan)

    def convert(state):
        return cf.switch(state, plan, tx, apply_fn=low.apply)

    shardings = layout_of("fsdp", low, task, plan).shardings(jax.eval_shape(convert, state))
    program = jax.jit(convert, out_shardings=shardings).lower(state).compile()
    exact = jax.jit(lambda params: cf.singular_values(params, kernels), out_shardings=layout.replicated)
    sizes = [
        collective_sizes(program.as_text()),
        collective_sizes(exact.lower(state.params).compile().as_text()),
    ]
    # Of no kernel more than a Gram matrix goes from device to device.
    assert all(max(found) == max(kernel.max_rank for kernel in kernels.values()) ** 2 for found in sizes)
    assert not {math.prod(kernels[path].shape) for path in plan.ranks} & set(sizes[0] + sizes[1])
    # And the factors are those of a state that is whole.
    one = jax.device_get(state.params)
    expected, found = cf.merge_params(cf.factorize_params(one, plan), plan), program(state).params
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        cf.merge_params(found, plan),
        expected,
    )


@pytest.mark.slow
def test_memory_falls_with_the_number_of_devices(task):
    model, tx = Network(), optimizer(name="adamw")
    state = jax.eval_shape(lambda: create_state(model, tx, task.inputs, seed=0, ema=True))
    whole, at_rest, peaks = bytes_per_device(state, DataParallel().shardings(state)), {}, {}
    for number in (1, 2, 4, 8):
        devices = jax.devices()[:number]
        layout = layout_of("fsdp", model, task, devices=devices)
        at_rest[number] = bytes_per_device(state, layout.shardings(state))
        data = TrainInput(task.train, batch_size=8, seed=0, on_device=True, devices=devices)
        step = make_train_step(task, layout, ema=0.9)
        step.compile_for(layout.abstract(state), data.resident, next(data.epoch(0)))
        peaks[number] = step.peak_bytes
    # What is small is not split: biases, norms and the classifier.
    small = 2 * at_rest[2] - whole
    assert at_rest == {number: small + (whole - small) / number for number in (1, 2, 4, 8)}
    assert small < 0.05 * whole
    # Besides the state there are the parameters that a step has gathered, at most all of them.
    params = bytes_per_device(state.params, DataParallel().shardings(state).params)
    assert peaks[1] - peaks[8] > 0.8 * (whole - params)
    assert peaks[1] > peaks[2] > peaks[4] > peaks[8]
