"""The experiment of any configuration on random data, for measurements that the data do not matter to."""

from __future__ import annotations

import functools
from typing import Any, cast

import jax.numpy as jnp
import numpy as np

import cuttlefish_jax as cf
from cuttlefish_jax.training.check import check_config
from cuttlefish_jax.training.data import DATASETS, ArraySource, Dataset, TrainInput
from cuttlefish_jax.training.experiment import Experiment
from cuttlefish_jax.training.losses import cross_entropy
from cuttlefish_jax.training.network import create_network, input_shapes
from cuttlefish_jax.training.schedule import make_schedule
from cuttlefish_jax.training.tasks import Task, load_task

_TOKENS = ("input_ids", "attention_mask", "token_type_ids")


def synthetic_experiment(config: Any, *, num_classes: int = 10, batches: int = 4) -> Experiment:
    """The experiment of a configuration on so many batches of random examples, which lie on the device.

    Args:
      config: changed in place: no data set is read and no weights, images are not augmented on the host, and
        the learning rate is low.
      num_classes: of the labels.
      batches: in an epoch.
    """
    data = config.data
    data.on_device, data.train_examples, config.model.pretrained = True, 0, ""
    config.schedule.name, config.schedule.peak = "constant", 1e-4  # there is nothing to learn
    make_source = functools.partial(_source, batches * config.batch_size, num_classes)
    if data.name.partition("/")[0] == "glue":
        task = _texts(data, make_source, num_classes)
    else:
        data.name, data.randaugment, data.color_jitter = "synthetic", "", 0.0
        cast(dict, DATASETS)["synthetic"] = lambda data: _images(data, make_source, num_classes)
        task = load_task(config)
    check_config(config)
    model = create_network(config.model, num_outputs=num_classes)
    train = TrainInput(task.train, batch_size=config.batch_size, seed=0, on_device=True)
    return Experiment(
        config=config,
        task=task,
        model=model,
        kernels=cf.find_kernels(model, *task.inputs, train=False),
        profile=None,
        train=train,
        evaluation={},
        schedule=make_schedule(config.schedule, epochs=config.epochs, steps_per_epoch=train.steps_per_epoch),
    )


def _source(examples: int, num_classes: int, **arrays: tuple[Any, ...]) -> ArraySource:
    """Random integers: ``name=(exclusive upper bound, dtype, *shape)`` of one example."""
    random = np.random.default_rng(0)
    arrays["label"] = (num_classes, np.int32)
    return ArraySource(
        {
            name: random.integers(bound, size=(examples, *shape), dtype=dtype)
            for name, (bound, dtype, *shape) in arrays.items()
        }
    )


def _images(data: Any, make_source: Any, num_classes: int) -> Dataset:
    source = make_source(image=(256, np.uint8, data.image_size, data.image_size, data.channels))
    half = (0.5,) * data.channels
    return Dataset(
        "synthetic", num_classes, train=source, validation=source, test=source, mean=half, std=half
    )


def _texts(data: Any, make_source: Any, num_classes: int) -> Task:
    shape = (np.int32, data.max_length)
    tokens = {name: (bound, *shape) for name, bound in zip(_TOKENS, (1000, 1, 2), strict=True)}
    source = make_source(**tokens)
    source.arrays["attention_mask"][:] = 1

    def inputs(examples: Any) -> tuple[Any, ...]:
        return tuple(examples[name] for name in _TOKENS)

    return Task(
        num_outputs=num_classes,
        inputs=input_shapes(data),
        train=source,
        evaluation={},
        train_inputs=lambda key, examples: (inputs(examples), examples["label"]),
        eval_inputs=inputs,
        train_loss=cross_entropy,
        eval_loss=cross_entropy,
        predict=lambda logits: jnp.argmax(logits, axis=-1),
        metrics=("accuracy",),
        least_sizes={"vocab_size": 1000},
    )
