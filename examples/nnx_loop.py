"""An NNX training loop made low-rank: the lines marked with (cf) are all that was added.

    python examples/nnx_loop.py

A perceptron on scikit-learn's handwritten digits, which are inside that package. Seconds on a CPU. Prints
what the plan does, and the loss and test accuracy at the end.
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import cuttlefish_jax as cf  # (cf)


class Perceptron(nnx.Module):
    """Residual layers with layer norms."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.stem = nnx.Linear(64, width, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(3)])
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(3)])
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        """Logits of images f32[batch, 64]."""
        x = nnx.relu(self.stem(x))
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + nnx.relu(layer(norm(x)))
        return self.head(x)


def loss_of(model, x, y):
    """Mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def train_epoch(model, optimizer, x, y):
    """One pass over ``x``, f32[batches, batch, 64]; returns the mean loss."""

    def step(carry, batch):
        model, optimizer = carry
        loss, gradients = nnx.value_and_grad(loss_of)(model, *batch)
        optimizer.update(model, gradients)
        return carry, loss

    return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))((model, optimizer), (x, y))[
        1
    ].mean()


@nnx.jit
def accuracy_of(model, x, y):
    """The share of ``x`` that is classified as ``y``."""
    return jnp.mean(model(x).argmax(axis=-1) == y)


def main() -> None:
    """Trains, and prints how it went."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--width", type=int, default=256)
    options = parser.parse_args()
    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(images, jnp.float32) / 16, jnp.asarray(labels)
    train, test = (x[:1408], y[:1408]), (x[1408:], y[1408:])

    model = Perceptron(options.width, nnx.Rngs(0))
    tx = optax.adamw(optax.cosine_decay_schedule(6e-3, 11 * options.epochs), weight_decay=0.5)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    kernels, tracker, plan = cf.find_kernels(model, x[:1]), cf.RankTracker(), None  # (cf)
    tracker.update(ranks_0 := cf.stable_ranks(model, kernels))  # (cf)

    for epoch in range(options.epochs):
        order = jax.random.permutation(jax.random.key(epoch), 1408).reshape(11, 128)
        loss = train_epoch(model, optimizer, train[0][order], train[1][order])
        if plan is None and tracker.update(ranks_t := cf.stable_ranks(model, kernels)):  # (cf)
            plan = cf.make_plan(kernels, ranks_t, ranks_0)  # (cf)
            model, optimizer = cf.switch((model, optimizer), plan, tx)  # (cf)
            print(f"switch after epoch {epoch + 1}\n{plan.report()}")

    params = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    print(f"{params:,} parameters, test accuracy {accuracy_of(model, *test):.2%}, final loss {loss:.4f}")


if __name__ == "__main__":
    main()
