"""The network that a run's settings describe, and the shapes of what it is called with: no data is needed."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from cuttlefish_jax.models import create_model
from cuttlefish_jax.training.config import Config

# Of config.model; the others are options of the network.
_NO_OPTIONS = ("name", "pretrained", "fresh", "unused", "sync_batch_norm")


def create_network(config: Config, *, num_outputs: int, norm_axis_name: str | None = None) -> nn.Module:
    """The full-rank network.

    Args:
      config: the section ``model`` of a configuration; its empty settings are the network's own defaults.
      num_outputs: length of the network's output.
      norm_axis_name: mapped axis that batch statistics are averaged over.

    Raises:
      ValueError: if there is no such network, or it has no such option.
    """
    options = {key: value for key, value in dict(config).items() if value and key not in _NO_OPTIONS}
    return create_model(config.name, num_classes=num_outputs, norm_axis_name=norm_axis_name, **options)


def input_shapes(data: Config) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The arguments of the network for a batch of one: an image, or the three arrays of a text.

    Args:
      data: the section ``data`` of a configuration.
    """
    if data.name.partition("/")[0] == "glue":
        return (jax.ShapeDtypeStruct((1, data.max_length), jnp.int32),) * 3
    return (jax.ShapeDtypeStruct((1, data.image_size, data.image_size, data.channels), jnp.float32),)
