"""Plain Flax networks by name. They know nothing of low rank: ``cf.factorize`` works on any of them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from flax import linen as nn

from cuttlefish_jax.models import bert, resmlp, resnet, vgg, vit

# To add a network: a function of keyword arguments, num_classes among them, that returns a module.
MODELS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {
        "resnet18": resnet.resnet18,
        "resnet34": resnet.resnet34,
        "resnet50": resnet.resnet50,
        "resnet101": resnet.resnet101,
        "wide_resnet50_2": resnet.wide_resnet50_2,
        "vgg19": vgg.vgg19,
        "deit_tiny": vit.deit_tiny,
        "deit_small": vit.deit_small,
        "deit_base": vit.deit_base,
        "resmlp_s12": resmlp.resmlp_s12,
        "resmlp_s24": resmlp.resmlp_s24,
        "resmlp_s36": resmlp.resmlp_s36,
        "bert_base": bert.bert_base,
    }
)


def create_model(name: str, *, num_classes: int, **options: Any) -> nn.Module:
    """Builds the network called ``name``.

    Args:
      name: a key of ``MODELS``.
      num_classes: length of the logits.
      **options: what the network's own function in ``MODELS`` takes, e.g. ``width=16``.

    Returns:
      A Linen module, called as ``model(*inputs, train=False)``, with images ``f32[batch, h, w, channels]``
      or what BERT takes; it returns logits ``f32[batch, num_classes]``.

    Raises:
      ValueError: if there is no such network, or it has no such option, or an option's value is wrong.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = create_model("resnet18", num_classes=10, width=8)
      >>> images = jnp.zeros((1, 32, 32, 3))
      >>> jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), images)[0]).shape
      (1, 10)
    """
    if name not in MODELS:
        raise ValueError(f"no model {name!r}; {_suggest(name, list(MODELS))}")
    constructor = MODELS[name]
    valid = [option for option in inspect.signature(constructor).parameters if option != "num_classes"]
    for option in options:
        if option not in valid:
            raise ValueError(f"{name} has no option {option!r}; {_suggest(option, valid)}")
    return constructor(num_classes=num_classes, **options)


def _suggest(name: str, valid: list[str]) -> str:
    near = difflib.get_close_matches(name, valid, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(valid)}"
