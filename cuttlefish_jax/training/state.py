"""What changes while a network trains: flax's TrainState with batch statistics, average and random key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state


class TrainState(train_state.TrainState):
    """Parameters and all that goes with them; a pytree.

    Attributes:
      batch_stats: running statistics of batch norms, ``{}`` if there are none.
      ema_params: moving average of ``params``, or ``None``.
      key: the run's random key; it does not change, every step folds its number in.
      rank_vectors: what the next measurement of the stable ranks starts from, see
        :func:`cuttlefish_jax.initial_vectors`; ``{}`` if it starts from nothing.
    """

    batch_stats: Any
    ema_params: Any
    key: jax.Array
    rank_vectors: Any

    @property
    def eval_variables(self) -> dict[str, Any]:
        """What the model is evaluated with: the average if there is one, and the statistics."""
        params = self.params if self.ema_params is None else self.ema_params
        return {"params": params, "batch_stats": self.batch_stats}


def create_params(model: nn.Module, inputs: Sequence[jax.ShapeDtypeStruct]) -> Any:
    """The parameters of a model at some initialisation; to be traced for their shapes."""
    return _init(model, inputs, jax.random.key(0))["params"]


def create_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    inputs: Sequence[jax.ShapeDtypeStruct],
    *,
    seed: int,
    ema: bool,
    rank_vectors: Any = None,
) -> TrainState:
    """A state at random initialisation; a pure function, to be compiled or traced for its shapes.

    Args:
      model: a Linen module called as ``model(*inputs, train=...)``.
      tx: its optimizer.
      inputs: shapes and dtypes of the model's arguments.
      seed: of the initialisation and of everything random in training.
      ema: whether to keep a moving average of the parameters.
      rank_vectors: what the first measurement of the stable ranks starts from; none by default.
    """
    init_key, key = jax.random.split(jax.random.key(seed))
    variables = _init(model, inputs, init_key)
    params = variables["params"]
    return TrainState.create(
        apply_fn=model.apply,
        params=params,
        tx=tx,
        batch_stats=variables.get("batch_stats", {}),
        ema_params=jax.tree.map(lambda x: x.copy(), params) if ema else None,
        key=key,
        rank_vectors=jax.tree.map(jnp.asarray, rank_vectors or {}),
    )


def _init(model: nn.Module, inputs: Sequence[jax.ShapeDtypeStruct], key: jax.Array) -> Any:
    return model.init(key, *(jnp.zeros(x.shape, x.dtype) for x in inputs), train=False)
