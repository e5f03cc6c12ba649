"""Losses of every example in a batch, in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax

from cuttlefish_jax.errors import check_setting

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "b classes"],
    targets: Int[Array, " b"] | Float[Array, "b classes"],
    *,
    label_smoothing: float = 0.0,
) -> Float[Array, " b"]:
    """Softmax cross-entropy of every example.

    Args:
      logits: scores of the classes.
      targets: the true classes, or a distribution over the classes (of mixed images).
      label_smoothing: share of the target spread evenly over all classes, in [0, 1).

    Returns:
      The loss of each example, ``f32[b]``.

    Raises:
      ConfigError: if ``label_smoothing`` is out of its range.
    """
    in_range = 0 <= label_smoothing < 1
    check_setting("loss.label_smoothing", label_smoothing, in_range, "0 or more, and below 1")
    logits = logits.astype(jnp.float32)
    if targets.ndim == 1:
        if not label_smoothing:
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        targets = jax.nn.one_hot(targets, logits.shape[-1])
    if label_smoothing:
        targets = optax.smooth_labels(targets, label_smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def squared_error(outputs: Float[Array, "b 1"], targets: Float[Array, " b"]) -> Float[Array, " b"]:
    """Squared difference of every example, the loss of a regression.

    Args:
      outputs: the model's one output.
      targets: the true numbers.

    Returns:
      The loss of each example, ``f32[b]``.
    """
    return jnp.square(outputs[:, 0].astype(jnp.float32) - targets)
