"""What a layer type says of its kernel, and of the two layers that stand in its place.

The layer types of Flax are registered by the front ends; :func:`register_layer` adds one's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax.numpy as jnp

from cuttlefish_jax.kernels import KernelAxes, find_kernels


def _no_factors(*_: Any) -> NoReturn:
    raise TypeError("a layer type that is refused has neither axes nor factors")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerType:
    """How the layers of a type are read as matrices, and split in two.

    A layer that is replaced becomes ``u``, a layer of its own class with ``rank`` features and no bias, and
    ``v``, which maps these to the layer's output and has its bias. What both do one after the other has to be
    what the layer does with the product of their kernels.

    Attributes:
      axes: the axes of the kernel of a layer.
      first: the fields of a layer that change, and their values, when it becomes ``u`` at a rank. The kernel
        of ``u`` has the layer's axes in their order, one of size ``rank`` in the place of the output axes.
      second: the same for ``v``; with ``second_type``, all arguments of that class. The kernel of ``v`` is a
        parameter ``kernel`` with an axis of size ``rank``, then the output axes.
      second_type: the class of ``v``, if that is not the layer's own.
      param: the name of the layer's kernel among its parameters.
      initializer: the field of a Linen layer with its kernel's initializer, which may give sharding metadata;
        ``None`` if there is none.
      lookup: whether the layer is called with integers that choose rows of the kernel. Such a layer is only
        found on request.
      refuse: why this very layer cannot be factorized, or ``None``.
      name: what kernels call the type; by default the name of the class.
    """

    axes: Callable[[Any], KernelAxes]
    first: Callable[[Any, int], Mapping[str, Any]]
    second: Callable[[Any, int], Mapping[str, Any]]
    second_type: type | None = None
    param: str = "kernel"
    initializer: str | None = "kernel_init"
    lookup: bool = False
    refuse: Callable[[Any], str | None] = lambda layer: None
    name: str | None = None

    @classmethod
    def refused(cls, reason: str) -> LayerType:
        """A type whose layers, and all layers inside them, are never factorized: with the reason."""
        return cls(axes=_no_factors, first=_no_factors, second=_no_factors, refuse=lambda layer: reason)

    def name_of(self, layer: Any) -> str:
        """What kernels call the type of ``layer``."""
        return self.name or type(layer).__name__


def refuse_dtype(param: str, dtype: Any) -> str | None:
    """Why a kernel of a dtype cannot be factorized, or ``None``."""
    return (
        None
        if jnp.issubdtype(dtype, jnp.floating)
        else f"its {param} is of {dtype}, which is not floating-point"
    )


# Exact types: a subclass may do anything with its kernel (weight standardisation, for one).
LAYER_TYPES: dict[type, LayerType] = {}


def register_layer(layer_class: type, layer_type: LayerType) -> None:
    """Lets :func:`cuttlefish_jax.find_kernels` find the layers of a class, and factorize replace them.

    The class itself is meant, not its subclasses: they may do anything with the kernel. Its layers are called
    with one array. Test a registration: a model factorized at full rank has to compute what it did.

    Args:
      layer_class: a class of Flax modules.
      layer_type: what its kernel is, and what stands in its place.

    Raises:
      TypeError: if ``layer_class`` is no class of Flax modules.
      ValueError: if the class is registered already.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, cuttlefish_jax as cf
      >>> class Scaled(nn.Module):  # its parameter has the output axis first, and another name
      ...     features: int
      ...
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         init = nn.initializers.lecun_normal(in_axis=-1, out_axis=-2)
      ...         return x @ self.param("weight", init, (self.features, x.shape[-1])).T / 2
      >>> cf.register_layer(
      ...     Scaled,
      ...     cf.LayerType(
      ...         param="weight",
      ...         axes=lambda layer: cf.KernelAxes(reduction=(1,), output=(0,)),
      ...         first=lambda layer, rank: {"features": rank},
      ...         second=lambda layer, rank: {"features": layer.features, "use_bias": False},
      ...         second_type=nn.Dense,
      ...         initializer=None,
      ...     ),
      ... )
      >>> model, x = Scaled(6), jnp.ones((1, 8))
      >>> kernels = cf.find_kernels(model, x)
      >>> kernels[""].m, kernels[""].n
      (8, 6)
      >>> plan = cf.FactorizationPlan.from_ranks(kernels, {"": 2})
      >>> jax.tree.map(jnp.shape, cf.factorize(model, plan).init(jax.random.key(0), x)["params"])
      {'u': {'weight': (2, 8)}, 'v': {'kernel': (2, 6)}}
    """
    if not isinstance(layer_class, type) or find_kernels.dispatch(layer_class) is find_kernels.dispatch(
        object
    ):
        name = layer_class.__name__ if isinstance(layer_class, type) else repr(layer_class)
        raise TypeError(f"register_layer needs a class of Flax modules, got {name}")
    if layer_class in LAYER_TYPES:
        raise ValueError(f"{layer_class.__name__} is registered already: a class has one layer type")
    LAYER_TYPES[layer_class] = layer_type
