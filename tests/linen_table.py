"""The layers and contexts of Linen, for test_layer_table.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from layer_table import CONTEXTS, filled

import cuttlefish_jax as cf

IMPOSSIBLE: dict[str, str] = {}


class Grouped(nn.Module):
    """A layer whose batch axes lead, called on an input in which they are after the batch."""

    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        options = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        general = nn.DenseGeneral((2, 3), axis=(-1, -2), batch_dims=(0,), name="general", **options)
        return jnp.moveaxis(general(jnp.moveaxis(x, 1, 0)), 0, 1)


# The matrix of each is of 24 x 6 (that of attention's output of 6 x 24): one shape is one loop to compile.
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "dense": functools.partial(nn.Dense, 6),
    "conv_1d": functools.partial(nn.Conv, 6, (3,), padding="CAUSAL", kernel_dilation=2),
    "conv_2d": functools.partial(nn.Conv, 6, (3, 2), padding="CIRCULAR", strides=(1, 2)),
    "conv_3d": functools.partial(nn.Conv, 6, (2, 3, 2), padding="VALID", use_bias=False),
    "transposed": functools.partial(nn.ConvTranspose, 6, (3, 2), strides=(2, 1), transpose_kernel=True),
    "general": functools.partial(nn.DenseGeneral, (2, 3), axis=(1, 3)),
    "general_batch": Grouped,
    "einsum": functools.partial(nn.Einsum, (2, 24, 3), "bsd,hdk->bhsk"),
    "einsum_batch": functools.partial(nn.Einsum, (5, 24, 6), "...gd,gde->...ge"),
    "attention": functools.partial(nn.MultiHeadDotProductAttention, 2, qkv_features=6, out_features=24),
    "embed": functools.partial(nn.Embed, 24, 6),
}


class Plain(nn.Module):
    """Made where it is called."""

    make: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x):
        return self.make(name="layer")(x)


class Setup(nn.Module):
    """Made beforehand."""

    make: Callable[..., nn.Module]

    def setup(self):
        self.layer = self.make()

    def __call__(self, x):
        return self.layer(x)


class Shared(Setup):
    """Called twice."""

    def __call__(self, x):
        return self.layer(x) + self.layer(x[:, ::-1])


class Remat(nn.Module):
    """Computed anew for the gradient."""

    make: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x):
        return nn.remat(lambda layer, x: layer(x))(self.make(name="layer"), x)


class Scan(nn.Module):
    """A copy for each step, all called on the same."""

    make: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(
            lambda layer, carry, x: (carry, layer(x)),
            variable_axes={"params": CONTEXTS["scan"].axis},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            out_axes=1,
            length=CONTEXTS["scan"].copies,
        )
        return scanned(self.make(name="layer"), (), x)[1]


class Vmap(nn.Module):
    """Copies side by side, all called on the same."""

    make: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x):
        mapped = nn.vmap(
            lambda layer, x: layer(x),
            variable_axes={"params": CONTEXTS["vmap"].axis},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=1,
            axis_size=CONTEXTS["vmap"].copies,
        )
        return mapped(self.make(name="layer"), x)


class Nested(nn.Module):
    """Three deep: each level made in another way."""

    make: Callable[..., nn.Module]

    def setup(self):
        self.inner = Middle(Plain(self.make))

    def __call__(self, x):
        return self.inner(x)


class Middle(nn.Module):
    """Given what is inside."""

    inner: nn.Module

    def __call__(self, x):
        return self.inner(x)


class Model(nn.Module):
    """All layers, each in the same context and with an input of its own."""

    context: Callable[..., nn.Module]
    dtype: Any

    @nn.compact
    def __call__(self, inputs):
        options = dict(dtype=self.dtype, param_dtype=self.dtype)
        return {
            name: self.context(functools.partial(LAYERS[name], **options), name=name)(x)
            for name, x in inputs.items()
        }


class Cells:
    """The model of one context and dtype."""

    def __init__(self, context: str, dtype: Any, inputs: Any):
        kind = {kind.__name__.lower(): kind for kind in (Plain, Setup, Shared, Remat, Scan, Vmap, Nested)}
        self.model, self.inputs = Model(kind[context], dtype), inputs
        self.params = filled(self._made(self.model))
        self.kernels = cf.find_kernels(self.model, inputs, include_embeddings=True)

    def _made(self, model: nn.Module) -> Any:
        return jax.eval_shape(model.init, jax.random.key(0), self.inputs)["params"]

    def made(self, plan: cf.FactorizationPlan) -> Any:
        return self._made(cf.factorize(self.model, plan))

    def factorized(self, plan: cf.FactorizationPlan) -> tuple[Any, Callable[[Any, Any], Any]]:
        low = cf.factorize(self.model, plan)
        return cf.factorize_params(self.params, plan), lambda params, x: low.apply({"params": params}, x)

    def plain(self, params: Any) -> dict[str, Any]:
        return params


@functools.cache
def bare(name: str) -> Callable[[Any, Any], Any]:
    layer = LAYERS[name]()
    return jax.jit(lambda params, x: layer.apply({"params": params}, x))
