"""The compiled steps on a network of one layer and a hand-made task, against NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cuttlefish_jax.training.data import ArraySource, EvalInput, TrainInput
from cuttlefish_jax.training.epoch import evaluate, train_epoch
from cuttlefish_jax.training.losses import cross_entropy
from cuttlefish_jax.training.parallelism import DataParallel
from cuttlefish_jax.training.state import create_state
from cuttlefish_jax.training.step import Compiled, make_eval_step, make_train_step
from cuttlefish_jax.training.tasks import Task

NUM, CLASSES, BATCH = 70, 3, 32


class Linear(nn.Module):
    """One layer, with dropout if asked for."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(CLASSES)(x)


@pytest.fixture(scope="module")
def source():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(NUM, 5)).astype(np.float32)
    return ArraySource({"features": features, "label": rng.integers(0, CLASSES, NUM).astype(np.int32)})


@pytest.fixture(scope="module")
def task(source):
    return Task(
        num_outputs=CLASSES,
        inputs=(jax.ShapeDtypeStruct((1, 5), jnp.float32),),
        train=source,
        evaluation={"test": source},
        train_inputs=lambda key, examples: ((examples["features"],), examples["label"]),
        eval_inputs=lambda examples: (examples["features"],),
        train_loss=cross_entropy,
        eval_loss=cross_entropy,
        predict=lambda logits: jnp.argmax(logits, axis=-1),
        metrics=("accuracy", "f1"),
    )


def new_state(task, model=None):
    model = Linear() if model is None else model
    state = create_state(model, optax.sgd(0.1), task.inputs, seed=0, ema=False)
    return DataParallel().place(state)


def log_softmax(logits):
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def forward(params, features):
    dense = jax.tree.map(lambda x: np.asarray(x, np.float64), params["Dense_0"])
    return log_softmax(features.astype(np.float64) @ dense["kernel"] + dense["bias"])


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_an_update_is_that_of_the_whole_batch_in_any_number_of_parts(task, source, parts):
    state = new_state(task)
    before = jax.device_get(state.params)
    data = TrainInput(source, batch_size=BATCH, seed=3, on_device=True)
    batch = next(data.epoch(0))
    step = make_train_step(task, ema=0.0, accumulation_steps=parts)
    state, metrics = step(state, data.resident, batch)

    index = np.asarray(batch["index"]).ravel()
    features, labels = source.arrays["features"][index], source.arrays["label"][index]
    logs = forward(before, features)
    np.testing.assert_allclose(metrics["loss"], -logs[np.arange(BATCH), labels].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], (logs.argmax(axis=1) == labels).mean(), rtol=1e-6)
    errors = (np.exp(logs) - np.eye(CLASSES)[labels]) / BATCH
    expected = before["Dense_0"]["kernel"] - 0.1 * features.T.astype(np.float64) @ errors
    np.testing.assert_allclose(state.params["Dense_0"]["kernel"], expected, rtol=1e-4, atol=1e-6)
    # The new state is written where the old one was.
    assert step.memory.alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(before))


def test_each_part_of_a_batch_has_dropout_of_its_own(task):
    # All examples are alike but for their index; with one mask for all parts, all would have one loss.
    same = ArraySource({"features": np.ones((NUM, 5), np.float32), "label": np.zeros(NUM, np.int32)})
    data = TrainInput(same, batch_size=BATCH, seed=0, on_device=True)
    batch = next(data.epoch(0))
    losses = {}
    for parts in (1, 4):
        state = new_state(task, Linear(dropout=0.5))
        _, metrics = make_train_step(task, ema=0.0, accumulation_steps=parts)(state, data.resident, batch)
        losses[parts] = float(metrics["loss"])
    assert losses[1] != losses[4]
    assert all(np.isfinite(list(losses.values())))


@pytest.mark.parametrize("on_device", [True, False])
def test_an_evaluation_counts_every_example_once(task, source, on_device):
    state = new_state(task)
    data = EvalInput(source, batch_size=BATCH, on_device=on_device)  # the last batch is filled up
    found = evaluate(make_eval_step(state.apply_fn, task), state.eval_variables, data, ("accuracy",))
    logs = forward(jax.device_get(state.params), source.arrays["features"])
    labels = source.arrays["label"]
    np.testing.assert_allclose(found["loss"], -logs[np.arange(NUM), labels].mean(), rtol=1e-5)
    assert found["accuracy"] == pytest.approx((logs.argmax(axis=1) == labels).mean())


def test_an_epoch_reports_the_means_of_its_steps(task, source):
    state = new_state(task)
    data = TrainInput(source, batch_size=BATCH, seed=0, on_device=True)
    done = []
    state, found = train_epoch(make_train_step(task, ema=0.0), state, data, 0, on_step=done.append)
    assert found.steps == data.steps_per_epoch == 2
    assert done == [1, 1]
    assert set(found.means) == {"train_loss", "train_accuracy", "train_skipped_steps"}
    assert 0 < found.means["train_loss"] < 5
    assert found.seconds > 0
    assert int(state.step) == 2


@pytest.mark.parametrize("on_device", [True, False])
def test_the_loop_of_steps_brings_nothing_to_the_devices_but_batches(task, source, on_device):
    """Nor does it wait: the measurement at the end is started before the last metrics are fetched."""
    state = new_state(task)
    data = TrainInput(source, batch_size=BATCH, seed=0, on_device=on_device)
    step = make_train_step(task, ema=0.0)
    state, _ = train_epoch(step, state, data, 0)
    order = []

    def at_end(_):
        order.append("end")

    with jax.transfer_guard("disallow"):
        state, _ = train_epoch(step, state, data, 1, on_step=lambda _: order.append("step"), at_end=at_end)
        assert order == ["end", "step", "step"]
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device"):
            _ = state.step + np.ones(1)  # what the guard is there for


def test_a_step_is_compiled_for_each_of_a_few_shapes_and_refuses_more():
    traced = []

    def double(state, batch):
        traced.append(batch["x"].shape)
        return state + 2 * batch["x"].sum()

    compiled = Compiled(jax.pmap(double, in_axes=(None, 0), out_axes=0), num_shapes=2)
    assert np.isnan(compiled.flops) and compiled.memory is None
    for length in (3, 5, 3, 5):
        result = compiled(jnp.float32(1), {"x": jnp.ones((8, length))})
        np.testing.assert_array_equal(result, 1 + 2 * length)
    assert traced == [(3,), (5,)]
    assert compiled.compile_seconds > 0
    assert compiled.memory.argument_size_in_bytes > 0
    with pytest.raises(TypeError, match=r"data of shapes \(\(8, 4\),\); the step was compiled for .* alone"):
        compiled(jnp.float32(1), {"x": jnp.ones((8, 4))})
