"""What a run learns: examples, what the network sees of them, and how its outputs are judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from cuttlefish_jax.training.data import Source

Examples = Mapping[str, jax.Array]  # "label" and "index" among them
Inputs = tuple[jax.Array, ...]  # the model's arguments


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Task:
    """One of these is all that the training loop knows of images or texts.

    Attributes:
      num_outputs: length of the network's output: the classes, or 1 for a regression.
      inputs: shapes and dtypes of the model's arguments for one example, with a batch axis.
      train: the training examples.
      evaluation: the examples to evaluate on; ``"validation"`` chooses the best epoch, ``"test"`` is for the
        final numbers.
      train_inputs: ``(key, examples) -> (inputs, targets)``, augmentation included; ``key`` is of the step,
        and the same on all devices.
      eval_inputs: ``examples -> inputs``.
      train_loss: ``(outputs, targets) -> f32[b]``.
      eval_loss: ``(outputs, labels) -> f32[b]``.
      predict: ``outputs -> [b]``, to be compared with the labels.
      metrics: names in :data:`cuttlefish_jax.training.metrics.METRICS`; the first is the task's score.
      num_lengths: how many shapes its batches come in; a step is compiled for each.
      least_sizes: that the network must have, by the names of its attributes, e.g. ``{"vocab_size": 28996}``:
        JAX takes an id beyond the end of a table without a word.
    """

    num_outputs: int
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    train: Source
    evaluation: Mapping[str, Source]
    train_inputs: Callable[[jax.Array, Examples], tuple[Inputs, jax.Array]]
    eval_inputs: Callable[[Examples], Inputs]
    train_loss: Callable[[jax.Array, jax.Array], jax.Array]
    eval_loss: Callable[[jax.Array, jax.Array], jax.Array]
    predict: Callable[[jax.Array], jax.Array]
    metrics: tuple[str, ...]
    num_lengths: int = 1
    least_sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def score(self) -> str:
        """The metric that the best epoch is chosen by."""
        return self.metrics[0]

    def check_model(self, model: Any) -> None:
        """Refuses a network that is too small for the inputs, or made for inputs of another kind.

        Raises:
          ValueError: names the size, the network's and the one that is needed.
        """
        if hasattr(model, "vocab_size") and "vocab_size" not in self.least_sizes:
            kind = type(model).__name__
            raise ValueError(f"the inputs are images, and {kind} is for texts: use another, such as resnet18")
        for name, least in self.least_sizes.items():
            size = getattr(model, name, None)
            if size is None:
                raise ValueError(
                    f"the inputs are texts, and {type(model).__name__} has no {name}: use bert_base"
                )
            if size < least:
                raise ValueError(
                    f"the texts need {name} {least} or more, but the network has {size}: does the tokenizer "
                    "belong to it, and is data.max_length within its positions?"
                )

    def train_metrics(self, outputs: jax.Array, targets: jax.Array) -> dict[str, Any]:
        """``{"accuracy": f32[b]}`` of a training batch, ``{}`` where the targets are not classes."""
        if "accuracy" not in self.metrics or targets.ndim > 1:
            return {}
        return {"accuracy": (self.predict(outputs) == targets).astype("float32")}
