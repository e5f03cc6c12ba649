"""DeiT: vision transformers that train on ImageNet alone, without distillation.

References:
  Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021.
  Touvron et al., Training data-efficient image transformers & distillation through attention, ICML 2021.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from cuttlefish_jax.models.layers import (
    MLP,
    check_positive,
    check_rate,
    drop_path,
    embed_patches,
    floating,
    normal,
)


class Attention(nn.Module):
    """Self-attention whose queries, keys and values come from one dense layer.

    Attributes:
      heads: how many.
      dtype: of the computation; the softmax is in float32.
    """

    heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[b, t, d]`` to ``[b, t, d]``."""
        batch, tokens, width = x.shape
        qkv = nn.Dense(3 * width, dtype=self.dtype, kernel_init=normal, name="qkv")(x)
        qkv = qkv.reshape(batch, tokens, 3, self.heads, width // self.heads)
        x = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        x = x.reshape(batch, tokens, width)
        return nn.Dense(width, dtype=self.dtype, kernel_init=normal, name="proj")(x)


class Block(nn.Module):
    """Attention and an MLP, each normalised before and with a residual connection around.

    Attributes:
      heads: of the attention.
      drop_path: share of the residual branches that training drops.
      dtype: of the computation.
    """

    heads: int
    drop_path: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps ``[b, t, d]`` to ``[b, t, d]``."""
        y = layer_norm(self.dtype, "norm1")(x)
        y = Attention(heads=self.heads, dtype=self.dtype, name="attention")(y)
        x = x + drop_path(y, self.drop_path, train)
        y = layer_norm(self.dtype, "norm2")(x)
        y = MLP(dtype=self.dtype, name="mlp")(y)
        return x + drop_path(y, self.drop_path, train)


class VisionTransformer(nn.Module):
    """A transformer on patches of an image; a class token collects what the head needs.

    Attributes:
      num_classes: length of the logits.
      width: features of a token.
      depth: number of blocks.
      heads: of the attention; they divide ``width``.
      patch: side of a patch in pixels.
      drop_path: share of the residual branches that training drops in the last block; it rises linearly
        from none in the first.
      dtype: of the computation; parameters are float32.
    """

    num_classes: int
    width: int
    depth: int
    heads: int
    patch: int
    drop_path: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images ``f32[b, h, w, c]`` to logits ``f32[b, num_classes]``.

        The size of the images is fixed by the first call: there is a learned vector for each position. With
        ``train``, ``drop_path`` needs random numbers called ``"dropout"``.

        Raises:
          ValueError: if the patches do not fill the images.
        """
        x = embed_patches(x, self.width, self.patch, self.dtype)
        cls_token = self.param("cls_token", normal, (1, 1, self.width)).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(cls_token, (x.shape[0], 1, self.width)), x], axis=1)
        x = x + self.param("pos_embed", normal, (1, *x.shape[1:])).astype(x.dtype)
        for i in range(self.depth):
            x = Block(
                heads=self.heads,
                drop_path=self.drop_path * i / max(self.depth - 1, 1),
                dtype=self.dtype,
                name=f"block{i + 1}",
            )(x, train)
        x = layer_norm(self.dtype, "norm")(x)[:, 0]
        x = nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=normal, name="head")(x)
        return x.astype(jnp.float32)


def layer_norm(dtype: DTypeLike, name: str) -> nn.LayerNorm:
    """Layer normalisation with the epsilon of vision transformers."""
    return nn.LayerNorm(epsilon=1e-6, dtype=dtype, use_fast_variance=False, name=name)


def _constructor(*, own_width: int, own_heads: int) -> Callable[..., VisionTransformer]:
    def deit(
        *,
        num_classes: int,
        width: int = 0,
        depth: int = 0,
        heads: int = 0,
        patch: int = 0,
        drop_path: float = 0.0,
        dtype: DTypeLike = "float32",
        norm_axis_name: str | None = None,
    ) -> VisionTransformer:
        """Builds the network; the options are those of :class:`VisionTransformer`.

        Args:
          num_classes: length of the logits.
          width: features of a token; ``0`` is the network's own.
          depth: number of blocks; ``0`` is the network's own, 12.
          heads: of the attention; ``0`` is the network's own.
          patch: side of a patch in pixels; ``0`` is the network's own, 16.
          drop_path: share of the residual branches that training drops in the last block.
          dtype: of the computation, e.g. ``"bfloat16"``.
          norm_axis_name: ignored, for there is no batch normalisation.

        Raises:
          ValueError: if a size is not positive, or ``heads`` does not divide ``width``, or ``drop_path`` is
            not in [0, 1), or ``dtype`` is not floating-point.
        """
        del norm_axis_name
        width, heads = width or own_width, heads or own_heads
        depth, patch = depth or 12, patch or 16
        check_positive(num_classes=num_classes, width=width, depth=depth, heads=heads, patch=patch)
        check_rate(drop_path=drop_path)
        if width % heads:
            raise ValueError(f"heads={heads} does not divide width={width}: change one of them")
        return VisionTransformer(
            num_classes=num_classes,
            width=width,
            depth=depth,
            heads=heads,
            patch=patch,
            drop_path=drop_path,
            dtype=floating(dtype),
        )

    return deit


deit_tiny = _constructor(own_width=192, own_heads=3)
deit_small = _constructor(own_width=384, own_heads=6)
deit_base = _constructor(own_width=768, own_heads=12)
