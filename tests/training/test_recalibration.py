"""Batch statistics estimated anew, on eight devices, against NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cuttlefish_jax.training.data import ArraySource, TrainInput
from cuttlefish_jax.training.losses import cross_entropy
from cuttlefish_jax.training.parallelism import DataParallel
from cuttlefish_jax.training.recalibration import recalibrate
from cuttlefish_jax.training.state import create_state
from cuttlefish_jax.training.tasks import Task

BATCH, CLASSES = 32, 3
RNG = np.random.default_rng(0)
FEATURES = RNG.normal(3.0, 2.0, size=(100, 5)).astype(np.float32)
SOURCE = ArraySource({"features": FEATURES, "label": np.zeros(100, np.int32)})
DATA = TrainInput(SOURCE, batch_size=BATCH, seed=3, on_device=True)
TASK = Task(
    num_outputs=CLASSES,
    inputs=(jax.ShapeDtypeStruct((1, 5), jnp.float32),),
    train=SOURCE,
    evaluation={"test": SOURCE},
    train_inputs=lambda key, examples: ((examples["features"],), examples["label"]),
    eval_inputs=lambda examples: (examples["features"],),
    train_loss=cross_entropy,
    eval_loss=cross_entropy,
    predict=lambda logits: jnp.argmax(logits, axis=-1),
    metrics=("accuracy",),
)


class Normed(nn.Module):
    """Batch norms of three momenta; the last one never moves its statistics."""

    momenta: tuple[float, ...] = (0.9, 0.99, 1.0)

    @nn.compact
    def __call__(self, x, train=False):
        for index, momentum in enumerate(self.momenta):
            name = f"norm{index}"
            x = nn.BatchNorm(use_running_average=not train, momentum=momentum, name=name)(x) + 1
        return nn.Dense(CLASSES)(nn.Dropout(0.5, deterministic=not train)(x))


def new_state(model):
    state = create_state(model, optax.sgd(0.1), TASK.inputs, seed=0, ema=False)
    return DataParallel().place(state)


@pytest.mark.parametrize("batches", [1, 3])
def test_statistics_are_the_means_over_batches_and_devices(batches):
    state = new_state(Normed())
    old = jax.tree.map(lambda leaf: leaf + 7, state.batch_stats)  # nothing of these is left
    found = recalibrate(TASK, state.replace(batch_stats=old), DATA, epoch=2, batches=batches)
    parts = [np.asarray(batch["index"]) for batch in DATA.epoch(2)][:batches]
    # float64[batches, devices, examples of one device, features]
    inputs = FEATURES.astype(np.float64)[np.stack(parts)]
    assert inputs.shape == (batches, 8, 4, 5)
    mean, var = inputs.mean(2), inputs.var(2)
    np.testing.assert_allclose(found.batch_stats["norm0"]["mean"], mean.mean((0, 1)), rtol=1e-4)
    np.testing.assert_allclose(found.batch_stats["norm0"]["var"], var.mean((0, 1)), rtol=1e-4)
    after = (var / (var + 1e-5)).mean((0, 1))  # the first norm's output: mean 0, shifted by 1
    np.testing.assert_allclose(found.batch_stats["norm1"]["mean"], 1, rtol=1e-3)
    np.testing.assert_allclose(found.batch_stats["norm1"]["var"], after, rtol=1e-3)
    np.testing.assert_array_equal(found.batch_stats["norm2"]["var"], old["norm2"]["var"])
    assert found.params is state.params and found.step is state.step


@pytest.mark.parametrize(("momenta", "batches"), [((), 3), ((0.9,), 0)])
def test_where_there_is_nothing_to_do_the_state_is_the_very_one(momenta, batches):
    state = new_state(Normed(momenta))
    assert recalibrate(TASK, state, DATA, epoch=0, batches=batches) is state
