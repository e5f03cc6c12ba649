"""The front end for Flax Linen: finds a model's kernels, and puts factors in their place.

The model is left alone: a wrapper shares its scope and intercepts the calls of the layers in the plan, which
then run two stock Flax layers, ``u`` and ``v``, inside the layer's own scope.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import core, struct
from flax.core import freeze, meta

from cuttlefish_jax.factorize import factorize
from cuttlefish_jax.flops import count_marked, mark
from cuttlefish_jax.kernels import Kernel, Kernels, check_kernel, find_kernels, insert_axes, subtree
from cuttlefish_jax.plan import FactorizationPlan

_PROBE = "cuttlefish_probe"


@dataclasses.dataclass(frozen=True)
class LayerType:
    """How a Linen layer type is read as a matrix: its kernel has the reduction axes, then the output axes.

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
    window = (1,) * np.size(layer.kernel_size)
    return dict(kernel_size=window, strides=1, padding="VALID", input_dilation=1, kernel_dilation=1)


# Exact types: a subclass may do anything with its kernel (weight standardisation, for one).
LAYER_TYPES: dict[type, LayerType] = {
    nn.Dense: LayerType(num_reduction_axes=lambda layer: 1),
    nn.Conv: LayerType(
        num_reduction_axes=lambda layer: np.size(layer.kernel_size) + 1,
        second=_pointwise,
        refuse=_refuse_conv,
    ),
    nn.DenseGeneral: LayerType(
        num_reduction_axes=lambda layer: np.size(layer.axis),
        second=lambda layer: dict(axis=-1),
        refuse=lambda layer: "DenseGeneral with batch_dims" if layer.batch_dims else None,
    ),
}
_REPARAMETERISED = (nn.WeightNorm, nn.SpectralNorm)


@dataclasses.dataclass(frozen=True)
class _NotASubmodule:
    """Holds a module that Linen shall not register: it would reserve a name and change the paths below it."""

    module: nn.Module


class Factorized(nn.Module):
    """A model with some of its layers replaced by two factors each; made by :func:`cuttlefish_jax.factorize`.

    Attributes:
      full: holds :attr:`model`.
      plan: which of its layers are factorized.
    """

    full: _NotASubmodule
    plan: FactorizationPlan

    @property
    def model(self) -> nn.Module:
        """The unchanged full-rank model."""
        return self.full.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model."""
        return self._run(type(self.model).__call__, *args, **kwargs)

    @nn.nowrap
    def init_with_output(self, rngs: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """As the model's own; ``method`` is one of the model's."""
        return super().init_with_output(rngs, *args, method=self._via(method), **kwargs)

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """As the model's own; ``method`` is one of the model's."""
        return super().apply(variables, *args, method=self._via(method), **kwargs)

    @nn.nowrap
    def _via(self, method: Any) -> Callable[..., Any]:
        # Also of a method taken from an instance: it is called on the model inside this wrapper.
        function = _unbound(self.model, method)
        return lambda self, *args, **kwargs: self._run(function, *args, **kwargs)

    @nn.nowrap
    def _run(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if (scope := self.scope) is None:
            raise ValueError("the model is not bound to params: use init, apply or bind")
        depth, plan, ranks = len(self.path), self.plan, self.plan.ranks

        def intercept(next_fun, args, kwargs, context):
            layer = context.module
            if context.method_name != "__call__" or type(layer) not in LAYER_TYPES:
                return next_fun(*args, **kwargs)
            path = "/".join(layer.path[depth:])
            if path not in ranks:
                return next_fun(*args, **kwargs)
            if type(layer).__name__ != (planned := plan.kernels[path].layer):
                raise ValueError(
                    f"{path!r} is a {type(layer).__name__}, in the plan a {planned}: another model's plan"
                )
            return _call_factors(layer, ranks[path], plan.extra_batch_norm, args, kwargs)

        # In this module's own scope, as if it were this module; afresh, so that it can be called again.
        inner = scope.rewound()
        inner.flags = freeze({**scope.flags, _FLAG: _Unique() if self.is_initializing() else hash(plan)})
        with nn.intercept_methods(intercept):
            result = method(self.model.clone(parent=inner), *args, **kwargs)
        if self.is_initializing() and method is type(self.model).__call__:
            self._check_factors()  # another method may leave some layers out
        return result

    @nn.nowrap
    def _check_factors(self) -> None:
        params = self.variables.get("params", {})
        for path, rank in self.plan.rank_entries:
            try:
                for factor in self.plan.kernels[path].factors(rank):
                    check_kernel(params, factor)
            except ValueError as error:
                raise ValueError(f"the plan was made for another model: {error}") from error


def _unbound(model: nn.Module, method: Any) -> Callable[..., Any]:
    """The function of the model's class that ``method`` of ``init`` or ``apply`` means."""
    if method is None:
        return type(model).__call__
    if isinstance(method, str):
        return getattr(type(model), method)
    return getattr(method, "__func__", method)


# ``nn.jit`` looks its traces up by a module's fields, its variables' shapes and its scope's flags, which the
# scopes below inherit; not by its path, nor by what intercepts it. This flag has to tell the rest.
_FLAG = "cuttlefish"


class _Unique:
    """A flag that no other equals, not even itself: ``nn.jit`` goes by the elements of what has elements.

    It is for the calls that make params: while there are none, nothing tells two equal layers apart.
    """

    def __iter__(self) -> Iterator[int]:
        yield secrets.randbits(60)


def _call_factors(layer: Any, rank: int, extra_batch_norm: bool, args: tuple, kwargs: dict) -> Any:
    # Fresh factors get the default initializer: the layer's own may be of a fixed shape, or zeros.
    fresh = dict(kernel_init=nn.initializers.lecun_normal(), parent=layer)
    u = layer.clone(name="u", features=rank, use_bias=False, **fresh)
    v = layer.clone(name="v", **LAYER_TYPES[type(layer)].second(layer), **fresh)
    hidden = u(*args, **kwargs)
    if extra_batch_norm:
        # A layer is not told whether it trains; that its statistics may change says the same.
        training = layer.is_mutable_collection("batch_stats")
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
    return Factorized(full=_NotASubmodule(model.clone()), plan=plan)


@struct.dataclass
class _Stacked(meta.AxisMetadata):
    """A box around a kernel that notes the axes which ``scan`` and ``vmap`` add to it."""

    value: Any
    added: tuple[int, ...] = struct.field(pytree_node=False, default=())

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> Any:
        return dataclasses.replace(self, value=val)

    def add_axis(self, index: int, params: Mapping[Any, Any]) -> Any:
        return dataclasses.replace(self, added=(*self.added, index))

    def remove_axis(self, index: int, params: Mapping[Any, Any]) -> Any:
        return dataclasses.replace(self, added=self.added[:-1])


@dataclasses.dataclass
class _Findings:
    """What one abstract run of the model saw."""

    layers: dict[str, Any] = dataclasses.field(default_factory=dict)  # path -> layer, in call order
    refused: dict[str, str] = dataclasses.field(default_factory=dict)  # path -> reason
    owners: dict[str, str] = dataclasses.field(default_factory=dict)  # path -> type name of any module
    ndims: dict[str, int] = dataclasses.field(default_factory=dict)  # param -> its axes, in one copy
    wrappers: list[str] = dataclasses.field(default_factory=list)  # reparameterising modules now running
    embedding_first: bool = False  # an embedding ran before any of the layers

    def intercept(self, next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext):
        layer = context.module
        if layer.scope is None or _PROBE in layer.path:
            return next_fun(*args, **kwargs)
        path = "/".join(layer.path)
        self.owners.setdefault(path, type(layer).__name__)
        is_wrapper = isinstance(layer, _REPARAMETERISED)
        if is_wrapper:
            self.wrappers.append(type(layer).__name__)
        if isinstance(layer, nn.Embed) and context.method_name == "__call__" and not self.layers:
            self.embedding_first = True
        result = next_fun(*args, **kwargs)
        if is_wrapper:
            self.wrappers.pop()
        for name, leaf in layer.variables.get("params", {}).items():
            if not isinstance(leaf, Mapping):
                self.ndims[f"{path}/{name}"] = jnp.ndim(meta.unbox(leaf))
        if context.method_name != "__call__" or type(layer) not in LAYER_TYPES:
            return result
        if f"{path}/kernel" not in self.ndims:
            return result  # factorized already: its factors have the kernels
        reason = LAYER_TYPES[type(layer)].refuse(layer)
        if self.wrappers:
            reason = f"its kernel is computed by {self.wrappers[-1]}"
        if reason is not None:
            self.refused[path] = reason
            return result
        self.layers.setdefault(path, layer)
        # Like the layer, but for a box around its kernel that tells which axes are added on the way out.
        layer.clone(name=_PROBE, parent=layer, kernel_init=_boxed(layer.kernel_init))(*args, **kwargs)
        return mark(path, result)


def _boxed(init: Callable) -> Callable:
    return lambda *args, **kwargs: _Stacked(meta.unbox(init(*args, **kwargs)))


def trace(
    model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], intercept: Callable
) -> tuple[Any, Any]:
    """The traced program of the model's ``init``, and its params: shapes alone, nothing is computed.

    Args:
      model: a module without a parent.
      inputs: arrays or ``jax.ShapeDtypeStruct``, and whatever else it is called with.
      kwargs: the same; ``method`` is one of the model's.
      intercept: for ``nn.intercept_methods``.
    """
    # Flags (train=False) and the method must stay Python values; only arrays are traced.
    leaves, treedef = jax.tree.flatten((inputs, kwargs))
    traced = [i for i, leaf in enumerate(leaves) if is_array(leaf)]

    def run(*arrays: Any) -> Any:
        filled = {**dict(enumerate(leaves)), **dict(zip(traced, arrays, strict=True))}
        args, options = jax.tree.unflatten(treedef, [filled[i] for i in range(len(leaves))])
        method = _unbound(model, options.pop("method", None))
        init = core.init(
            lambda scope: method(model.clone(parent=scope), *args, **options), flags={_FLAG: _Unique()}
        )
        with nn.intercept_methods(intercept):
            output, variables = init({"params": jax.random.key(0)})
        # With the output, lest JAX drops from the program what nothing depends on.
        outputs = [leaf for leaf in jax.tree.leaves(output) if isinstance(leaf, jax.Array)]
        return outputs, variables.get("params", {})

    jaxpr, (_, params) = jax.make_jaxpr(run, return_shape=True)(*(leaves[i] for i in traced))
    return jaxpr.jaxpr, params


def is_array(leaf: Any) -> bool:
    """Whether ``leaf`` is an array or the shape and dtype of one."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


@find_kernels.register
def _find_kernels_linen(model: nn.Module, *inputs: Any, **kwargs: Any) -> Kernels:
    found = _Findings()
    jaxpr, params = trace(model, inputs, kwargs, found.intercept)
    arrays = [leaf for leaf in jax.tree.leaves((inputs, kwargs)) if is_array(leaf)]
    batch = arrays[0].shape[0] if arrays and arrays[0].ndim else 1
    elements = count_marked(jaxpr)
    entries = []
    for path, layer in found.layers.items():
        box = subtree(params, f"{path}/{_PROBE}".lstrip("/"))["kernel"]
        entries.append(_kernel(path, layer, box, elements[path] // max(batch, 1)))
    own = {name: leaf for name, leaf in _named_params(params) if _PROBE not in name.split("/")}
    return Kernels(
        entries=tuple(entries),
        skipped_entries=tuple(dict(_skipped(own, found)).items()),
        num_params=sum(leaf.size for leaf in own.values()),
        embedding_first=found.embedding_first,
    )


def _named_params(params: Any) -> Iterator[tuple[str, Any]]:
    for keys, leaf in jax.tree.leaves_with_path(params):
        # The keys that are not of dicts are those of boxes.
        yield "/".join(str(key.key) for key in keys if hasattr(key, "key")), leaf


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


def _skipped(params: Mapping[str, Any], found: _Findings) -> Iterator[tuple[str, str]]:
    for name, leaf in params.items():
        path, _, key = name.rpartition("/")
        if found.ndims.get(f"{path}/{key}", jnp.ndim(leaf)) < 2 or (key == "kernel" and path in found.layers):
            continue
        owner = found.owners.get(path, "the model")
        if key == "bias" and f"{path}/kernel".lstrip("/") in params:
            continue  # of [heads, features], for one: it goes with its kernel
        if key == "kernel" or owner == "Embed":
            yield path, found.refused.get(path, f"{owner} is not a type that can be factorized")
        else:
            yield name, f"not a kernel, but a parameter of {owner}"
