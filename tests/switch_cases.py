"""A small network, its plan, and the states of many optimizers, for the tests of the switch."""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from linen_zoo import once

import cuttlefish_jax as cf


class Net(nn.Module):
    """A convolution, a layer that the plan keeps, and a dense layer; batch norm; a bias here and there."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3), strides=2, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = nn.relu(nn.Dense(8, name="kept")(x.mean((1, 2))))
        return nn.Dense(5, use_bias=False, name="fc")(x)


X = jnp.asarray(np.random.default_rng(0).standard_normal((4, 5, 5, 4)), jnp.float32)
MODEL = Net()
VARIABLES = jax.jit(MODEL.init)(jax.random.key(0), X)
PARAMS = VARIABLES["params"]
KERNELS = cf.find_kernels(MODEL, X)
PLAN = cf.FactorizationPlan.from_ranks(KERNELS, {"conv": 3, "fc": 2})
PARAMS_LOW = cf.factorize_params(PARAMS, PLAN)
LOW = cf.factorize(MODEL, PLAN)


class State(TrainState):
    """A state with what training states have besides params."""

    batch_stats: Any = None
    ema_params: Any = None
    rng: Any = None


def new_state(tx):
    ema = jax.tree.map(lambda leaf: 0.9 * leaf, PARAMS)
    fields = dict(batch_stats=VARIABLES["batch_stats"], ema_params=ema, rng=jax.random.key(7))
    return State.create(apply_fn=MODEL.apply, params=PARAMS, tx=tx, **fields)


def loss_of(apply, params, x, batch_stats=VARIABLES["batch_stats"]):
    return jnp.mean((apply({"params": params, "batch_stats": batch_stats}, x) - 1) ** 2)


def train_step(state, x=X):
    """One step; the running statistics change too."""

    def loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        y, updated = state.apply_fn(variables, x, train=True, mutable=["batch_stats"])
        return jnp.mean((y - 1) ** 2), updated["batch_stats"]

    gradients, batch_stats = jax.grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=gradients, batch_stats=batch_stats)


def not_biases(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def by_ndim(params):
    return jax.tree.map(lambda leaf: "vectors" if leaf.ndim < 2 else "kernels", params)


BY_LAYER = {layer: "kernels" if layer == "conv" else "vectors" for layer in PARAMS}  # a prefix of the params
SCHEDULE = optax.linear_schedule(0.1, 0.01, 10)
PARTS = {"kernels": optax.sgd(0.1, momentum=0.9), "vectors": optax.adam(1e-3)}

# What of each optimizer's state is linear in the gradients, and hence carried without any loss.
OPTIMIZERS = {
    "sgd": (lambda: optax.sgd(0.1), ()),
    "momentum": (lambda: optax.sgd(0.1, momentum=0.9), ("trace",)),
    "nesterov": (lambda: optax.sgd(SCHEDULE, momentum=0.9, nesterov=True), ("trace",)),
    "bfloat16": (lambda: optax.sgd(0.1, momentum=0.9, accumulator_dtype=jnp.bfloat16), ()),
    "adam": (lambda: optax.adam(1e-3), ("mu",)),
    "adamw": (lambda: optax.adamw(SCHEDULE, weight_decay=1e-2, mask=not_biases), ("mu",)),
    "amsgrad": (lambda: optax.amsgrad(1e-3), ("mu",)),
    "lion": (lambda: optax.lion(1e-3), ("mu",)),
    "rmsprop": (lambda: optax.rmsprop(1e-3, momentum=0.9), ()),
    "adagrad": (lambda: optax.adagrad(1e-2), ()),
    "clipped_nested": (
        lambda: optax.chain(optax.chain(optax.clip(1e9), optax.ema(0.9)), optax.trace(0.9), optax.scale(-1)),
        ("ema", "trace"),
    ),
    "masked": (lambda: optax.masked(optax.adam(1e-3), not_biases), ("mu",)),
    "partition": (lambda: optax.partition(PARTS, by_ndim), ("trace",)),
    "partition_by_layer": (lambda: optax.partition(PARTS, BY_LAYER), ("trace", "mu")),
    "hyperparams": (lambda: optax.inject_hyperparams(optax.adam)(learning_rate=SCHEDULE), ("mu",)),
    "multi_steps": (lambda: optax.MultiSteps(optax.adam(1e-3), 3), ("acc_grads", "mu")),
    "apply_if_finite": (lambda: optax.apply_if_finite(optax.adam(1e-3), 5), ("mu",)),
}
# Second moments as sums of rows and columns: nothing in factor space is like them.
ADAFACTOR = {
    "small": (lambda: optax.adafactor(1e-2), ()),
    "large": (lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4, momentum=0.9), ()),
}


@functools.cache
def gradients(low):
    """Params and their gradients on four batches: in full space or, of the same function, in factors."""
    apply, params = (LOW.apply, PARAMS_LOW) if low else (MODEL.apply, cf.merge_params(PARAMS_LOW, PLAN))
    batches = jnp.asarray(np.random.default_rng(1).standard_normal((4, *X.shape)), jnp.float32)
    gradient = jax.grad(functools.partial(loss_of, apply))
    return params, once(lambda params: jax.lax.map(lambda x: gradient(params, x), batches), params)


@functools.cache
def gathered(name, low=False):
    """An optimizer's state after these four gradients, the params held fixed."""
    tx = (OPTIMIZERS | ADAFACTOR)[name][0]()

    def run(params, gradients):
        def step(opt_state, gradient):
            return tx.update(gradient, opt_state, params)[1], None

        return jax.lax.scan(step, tx.init(params), gradients)[0]

    return once(run, *gradients(low))


def check_structure(opt_state, tx, params):
    expected = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(opt_state) == jax.tree.structure(expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(opt_state, expected)


def fields(opt_state, name):
    """Everything called ``name`` in an optimizer's state."""
    return [value for _, value in optax.tree.get_all_with_path(opt_state, name)]
