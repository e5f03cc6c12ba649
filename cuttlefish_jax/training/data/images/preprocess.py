"""Augmentation and normalisation: pure, vectorised, and part of the compiled step.

Random numbers are drawn for each example from the step's key and the example's index, so an example is
augmented alike however the batch is spread over devices and hosts, and whichever way it came to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

TrainPreprocess = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
EvalPreprocess = Callable[[jax.Array], jax.Array]


def make_preprocess(
    data: Any, mean: Sequence[float], std: Sequence[float]
) -> tuple[TrainPreprocess, EvalPreprocess]:
    """Makes the functions that turn stored images into the model's input.

    Args:
      data: ``config.data`` of a run's ``ConfigDict``; its keys ``crop_padding`` and ``flip`` are used.
      mean: per channel, of pixels scaled to [0, 1].
      std: likewise.

    Returns:
      ``train_fn(key, images, index)`` and ``eval_fn(images)``: ``uint8[b, h, w, c]`` to ``f32[b, h, w, c]``;
      ``key`` is one key for the whole step, ``index`` is ``int32[b]``.

    Example:
      >>> from cuttlefish_jax.training.config import default_config
      >>> train_fn, eval_fn = make_preprocess(default_config().data, [0.5] * 3, [0.25] * 3)
      >>> images = jnp.full((2, 4, 4, 3), 255, jnp.uint8)
      >>> float(eval_fn(images).max())
      2.0
      >>> train_fn(jax.random.key(0), images, jnp.arange(2)).shape
      (2, 4, 4, 3)
    """

    def normalize(images: jax.Array) -> jax.Array:
        return (images.astype(jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(std)

    def train_fn(key: jax.Array, images: jax.Array, index: jax.Array) -> jax.Array:
        if data.crop_padding or data.flip:
            images = crop_and_flip(key, images, index, padding=data.crop_padding, flip=data.flip)
        return normalize(images)

    return train_fn, normalize


def crop_and_flip(
    key: jax.Array, images: jax.Array, index: jax.Array, *, padding: int, flip: bool
) -> jax.Array:
    """Crops each image at random out of itself padded by zeros, and mirrors half of them.

    Args:
      key: of the step.
      images: ``uint8[b, h, w, c]``.
      index: ``int32[b]``, the examples' numbers in the data set.
      padding: pixels of zeros on each side.
      flip: whether to mirror left and right with probability 1/2.

    Returns:
      ``uint8[b, h, w, c]``.
    """

    def draw(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        crop_key, flip_key = jax.random.split(jax.random.fold_in(key, index))
        return jax.random.randint(crop_key, (2,), 0, 2 * padding + 1), jax.random.bernoulli(flip_key)

    _, height, width, _ = images.shape
    offset, mirrored = jax.vmap(draw)(index)
    rows = offset[:, :1] + jnp.arange(height)
    columns = offset[:, 1:] + jnp.arange(width)
    if flip:
        columns = jnp.where(mirrored[:, None], columns[:, ::-1], columns)
    padded = jnp.pad(images, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    # Two gathers along one axis each: faster than a dynamic_slice per image, and the flip costs nothing.
    cropped = jnp.take_along_axis(padded, rows[:, :, None, None], axis=1, mode="clip")
    return jnp.take_along_axis(cropped, columns[:, None, :, None], axis=2, mode="clip")
