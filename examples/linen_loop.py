"""A Linen training loop made low-rank: the lines marked with (cf) are all that was added.

    python examples/linen_loop.py

A small convolutional network on scikit-learn's handwritten digits, which are inside that package. Seconds on
a CPU. Prints what the plan does, and the loss and test accuracy at the end.
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import cuttlefish_jax as cf  # (cf)


class Network(nn.Module):
    """Three convolutions and two dense layers."""

    width: int = 32

    @nn.compact
    def __call__(self, x):
        """Logits of images f32[batch, 8, 8, 1]."""
        for strides in (1, 2, 2):
            x = nn.relu(nn.Conv(self.width, (3, 3), strides)(x))
        x = nn.relu(nn.Dense(4 * self.width)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


@jax.jit
def train_epoch(state, x, y):
    """One pass over ``x``, f32[batches, batch, 8, 8, 1]; returns the new state and the mean loss."""

    def step(state, batch):
        def loss_of(params):
            logits = state.apply_fn({"params": params}, batch[0])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

        loss, gradients = jax.value_and_grad(loss_of)(state.params)
        return state.apply_gradients(grads=gradients), loss

    state, losses = jax.lax.scan(step, state, (x, y))
    return state, losses.mean()


def main() -> None:
    """Trains, and prints how it went."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--width", type=int, default=32)
    options = parser.parse_args()
    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(images, jnp.float32).reshape(-1, 8, 8, 1) / 16, jnp.asarray(labels)
    train, test = (x[:1408], y[:1408]), (x[1408:], y[1408:])

    model = Network(options.width)
    tx = optax.adamw(optax.cosine_decay_schedule(3e-3, 11 * options.epochs), weight_decay=0.1)
    params = model.init(jax.random.key(0), x[:1])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    kernels, tracker, plan = cf.find_kernels(model, x[:1]), cf.RankTracker(), None  # (cf)
    tracker.update(ranks_0 := cf.stable_ranks(state.params, kernels))  # (cf)

    for epoch in range(options.epochs):
        order = jax.random.permutation(jax.random.key(epoch), 1408).reshape(11, 128)
        state, loss = train_epoch(state, train[0][order], train[1][order])
        if plan is None and tracker.update(ranks_t := cf.stable_ranks(state.params, kernels)):  # (cf)
            plan = cf.make_plan(kernels, ranks_t, ranks_0)  # (cf)
            state = cf.switch(state, plan, tx)  # (cf)
            print(f"switch after epoch {epoch + 1}\n{plan.report()}")

    logits = jax.jit(state.apply_fn)({"params": state.params}, test[0])
    accuracy = jnp.mean(logits.argmax(axis=-1) == test[1])
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    print(f"{count:,} parameters, test accuracy {accuracy:.2%}, final loss {loss:.4f}")


if __name__ == "__main__":
    main()
