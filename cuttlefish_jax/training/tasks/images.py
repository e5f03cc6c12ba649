"""Classification of images."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from cuttlefish_jax.training.config import Config
from cuttlefish_jax.training.data import load_dataset, make_preprocess
from cuttlefish_jax.training.data.images.mixing import mix, random_erasing
from cuttlefish_jax.training.losses import cross_entropy
from cuttlefish_jax.training.network import input_shapes
from cuttlefish_jax.training.parallelism import AXIS
from cuttlefish_jax.training.tasks.task import Examples, Inputs, Task


def load_images(config: Config) -> Task:
    """The task of the data set that ``config.data`` names.

    Args:
      config: a run's configuration; ``data`` and ``loss`` are used.

    Raises:
      ValueError: see :func:`cuttlefish_jax.training.data.load_dataset`.
    """
    data = config.data
    dataset = load_dataset(data)
    preprocess, preprocess_eval = make_preprocess(data, dataset.mean, dataset.std)

    def train_inputs(key: jax.Array, examples: Examples) -> tuple[Inputs, jax.Array]:
        images, targets = preprocess(key, examples["image"], examples["index"]), examples["label"]
        if data.random_erasing:
            erase_key = jax.random.fold_in(key, 1)
            images = random_erasing(erase_key, images, examples["index"], probability=data.random_erasing)
        if data.mixup or data.cutmix:
            # Each device has a weight of its own, as it mixes its own images.
            mix_key = jax.random.fold_in(jax.random.fold_in(key, 2), jax.lax.axis_index(AXIS))
            targets = jax.nn.one_hot(targets, dataset.num_classes)
            images, targets = mix(mix_key, images, targets, mixup_alpha=data.mixup, cutmix_alpha=data.cutmix)
        return (images,), targets

    return Task(
        num_outputs=dataset.num_classes,
        inputs=input_shapes(data),
        train=dataset.train,
        evaluation={"validation": dataset.validation, "test": dataset.test},
        train_inputs=train_inputs,
        eval_inputs=lambda examples: (preprocess_eval(examples["image"]),),
        train_loss=functools.partial(cross_entropy, label_smoothing=config.loss.label_smoothing),
        eval_loss=cross_entropy,
        predict=lambda logits: jnp.argmax(logits, axis=-1),
        metrics=("accuracy",),
    )
