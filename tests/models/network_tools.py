"""What the tests of networks share: variables without compiling ``init``, programs compiled in a hurry."""

import jax
import jax.numpy as jnp
import numpy as np


def random_variables(model, *inputs, seed=0):
    """Variables of the shapes that ``init`` makes, at random, with which activations keep their scale."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = path[-1].key
        if name == "kernel":
            value = rng.normal(size=leaf.shape) * (2 / np.prod(leaf.shape[:-1])) ** 0.5
        elif name in ("var", "scale"):
            value = rng.uniform(0.8, 1.2, leaf.shape)
        else:
            value = 0.1 * rng.normal(size=leaf.shape)
        return jnp.asarray(value, leaf.dtype)

    shapes = jax.eval_shape(lambda *inputs: model.init(jax.random.key(0), *inputs), *inputs)
    return jax.tree.map_with_path(fill, shapes)


def run_once(fn, *args):
    """``fn(*args)`` as one program that is not optimised, which would take longer than it saves."""
    return jax.jit(fn).lower(*args).compile(compiler_options={"xla_backend_optimization_level": "0"})(*args)
