"""The front end for Flax Linen: finds a model's kernels, and puts factors in their place.

The model is left alone: a wrapper shares its scope and intercepts the calls of the layers in the plan, which
then run two stock Flax layers, ``u`` and ``v``, inside the layer's own scope.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import struct
from flax.core import meta

from cuttlefish_jax.factorize import factorize
from cuttlefish_jax.flops import count_marked, mark
from cuttlefish_jax.kernels import Kernel, Kernels, find_kernels, insert_axes, subtree
from cuttlefish_jax.plan import FactorizationPlan

_PROBE = "cuttlefish_probe"


@dataclasses.dataclass(frozen=True)
class LayerType:
    """How a Linen layer type is read as a matrix. Its kernel's axes are the reduction axes, then the output's.

    Attributes:
      num_reduction_axes: how many of the kernel's axes are contracted with the input.
      second: the changes of fields that turn the layer into its second factor, which maps the ``rank``
        features of the first to the layer's output.
      refuse: why this very layer cannot be factorized, or ``None``.
    """

    num_reduction_axes: Callable[[Any], int]
    second: Callable[[Any], dict[str, Any]] = lambda layer: {}
    refuse: Callable[[Any], str | None] = lambda layer: None


def _refuse_conv(layer: nn.Conv) -> str | None:
    if layer.feature_group_count != 1:
        return f"grouped convolution ({layer.feature_group_count} groups)"
    return "convolution with a mask" if layer.mask is not None else None


def _pointwise(layer: nn.Conv) -> dict[str, Any]:
    window = (1,) * len(layer.kernel_size)
    return dict(kernel_size=window, strides=1, padding="VALID", input_dilation=1, kernel_dilation=1)


# Exact types: a subclass may do anything with its kernel (weight standardisation, for one).
LAYER_TYPES: dict[type, LayerType] = {
    nn.Dense: LayerType(num_reduction_axes=lambda layer: 1),
    nn.Conv: LayerType(
        num_reduction_axes=lambda layer: len(layer.kernel_size) + 1, second=_pointwise, refuse=_refuse_conv
    ),
    nn.DenseGeneral: LayerType(
        num_reduction_axes=lambda layer: len(layer.axis) if isinstance(layer.axis, (tuple, list)) else 1,
        second=lambda layer: dict(axis=-1),
        refuse=lambda layer: "DenseGeneral with batch_dims" if layer.batch_dims else None,
    ),
}
_REPARAMETERISED = (nn.WeightNorm, nn.SpectralNorm)


class Factorized(nn.Module):
    """A model with some of its layers replaced by two factors each; made by :func:`cuttlefish_jax.factorize`.

    Attributes:
      model: the unchanged full-rank model.
      plan: which of its layers are factorized.
    """

    model: nn.Module
    plan: FactorizationPlan

    def setup(self):
        nn.share_scope(self, self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model."""
        return self._run(type(self.model).__call__, *args, **kwargs)

    def init_with_output(self, rngs: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """As the model's own; ``method`` is one of the model's."""
        return super().init_with_output(rngs, *args, method=self._via(method), **kwargs)

    def init(self, rngs: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """As the model's own; ``method`` is one of the model's."""
        return super().init(rngs, *args, method=self._via(method), **kwargs)

    def apply(self, variables: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """As the model's own; ``method`` is one of the model's."""
        return super().apply(variables, *args, method=self._via(method), **kwargs)

    def _via(self, method: Any) -> Callable[..., Any] | None:
        if method is None:
            return None
        if isinstance(method, str):
            method = getattr(type(self.model), method)
        # A method that was taken from an instance is called on the model inside this wrapper all the same.
        method = getattr(method, "__func__", method)
        return lambda self, *args, **kwargs: self._run(method, *args, **kwargs)

    def _run(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        depth, plan, seen = len(self.path), self.plan, set[str]()

        def intercept(next_fun, args, kwargs, context):
            layer = context.module
            path = "/".join(layer.path[depth:])
            if context.method_name != "__call__" or type(layer) not in LAYER_TYPES or path not in plan.ranks:
                return next_fun(*args, **kwargs)
            if type(layer).__name__ != (planned := plan.kernels[path].layer):
                raise ValueError(
                    f"{path!r} is a {type(layer).__name__}, in the plan a {planned}: another model's plan"
                )
            seen.add(path)
            return _call_factors(layer, plan.ranks[path], plan.extra_batch_norm, args, kwargs)

        with nn.intercept_methods(intercept):
            result = method(self.model, *args, **kwargs)
        if self.is_initializing() and (missed := [path for path in plan.ranks if path not in seen]):
            raise ValueError(
                f"the plan factorizes {missed[0]!r}, which the model does not call: another model's plan"
            )
        return result


def _call_factors(layer: Any, rank: int, extra_batch_norm: bool, args: tuple, kwargs: dict) -> Any:
    # Fresh factors get the default initializer: the layer's own may be of a fixed shape, or zeros.
    fresh = dict(kernel_init=nn.initializers.lecun_normal(), parent=layer)
    u = layer.clone(name="u", features=rank, use_bias=False, **fresh)
    v = layer.clone(name="v", **LAYER_TYPES[type(layer)].second(layer), **fresh)
    hidden = u(*args, **kwargs)
    if extra_batch_norm:
        # A layer is not told whether it trains; that its statistics may change says the same.
        training = layer.is_mutable_collection("batch_stats") and not layer.is_initializing()
        norm = nn.BatchNorm(
            use_running_average=not training, momentum=0.9, dtype=layer.dtype, name="norm", parent=layer
        )
        hidden = norm(hidden)
    return v(hidden)


@factorize.register
def _factorize_linen(model: nn.Module, plan: FactorizationPlan) -> Factorized:
    if isinstance(model, Factorized):
        raise ValueError(
            "the model is factorized already: make a plan for its .model, and merge its params first"
        )
    return Factorized(model=model.clone(), plan=plan)


@struct.dataclass
class _Stacked(meta.AxisMetadata):
    """A box around a kernel that notes the axes which ``scan`` and ``vmap`` add to it."""

    value: Any
    added: tuple[int, ...] = struct.field(pytree_node=False, default=())

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> Any:
        return self.replace(value=val)

    def add_axis(self, index: int, params: Mapping[Any, Any]) -> Any:
        return self.replace(added=(*self.added, index))

    def remove_axis(self, index: int, params: Mapping[Any, Any]) -> Any:
        return self.replace(added=self.added[:-1])


@dataclasses.dataclass
class _Findings:
    """What one abstract run of the model saw."""

    layers: dict[str, Any] = dataclasses.field(default_factory=dict)  # path -> layer, in call order
    refused: dict[str, str] = dataclasses.field(default_factory=dict)  # path -> reason
    owners: dict[str, str] = dataclasses.field(default_factory=dict)  # path -> type name of any module
    wrappers: list[str] = dataclasses.field(default_factory=list)  # reparameterising modules now running

    def intercept(self, next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext):
        layer = context.module
        path = "/".join(layer.path)
        kind = type(layer).__name__
        self.owners.setdefault(path, kind)
        if isinstance(layer, _REPARAMETERISED):
            self.wrappers.append(kind)
            result = next_fun(*args, **kwargs)
            self.wrappers.pop()
            return result
        is_probe = path.rpartition("/")[2] == _PROBE
        if is_probe or context.method_name != "__call__" or type(layer) not in LAYER_TYPES:
            return next_fun(*args, **kwargs)
        reason = LAYER_TYPES[type(layer)].refuse(layer)
        if self.wrappers:
            reason = f"its kernel is computed by {self.wrappers[-1]}"
        if reason is not None:
            self.refused[path] = reason
            return next_fun(*args, **kwargs)
        self.layers.setdefault(path, layer)
        probe = layer.clone(name=_PROBE, parent=layer, kernel_init=_boxed(layer.kernel_init))
        return mark(path, probe(*args, **kwargs))


def _boxed(init: Callable) -> Callable:
    return lambda *args, **kwargs: _Stacked(meta.unbox(init(*args, **kwargs)))


@find_kernels.register
def _find_kernels_linen(model: nn.Module, *inputs: Any, **kwargs: Any) -> Kernels:
    found = _Findings()
    # Flags given by position (train=False) must stay Python values; only arrays are traced.
    leaves, treedef = jax.tree.flatten(inputs)
    traced = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]

    def run(*arrays: Any) -> Any:
        filled = {**dict(enumerate(leaves)), **dict(zip(traced, arrays, strict=True))}
        args = jax.tree.unflatten(treedef, [filled[i] for i in range(len(leaves))])
        with nn.intercept_methods(found.intercept):
            return model.init({"params": jax.random.key(0)}, *args, **kwargs).get("params", {})

    jaxpr, params = jax.make_jaxpr(run, return_shape=True)(*(leaves[i] for i in traced))
    batch = leaves[traced[0]].shape[0] if traced and leaves[traced[0]].ndim else 1
    elements = count_marked(jaxpr.jaxpr)
    entries = []
    for path, layer in found.layers.items():
        box = subtree(params, f"{path}/{_PROBE}".lstrip("/"))["kernel"]
        entries.append(_kernel(path, layer, box, elements[path] // batch))
    return Kernels(
        entries=tuple(entries),
        skipped_entries=tuple(_skipped(params, found)),
        num_params=sum(leaf.size for leaf in jax.tree.leaves(params)),
    )


def _kernel(path: str, layer: Any, box: _Stacked, elements: int) -> Kernel:
    shape = tuple(box.value.shape)
    axes, stack = insert_axes(len(shape) - len(box.added), box.added)
    split = LAYER_TYPES[type(layer)].num_reduction_axes(layer)
    kernel = Kernel(
        path=path,
        layer=type(layer).__name__,
        shape=shape,
        reduction_axes=axes[:split],
        output_axes=axes[split:],
        stack_axes=tuple(sorted(stack)),
        stack_indices=box.added,
    )
    applied = elements // (kernel.n * math.prod(kernel.stack_shape))
    return dataclasses.replace(kernel, positions=max(1, applied))


def _skipped(params: Any, found: _Findings) -> Iterator[tuple[str, str]]:
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        names = [str(key.key) for key in keys if hasattr(key, "key")]
        if leaf.ndim < 2 or _PROBE in names:
            continue
        path, owner = "/".join(names[:-1]), found.owners.get("/".join(names[:-1]))
        if names[-1] == "kernel" or owner in ("Embed",):
            reason = found.refused.get(
                path, f"{owner or 'its layer'} is not a layer type that can be factorized"
            )
            yield path, reason
        else:
            yield "/".join(names), f"not a kernel, but a parameter of {owner or 'the model'}"
