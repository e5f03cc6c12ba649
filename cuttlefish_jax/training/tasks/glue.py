"""The nine tasks of GLUE: what is predicted of a text or a pair, and how it is judged."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType

import jax.numpy as jnp

from cuttlefish_jax.training.config import Config
from cuttlefish_jax.training.data import GLUE, load_glue_dataset
from cuttlefish_jax.training.losses import cross_entropy, squared_error
from cuttlefish_jax.training.network import input_shapes
from cuttlefish_jax.training.tasks.task import Examples, Inputs, Task

# As GLUE reports them (Wang et al., ICLR 2019, table 1); the first chooses the best epoch.
GLUE_METRICS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "cola": ("matthews", "accuracy"),
        "sst2": ("accuracy",),
        "mrpc": ("f1", "accuracy"),
        "stsb": ("pearson", "spearman"),
        "qqp": ("f1", "accuracy"),
        "mnli": ("accuracy",),
        "qnli": ("accuracy",),
        "rte": ("accuracy",),
        "wnli": ("accuracy",),
    }
)
# Of data: what is done to images alone.
_FOR_IMAGES = ("mixup", "cutmix", "randaugment", "color_jitter", "random_erasing")


def load_glue(config: Config) -> Task:
    """The task of GLUE that ``config.data.name`` names, ``glue/<task>``.

    ``"test"`` is GLUE's validation split, whose labels are public; MNLI's is the matched one, and
    ``"test_mismatched"`` the other. ``"validation"`` is held out of the training data.

    Args:
      config: a run's configuration; ``data``, ``loss`` and ``model.pretrained`` are used.

    Raises:
      ValueError: if a setting does not suit texts; see also
        :func:`cuttlefish_jax.training.data.load_glue_dataset`.
    """
    _check(config)
    data = config.data
    dataset = load_glue_dataset(data, tokenizer=data.tokenizer or config.model.pretrained)
    num_classes = GLUE[dataset.task].num_classes
    if num_classes:
        train_loss = functools.partial(cross_entropy, label_smoothing=config.loss.label_smoothing)
        eval_loss, predict = cross_entropy, lambda logits: jnp.argmax(logits, axis=-1)
    else:
        train_loss = eval_loss = squared_error
        predict = lambda outputs: outputs[:, 0].astype(jnp.float32)  # noqa: E731
    return Task(
        num_outputs=num_classes or 1,
        inputs=input_shapes(data),
        train=dataset.train,
        evaluation=dataset.evaluation,
        train_inputs=lambda key, examples: (_inputs(examples), examples["label"]),
        eval_inputs=_inputs,
        train_loss=train_loss,
        eval_loss=eval_loss,
        predict=predict,
        metrics=GLUE_METRICS[dataset.task],
        num_lengths=len(dataset.train.lengths),
        least_sizes=MappingProxyType(
            {
                "vocab_size": dataset.vocab_size,
                "token_types": dataset.num_types,
                "max_length": data.max_length,
            }
        ),
    )


def _inputs(examples: Examples) -> Inputs:
    return examples["input_ids"], examples["attention_mask"], examples["token_type_ids"]


def _check(config: Config) -> None:
    data = config.data
    if data.on_device:
        raise ValueError(
            f"data.on_device: the batches of {data.name} are of different lengths and come from the host; "
            "set config.data.on_device to False"
        )
    for key in _FOR_IMAGES:
        if data[key]:
            raise ValueError(f"data.{key} = {data[key]!r} is for images; {data.name} is of texts")
    if data.repeated_augmentation > 1:
        raise ValueError(f"data.repeated_augmentation is for images; {data.name} is of texts")
    if not data.tokenizer and not config.model.pretrained:
        raise ValueError(
            f"{data.name} needs a tokenizer: --config.data.tokenizer=FILE or FOLDER, or pre-trained weights "
            "with one beside them, --config.model.pretrained=..."
        )
    if config.loss.label_smoothing and data.name.endswith("/stsb"):
        raise ValueError(f"loss.label_smoothing is for classes; {data.name} is a regression")
