"""What the tests of checkpoints share: a state of everything, and saving and restoring it."""

import hashlib
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cuttlefish_jax.training.checkpoint import Checkpointer


def make_state(seed, *, width=8):
    """A tree with everything that a training state has: odd dtypes, odd values, keys, empty parts."""
    # NumPy's, which no compiler's option changes: a golden file has them.
    kernel = np.random.default_rng(seed).standard_normal((5, width), np.float32)
    params = {"dense": {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(width)}}
    return {
        "params": params,
        "optimizer": optax.adam(0.1).init(params),
        "half": jnp.asarray([1.5, -0.0, jnp.inf, jnp.nan], jnp.bfloat16),
        "flags": jnp.asarray([True, False]),
        "empty": jnp.zeros((0, 3)),
        "rng": jax.random.split(jax.random.key(seed + 1), 2),
        "step": seed,
    }


def plain(tree):
    is_key = lambda x: hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else jnp.asarray(x)), tree)


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(plain(actual)), jax.tree.leaves(plain(expected)), strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (e.dtype, e.shape, e.tobytes())


def own_messages(caplog):
    """What the package logged; asyncio complains of orbax's failed tasks long after their test."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("cuttlefish_jax")]


def save_all(directory, steps, *, keep=2):
    with Checkpointer(directory, keep=keep) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(step), {"epoch": step})


def restore(directory):
    with Checkpointer(directory) as checkpointer:
        return checkpointer.restore()


def names(directory):
    return sorted(os.listdir(directory))


def rewrite_record(checkpoint, change):
    """Changes a record and its hash with it."""
    file = checkpoint / "record" / "metadata"
    payload = json.loads(file.read_text())
    payload.pop("sha256")
    change(payload)
    canonical = json.dumps(payload, sort_keys=True).encode()
    file.write_text(json.dumps(payload | {"sha256": hashlib.sha256(canonical).hexdigest()}))


def damage(checkpoint):
    """Makes the digest of an array wrong."""
    rewrite_record(checkpoint, lambda payload: payload["leaves"]["half"].update(sha256="0"))
