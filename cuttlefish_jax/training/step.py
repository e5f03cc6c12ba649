"""The compiled steps: one update, one batch of evaluation, each mapped over all devices.

There is one train step, for full-rank and factorized networks alike: what differs is in the state.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cuttlefish_jax.training.data import materialize
from cuttlefish_jax.training.recipe import cross_entropy
from cuttlefish_jax.training.state import TrainState

AXIS = "batch"


def make_train_step(preprocess: Callable, *, label_smoothing: float, ema: float) -> Compiled:
    """One update: ``(state, resident, batch) -> (state, metrics)``.

    Gradients, batch statistics and metrics are averaged over all devices of all hosts. The state is donated.

    Args:
      preprocess: ``(key, uint8[b, h, w, c], index i32[b]) -> f32[b, h, w, c]``, augmentation included.
      label_smoothing: see :func:`cross_entropy`.
      ema: decay of the moving average of the parameters; 0 keeps none.

    Returns:
      A step over pmapped arrays; ``metrics`` are the batch's mean ``loss`` and ``accuracy``, f32 scalars.
    """

    def train_step(state: TrainState, resident: Any, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        step_key = jax.random.fold_in(state.key, state.step)
        augment_key, device_key = jax.random.split(step_key)
        examples = materialize(resident, batch)
        # Augmentation draws by example, dropout by device: the former is the same on any number of devices.
        images = preprocess(augment_key, examples["image"], examples["index"])
        dropout_key = jax.random.fold_in(device_key, jax.lax.axis_index(AXIS))

        def loss_fn(params: Any) -> tuple[jax.Array, tuple[Any, jax.Array]]:
            logits, updated = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": dropout_key},
            )
            losses = cross_entropy(logits, examples["label"], label_smoothing=label_smoothing)
            correct = jnp.argmax(logits, axis=-1) == examples["label"]
            return jnp.mean(losses), (updated.get("batch_stats", {}), jnp.mean(correct))

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (batch_stats, accuracy)), grads = grad_fn(state.params)
        grads, batch_stats, metrics = jax.lax.pmean(
            (grads, batch_stats, {"loss": loss, "accuracy": accuracy}), AXIS
        )
        state = state.apply_gradients(grads=grads, batch_stats=batch_stats)
        if ema:
            state = state.replace(
                ema_params=optax.incremental_update(state.params, state.ema_params, 1 - ema)
            )
        return state, metrics

    return Compiled(jax.pmap(train_step, AXIS, in_axes=(None, None, 0), out_axes=None, donate_argnums=0))


def make_eval_step(apply_fn: Callable, preprocess: Callable) -> Compiled:
    """One batch of evaluation: ``(variables, resident, batch) -> sums``.

    Args:
      apply_fn: the model's ``apply``.
      preprocess: ``uint8[b, h, w, c] -> f32[b, h, w, c]``.

    Returns:
      A step over pmapped arrays; ``sums`` over the real examples: ``loss``, ``correct``, ``examples``.
    """

    def eval_step(variables: Any, resident: Any, batch: Any) -> dict[str, jax.Array]:
        examples = materialize(resident, batch)
        logits = apply_fn(variables, preprocess(examples["image"]), train=False)
        weight = batch["weight"]  # 0 for the padding of the last batch
        sums = {
            "loss": jnp.sum(weight * cross_entropy(logits, examples["label"])),
            "correct": jnp.sum(weight * (jnp.argmax(logits, axis=-1) == examples["label"])),
            "examples": jnp.sum(weight),
        }
        return jax.lax.psum(sums, AXIS)

    return Compiled(jax.pmap(eval_step, AXIS, in_axes=(None, None, 0), out_axes=None))


class Compiled:
    """A mapped function, compiled for the shapes of its first call.

    Later calls with other shapes are errors, not silent recompilations.

    Attributes:
      compile_seconds: how long compilation took; 0.0 before the first call.
    """

    def __init__(self, mapped: Any):
        self._mapped = mapped
        self._executable: Any = None
        self.compile_seconds = 0.0

    @property
    def flops(self) -> float:
        """XLA's count of the operations of one call on one device; NaN before the first call."""
        cost = self._executable.cost_analysis() if self._executable is not None else None
        return cost.get("flops", float("nan")) if cost else float("nan")

    def __call__(self, *args: Any) -> Any:
        """Runs the function; the first call compiles it."""
        if self._executable is None:
            start = time.perf_counter()
            self._executable = self._mapped.lower(*args).compile()
            self.compile_seconds = time.perf_counter() - start
        return self._executable(*args)
