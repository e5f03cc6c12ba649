"""A deep Linen model under ``nn.scan``, made low-rank: the lines marked with (cf) are all that was added.

    python examples/scan_model.py

Its blocks are stacked: one kernel of shape [depth, m, n] holds the layers of all of them. Each copy has a
stable rank of its own, and is judged by itself; the plan gives all of them one rank, their largest, and the
factors are stacked as the kernel was. A residual perceptron on scikit-learn's handwritten digits, which are
inside that package. Seconds on a CPU. Prints what the plan does, the shapes of the blocks' params, and the
loss and test accuracy at the end.
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import cuttlefish_jax as cf  # (cf)


class Block(nn.Module):
    """A residual block, of the form that ``nn.scan`` asks for."""

    width: int

    @nn.compact
    def __call__(self, x, _):
        """Maps f32[batch, width] to the same, and scans over nothing."""
        y = nn.relu(nn.Dense(2 * self.width, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(self.width, name="down")(y), None


class Network(nn.Module):
    """``depth`` equal blocks, compiled once."""

    width: int = 128
    depth: int = 4

    @nn.compact
    def __call__(self, x):
        """Maps f32[batch, 64] to logits f32[batch, 10]."""
        x = nn.Dense(self.width, name="stem")(x)
        blocks = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
        )
        x, _ = blocks(self.width, name="blocks")(x, None)
        return nn.Dense(10, name="head")(nn.LayerNorm()(x))


@jax.jit
def train_epoch(state, x, y):
    """One pass over ``x``, f32[batches, batch, 64]; returns the new state and the mean loss."""

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
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    options = parser.parse_args()
    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(images, jnp.float32) / 16, jnp.asarray(labels)
    train, test = (x[:1408], y[:1408]), (x[1408:], y[1408:])

    model = Network(options.width, options.depth)
    tx = optax.adamw(optax.cosine_decay_schedule(6e-3, 11 * options.epochs), weight_decay=0.5)
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

    for path, leaf in jax.tree.leaves_with_path(state.params["blocks"]):
        print("blocks/" + "/".join(key.key for key in path), leaf.shape)
    accuracy = jnp.mean(state.apply_fn({"params": state.params}, test[0]).argmax(axis=-1) == test[1])
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    print(f"{count:,} parameters, test accuracy {accuracy:.2%}, final loss {loss:.4f}")


if __name__ == "__main__":
    main()
