"""Steps whose loss or gradients are not finite: found, and left out if that is wanted."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cuttlefish_jax.training.data import ArraySource, TrainInput
from cuttlefish_jax.training.epoch import train_epoch
from cuttlefish_jax.training.errors import DivergedError
from cuttlefish_jax.training.state import create_state
from cuttlefish_jax.training.step import AXIS, make_train_step
from cuttlefish_jax.training.tasks import Task

NUM, BATCH = 64, 16
# What is wrong with one example's features: the loss is NaN; the loss is finite and its gradient is not (the
# root of nothing); both are finite, and the square of the gradient, in Adam's second moment, is not.
FAULTS = {"loss": np.nan, "gradient": 0.0, "overflow": 1e25}


class Net(nn.Module):
    """A layer, and a batch norm whose statistics move though nothing comes of it."""

    @nn.compact
    def __call__(self, x, train=False):
        y = nn.Dense(3, use_bias=False)(x)
        nn.BatchNorm(use_running_average=not train, use_scale=False, use_bias=False)(y)
        return y


def source(fault):
    features = np.random.default_rng(0).normal(size=(NUM, 5)).astype(np.float32)
    features[NUM // 2] = FAULTS[fault]
    return ArraySource({"features": features, "label": np.zeros(NUM, np.int32)})


def make_task(source):
    return Task(
        num_outputs=3,
        inputs=(jax.ShapeDtypeStruct((1, 5), jnp.float32),),
        train=source,
        evaluation={},
        train_inputs=lambda key, examples: ((examples["features"],), examples["label"]),
        eval_inputs=lambda examples: (examples["features"],),
        train_loss=lambda outputs, _: jnp.sum(jnp.abs(outputs) + jnp.sqrt(jnp.abs(outputs)), axis=-1),
        eval_loss=lambda outputs, _: jnp.sum(outputs, axis=-1),
        predict=lambda outputs: jnp.argmax(outputs, axis=-1),
        metrics=("accuracy",),
    )


def setup(fault, *, skip, **options):
    """The step, a state with all that a step changes, and the data: four batches, one of them bad."""
    examples = source(fault)
    task = make_task(examples)
    tx = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(lambda step: 0.1 / (1 + step)))
    state = create_state(Net(), tx, task.inputs, seed=0, ema=True)
    state = jax.device_put(state, NamedSharding(Mesh(jax.devices(), (AXIS,)), PartitionSpec()))
    step = make_train_step(task, ema=0.9, skip_nonfinite=skip, **options)
    return step, state, TrainInput(examples, batch_size=BATCH, seed=0, on_device=True)


def is_bad(batch):
    return NUM // 2 in np.asarray(batch["index"])


@pytest.mark.parametrize(("fault", "parts"), [("loss", 1), ("loss", 2), ("gradient", 1), ("overflow", 1)])
def test_a_skipped_step_changes_nothing_but_its_number_and_the_schedule(fault, parts):
    step, state, data = setup(fault, skip=True, accumulation_steps=parts)
    seen = []
    for number, batch in enumerate(data.epoch(0), 1):
        before = jax.device_get(state.replace(key=None))
        state, metrics = step(state, data.resident, batch)
        after = jax.device_get(state.replace(key=None))
        seen.append(bool(metrics["nonfinite"]))
        assert seen[-1] == is_bad(batch)
        adam, schedule = after.opt_state
        assert (after.step, schedule.count) == (number, number)
        assert adam.count == number - sum(seen)
        parts_of = [(s.params, s.ema_params, s.opt_state[0], s.batch_stats) for s in (before, after)]
        for old, new in zip(*map(jax.tree.leaves, parts_of), strict=True):
            assert np.all(np.isfinite(new))
            assert np.array_equal(old, new) == seen[-1]
    assert sum(seen) == 1 and not seen[-1]


@pytest.mark.parametrize(
    ("fault", "what"),
    [("loss", "the loss is nan"), ("gradient", "a gradient is"), ("overflow", "a gradient is")],
)
def test_an_epoch_with_a_bad_step_stops(fault, what):
    step, state, data = setup(fault, skip=False)
    bad = [is_bad(batch) for batch in data.epoch(0)].index(True)
    with pytest.raises(
        DivergedError, match=f"^{what}.* at step {bad} of epoch 0 .* last checkpoint"
    ) as error:
        train_epoch(step, state, data, 0)
    assert "\n" not in str(error.value)
