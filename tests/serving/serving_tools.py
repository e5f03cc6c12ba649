"""The network of examples/torch_factorized.py in Flax, factorized."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

import cuttlefish_jax as cf

IMAGES = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), padding=1, name="conv1")(x))
        x = nn.Conv(32, (3, 3), strides=2, padding=1, use_bias=False, name="conv2")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="norm")(x)).mean(axis=(1, 2))
        return nn.Dense(10, name="head")(nn.relu(nn.Dense(64, name="hidden")(x)))


@functools.cache
def factorized():
    """A factorized network, variables of which no two are alike, and the plan."""
    model = Network()
    plan = cf.FactorizationPlan.from_ranks(cf.find_kernels(model, IMAGES), {"conv2": 6, "hidden": 5})
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    # Positive, for there are variances among them; not too large, for float32.
    filled = [
        jax.random.uniform(key, x.shape, minval=0.01, maxval=0.2) for key, x in zip(keys, leaves, strict=True)
    ]
    variables = jax.tree.unflatten(treedef, filled)
    low = {**variables, "params": cf.factorize_params(variables["params"], plan)}
    return cf.factorize(model, plan), low, plan
