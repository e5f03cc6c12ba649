"""The small network that the pages measure: trained once while they are built."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import cuttlefish_jax as cf

EPOCHS, STEPS, BATCH = 20, 11, 128


class Network(nn.Module):
    """Five dense layers."""

    @nn.compact
    def __call__(self, x):
        """Maps f32[batch, 64] to logits f32[batch, 10]."""
        x = nn.relu(nn.Dense(256, name="stem")(x))
        for i in range(3):
            x = nn.relu(nn.Dense(256, name=f"hidden{i + 1}")(x))
        return nn.Dense(10, name="head")(x)


@dataclasses.dataclass(frozen=True)
class Run:
    """What a full-rank run left: its data, the params at its end, and ``(epoch, stable ranks)``."""

    model: nn.Module
    x: jax.Array
    kernels: cf.Kernels
    params: Any
    measurements: list[tuple[int, Any]]
    tracker: cf.RankTracker


@functools.cache
def train() -> Run:
    """Trains the network full-rank on 1,408 digits of scikit-learn, the ranks measured after every epoch."""
    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(images[: STEPS * BATCH], jnp.float32) / 16, jnp.asarray(labels[: STEPS * BATCH])
    model = Network()
    tx = optax.adamw(optax.cosine_decay_schedule(6e-3, EPOCHS * STEPS), weight_decay=0.5)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def train_epoch(state, order):
        def step(state, batch):
            def loss_of(params):
                logits = state.apply_fn({"params": params}, x[batch])
                return optax.softmax_cross_entropy_with_integer_labels(logits, y[batch]).mean()

            return state.apply_gradients(grads=jax.grad(loss_of)(state.params)), None

        return jax.lax.scan(step, state, order)[0]

    kernels, tracker = cf.find_kernels(model, x), cf.RankTracker()
    measurements = [(0, cf.stable_ranks(params, kernels))]
    tracker.update(measurements[0][1])
    for epoch in range(EPOCHS):
        order = jax.random.permutation(jax.random.key(epoch), STEPS * BATCH).reshape(STEPS, BATCH)
        state = train_epoch(state, order)
        measurements.append((epoch + 1, cf.stable_ranks(state.params, kernels)))
        tracker.update(measurements[-1][1])
    return Run(model, x, kernels, state.params, measurements, tracker)
