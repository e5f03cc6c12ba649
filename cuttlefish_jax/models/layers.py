"""What the networks share: initializers, layers, and the checks of their options."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import ArrayLike, DTypeLike

# torch's default for convolutions and dense layers: uniform in +-1/sqrt(fan_in).
torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# Of the convolutions, by stem.
KERNEL_INITS = {
    "cifar": torch_uniform,
    "imagenet": nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
}
# Of transformers. Where they say "truncated normal", the cut is a hundred standard deviations away.
normal = nn.initializers.normal(0.02)


def torch_uniform_bias(
    key: ArrayLike, shape: Sequence[int], dtype: DTypeLike = jnp.float32, *, fan_in: int
) -> jax.Array:
    """torch's default for the bias of a dense layer: uniform in +-1/sqrt(fan_in)."""
    bound = fan_in**-0.5
    return jax.random.uniform(key, tuple(shape), dtype, -bound, bound)


class ConvLayers(nn.Module):
    """Base of the convolutional networks' modules: the settings that all their layers share.

    Attributes:
      dtype: of the computation; parameters and batch statistics are float32.
      norm_axis_name: the pmap axis over which batch statistics are averaged; None: on each device alone.
      kernel_init: initializer of the convolutions.
    """

    dtype: DTypeLike = jnp.float32
    norm_axis_name: str | None = None
    kernel_init: Callable[..., jax.Array] = torch_uniform

    @property
    def shared(self) -> dict[str, Any]:
        """The settings, for the construction of a submodule that is one of these, too."""
        return dict(dtype=self.dtype, norm_axis_name=self.norm_axis_name, kernel_init=self.kernel_init)

    def conv(self, features: int, window: int, stride: int, name: str, *, use_bias: bool = False) -> nn.Conv:
        """A square convolution.

        Padded by ``window // 2`` on both sides as in torch; "SAME" pads otherwise where the stride is 2.
        """
        return nn.Conv(
            features,
            (window, window),
            (stride, stride),
            padding=window // 2,
            use_bias=use_bias,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            name=name,
        )

    def norm(self, train: bool, name: str) -> nn.BatchNorm:
        """Batch normalisation; Flax's momentum 0.9 is torch's 0.1."""
        return nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            axis_name=self.norm_axis_name,
            name=name,
        )

    def torch_dense(self, features: int, fan_in: int, name: str) -> nn.Dense:
        """A dense layer on ``fan_in`` inputs with torch's default initialization."""
        return nn.Dense(
            features,
            dtype=self.dtype,
            kernel_init=torch_uniform,
            bias_init=functools.partial(torch_uniform_bias, fan_in=fan_in),
            name=name,
        )


class MLP(nn.Module):
    """A dense layer to four times the width, GELU, and a dense layer back.

    Attributes:
      dtype: of the computation.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[b, t, d]`` to ``[b, t, d]``."""
        width = x.shape[-1]
        x = nn.Dense(4 * width, dtype=self.dtype, kernel_init=normal, name="fc1")(x)
        x = nn.gelu(x, approximate=False)
        return nn.Dense(width, dtype=self.dtype, kernel_init=normal, name="fc2")(x)


def embed_patches(images: jax.Array, width: int, patch: int, dtype: DTypeLike) -> jax.Array:
    """The ``patch x patch`` squares of images as tokens, by a convolution called ``patch_embed``.

    To be called in a compact method, as the layer's constructor would be.

    Args:
      images: ``f32[b, h, w, c]``.
      width: features of a token.
      patch: side of a square in pixels.
      dtype: of the computation.

    Returns:
      ``[b, (h / patch) * (w / patch), width]``, row by row.

    Raises:
      ValueError: if the squares do not fill the images.
    """
    height, breadth = images.shape[1:3]
    if height % patch or breadth % patch:
        raise ValueError(
            f"images of {height}x{breadth} pixels cannot be cut into patches of {patch}x{patch}: "
            "change the image size or patch"
        )
    window = (patch, patch)
    conv = nn.Conv(
        width, window, window, padding="VALID", dtype=dtype, kernel_init=normal, name="patch_embed"
    )
    x = conv(images)
    return x.reshape(x.shape[0], -1, width)


def drop_path(branch: jax.Array, rate: float, train: bool) -> jax.Array:
    """Stochastic depth: in training drops each example's whole branch at ``rate``, and scales the others up.

    To be called in a compact method; the random numbers are those of the collection ``"dropout"``.

    References:
      Huang et al., Deep Networks with Stochastic Depth, ECCV 2016.
    """
    return nn.Dropout(rate, broadcast_dims=(1, 2), deterministic=not train)(branch)


def check_stem(stem: str) -> None:
    """Raises a ValueError for a stem that does not exist."""
    if stem not in KERNEL_INITS:
        raise ValueError(f"stem is {stem!r}; choose from {', '.join(KERNEL_INITS)}")


def check_positive(**sizes: int | tuple[int, ...]) -> None:
    """Raises a ValueError unless all sizes, by their names, are positive."""
    if any(np.min(size) < 1 for size in sizes.values()):
        given = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(f"sizes must be positive: {given}")


def check_rate(**rates: float) -> None:
    """Raises a ValueError unless all rates, by their names, are in [0, 1)."""
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ValueError(f"{name} is {rate}, expected a share in [0, 1)")


def floating(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of that name; raises a ValueError unless it is a floating-point one."""
    try:
        resolved = jnp.dtype(dtype)
    except TypeError:
        resolved = None
    if resolved is None or not jnp.issubdtype(resolved, jnp.floating):
        raise ValueError(f"dtype is {dtype!r}; choose a floating-point one, e.g. float32 or bfloat16")
    return resolved
