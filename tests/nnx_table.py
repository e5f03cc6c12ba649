"""The layers and contexts of NNX, for test_layer_table.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from layer_table import CONTEXTS, filled

import cuttlefish_jax as cf

IMPOSSIBLE = {"setup": "an NNX module makes its layers in __init__, wherever they are called: that is plain"}


class Grouped(nnx.Module):
    """A layer whose batch axes lead, called on an input in which they are after the batch."""

    def __init__(self, **options: Any):
        self.general = nnx.LinearGeneral((4, 6), (2, 3), axis=(-2, -1), batch_axis={0: 2}, **options)

    def __call__(self, x):
        return jnp.moveaxis(self.general(jnp.moveaxis(x, 1, 0)), 0, 1)


# The matrix of each is of 24 x 6 (that of attention's output of 6 x 24): one shape is one loop to compile.
LAYERS: dict[str, Callable[..., nnx.Module]] = {
    "dense": functools.partial(nnx.Linear, 24, 6),
    "conv_1d": functools.partial(nnx.Conv, 8, 6, (3,), padding="CAUSAL", kernel_dilation=2),
    "conv_2d": functools.partial(nnx.Conv, 4, 6, (3, 2), padding="CIRCULAR", strides=(1, 2)),
    "conv_3d": functools.partial(nnx.Conv, 2, 6, (2, 3, 2), padding="VALID", use_bias=False),
    "transposed": functools.partial(nnx.ConvTranspose, 4, 6, (3, 2), strides=(2, 1), transpose_kernel=True),
    "general": functools.partial(nnx.LinearGeneral, (4, 6), (2, 3), axis=(1, 3)),
    "general_batch": Grouped,
    "einsum": functools.partial(nnx.Einsum, "bsd,hdk->bhsk", (2, 24, 3), (2, 1, 3)),
    "einsum_batch": functools.partial(nnx.Einsum, "...gd,gde->...ge", (5, 24, 6), (5, 6)),
    "attention": functools.partial(
        nnx.MultiHeadAttention, 2, 24, qkv_features=6, out_features=24, decode=False
    ),
    "embed": functools.partial(nnx.Embed, 24, 6),
}


class Plain(nnx.Module):
    """Called once."""

    def __init__(self, make: Callable[..., nnx.Module], rngs: nnx.Rngs):
        self.layer = make(rngs=rngs)

    def __call__(self, x):
        return self.layer(x)


class Shared(Plain):
    """Called by two names."""

    def __init__(self, make: Callable[..., nnx.Module], rngs: nnx.Rngs):
        super().__init__(make, rngs)
        self.the_same = self.layer

    def __call__(self, x):
        return self.layer(x) + self.the_same(x[:, ::-1])


class Remat(Plain):
    """Computed anew for the gradient."""

    def __call__(self, x):
        return nnx.remat(lambda layer, x: layer(x))(self.layer, x)


class Copies(nnx.Module):
    """Copies of a layer, made by vmap."""

    context: str

    def __init__(self, make: Callable[..., nnx.Module], rngs: nnx.Rngs):
        context = CONTEXTS[self.context]
        self.axes = nnx.StateAxes({nnx.Param: context.axis, ...: 0})
        made = nnx.vmap(lambda rngs: make(rngs=rngs), out_axes=self.axes)
        self.layer = made(rngs.split(context.copies))


class Scan(Copies):
    """A copy for each step, all called on the same."""

    context = "scan"

    def __call__(self, x):
        return nnx.scan(lambda layer, x: layer(x), in_axes=(self.axes, None), out_axes=1)(self.layer, x)


class Vmap(Copies):
    """Copies side by side, all called on the same."""

    context = "vmap"

    def __call__(self, x):
        return nnx.vmap(lambda layer, x: layer(x), in_axes=(self.axes, None), out_axes=1)(self.layer, x)


class Nested(nnx.Module):
    """Three deep."""

    def __init__(self, make: Callable[..., nnx.Module], rngs: nnx.Rngs, depth: int = 2):
        self.inner = Nested(make, rngs, depth - 1) if depth > 1 else Plain(make, rngs)

    def __call__(self, x):
        return self.inner(x)


class Model(nnx.Module):
    """All layers, each in the same context and with an input of its own."""

    def __init__(self, context: Callable[..., nnx.Module], dtype: Any, rngs: nnx.Rngs):
        options = dict(dtype=dtype, param_dtype=dtype)
        for name, make in LAYERS.items():
            setattr(self, name, context(functools.partial(make, **options), rngs))

    def __call__(self, inputs):
        return {name: getattr(self, name)(x) for name, x in inputs.items()}


class Cells:
    """The model of one context and dtype."""

    def __init__(self, context: str, dtype: Any, inputs: Any):
        kind = {kind.__name__.lower(): kind for kind in (Plain, Shared, Remat, Scan, Vmap, Nested)}
        self.abstract = nnx.eval_shape(lambda: Model(kind[context], dtype, nnx.Rngs(0)))
        graphdef, params, rest = nnx.split(self.abstract, nnx.Param, ...)
        self.model = nnx.merge(graphdef, filled(params), jax.tree.map(_zeros, rest))
        self.params = self.plain(self.model)
        self.kernels = cf.find_kernels(self.model, inputs, include_embeddings=True)

    def made(self, plan: cf.FactorizationPlan) -> Any:
        return self.plain(cf.factorize(self.abstract, plan))

    def factorized(self, plan: cf.FactorizationPlan) -> tuple[Any, Callable[[Any, Any], Any]]:
        graphdef, params, rest = nnx.split(cf.factorize(self.model, plan), nnx.Param, ...)
        return params, lambda params, x: nnx.merge(graphdef, params, rest)(x)

    def plain(self, params: Any) -> dict[str, Any]:
        state = nnx.state(params, nnx.Param) if isinstance(params, nnx.Module) else params
        return nnx.to_pure_dict(state)


def _zeros(leaf: Any) -> Any:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.zeros((*leaf.shape, 2), jnp.uint32))
    return jnp.zeros(leaf.shape, leaf.dtype)


@functools.cache
def bare(name: str) -> Callable[[Any, Any], Any]:
    graphdef, params, rest = nnx.split(nnx.eval_shape(lambda: LAYERS[name](rngs=nnx.Rngs(0))), nnx.Param, ...)

    def call(values: Any, x: Any) -> Any:
        state = nnx.clone(params)
        nnx.replace_by_pure_dict(state, values)
        return nnx.merge(graphdef, state, jax.tree.map(_zeros, rest))(x)

    return jax.jit(call)
