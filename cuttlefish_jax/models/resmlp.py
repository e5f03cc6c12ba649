"""ResMLP: networks of dense layers alone, across patches and across channels by turns.

References:
  Touvron et al., ResMLP: Feedforward networks for image classification with data-efficient training,
    TPAMI 2022.
  Touvron et al., Going deeper with Image Transformers, ICCV 2021, section 2 (LayerScale).
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


class Affine(nn.Module):
    """A scale and a bias for each channel, in the place of a normalisation.

    Attributes:
      dtype: of the computation.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[..., d]`` to ``[..., d]``."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return x * scale.astype(self.dtype) + bias.astype(self.dtype)


class Block(nn.Module):
    """A dense layer across the tokens and an MLP across the channels, in scaled residual branches.

    Attributes:
      layer_scale: initial value of the branches' scales.
      drop_path: share of the residual branches that training drops.
      dtype: of the computation.
    """

    layer_scale: float
    drop_path: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps ``[b, t, d]`` to ``[b, t, d]``."""
        tokens = x.shape[1]
        y = Affine(dtype=self.dtype, name="norm1")(x).swapaxes(1, 2)
        y = nn.Dense(tokens, dtype=self.dtype, kernel_init=normal, name="token_mixing")(y).swapaxes(1, 2)
        x = x + drop_path(self._scaled(y, "scale1"), self.drop_path, train)
        y = Affine(dtype=self.dtype, name="norm2")(x)
        y = MLP(dtype=self.dtype, name="mlp")(y)
        return x + drop_path(self._scaled(y, "scale2"), self.drop_path, train)

    def _scaled(self, y: jax.Array, name: str) -> jax.Array:
        scale = self.param(name, nn.initializers.constant(self.layer_scale), y.shape[-1:])
        return y * scale.astype(self.dtype)


class ResMLP(nn.Module):
    """A residual network of dense layers on patches of an image.

    Attributes:
      num_classes: length of the logits.
      width: features of a token.
      depth: number of blocks.
      patch: side of a patch in pixels.
      drop_path: share of the residual branches that training drops, the same in all blocks.
      dtype: of the computation; parameters are float32.
    """

    num_classes: int
    width: int
    depth: int
    patch: int
    drop_path: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images ``f32[b, h, w, c]`` to logits ``f32[b, num_classes]``.

        The size of the images is fixed by the first call: the layers across tokens depend on it. With
        ``train``, ``drop_path`` needs random numbers called ``"dropout"``.

        Raises:
          ValueError: if the patches do not fill the images.
        """
        x = embed_patches(x, self.width, self.patch, self.dtype)
        for i in range(self.depth):
            x = Block(
                layer_scale=layer_scale(self.depth),
                drop_path=self.drop_path,
                dtype=self.dtype,
                name=f"block{i + 1}",
            )(x, train)
        x = Affine(dtype=self.dtype, name="norm")(x).mean(1)
        x = nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=normal, name="head")(x)
        return x.astype(jnp.float32)


def layer_scale(depth: int) -> float:
    """Initial scale of the residual branches: the deeper the network, the smaller.

    Example:
      >>> [layer_scale(depth) for depth in (12, 24, 36)]
      [0.1, 1e-05, 1e-06]
    """
    return 0.1 if depth <= 18 else 1e-5 if depth <= 24 else 1e-6


def _constructor(own_depth: int) -> Callable[..., ResMLP]:
    def resmlp(
        *,
        num_classes: int,
        width: int = 0,
        depth: int = 0,
        patch: int = 0,
        drop_path: float = 0.0,
        dtype: DTypeLike = "float32",
        norm_axis_name: str | None = None,
    ) -> ResMLP:
        """Builds the network; the options are those of :class:`ResMLP`.

        Args:
          num_classes: length of the logits.
          width: features of a token; ``0`` is the network's own, 384.
          depth: number of blocks; ``0`` is the network's own.
          patch: side of a patch in pixels; ``0`` is the network's own, 16.
          drop_path: share of the residual branches that training drops.
          dtype: of the computation, e.g. ``"bfloat16"``.
          norm_axis_name: ignored, for there is no batch normalisation.

        Raises:
          ValueError: if a size is not positive, or ``drop_path`` is not in [0, 1), or ``dtype`` is not
            floating-point.
        """
        del norm_axis_name
        width, depth, patch = width or 384, depth or own_depth, patch or 16
        check_positive(num_classes=num_classes, width=width, depth=depth, patch=patch)
        check_rate(drop_path=drop_path)
        return ResMLP(
            num_classes=num_classes,
            width=width,
            depth=depth,
            patch=patch,
            drop_path=drop_path,
            dtype=floating(dtype),
        )

    return resmlp


resmlp_s12 = _constructor(12)
resmlp_s24 = _constructor(24)
resmlp_s36 = _constructor(36)
