"""VGG-19 with batch normalisation, as the CIFAR literature and torchvision have it.

References:
  Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from cuttlefish_jax.models.layers import KERNEL_INITS, ConvLayers, check_positive, check_stem, floating


class Stage(ConvLayers):
    """Convolutions of one resolution, each with batch normalisation and ReLU.

    Attributes:
      num_convs: how many.
      channels: of each convolution.
      use_bias: whether the convolutions have biases.
    """

    num_convs: int = 2
    channels: int = 64
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps ``[b, h, w, c]`` to ``[b, h, w, channels]``."""
        for i in range(1, self.num_convs + 1):
            x = self.conv(self.channels, 3, 1, name=f"conv{i}", use_bias=self.use_bias)(x)
            x = nn.relu(self.norm(train, name=f"norm{i}")(x))
        return x


class VGG(ConvLayers):
    """A plain convolutional network. The resolution halves from one stage to the next.

    Attributes:
      num_classes: length of the logits.
      stem: ``"cifar"`` averages over what is left of the image, and has one dense layer; ``"imagenet"`` has
        biases, one more max-pool, and three dense layers with dropout on 7x7 positions.
      width: channels of the first stage; they double up to the fourth.
      stage_sizes: convolutions in each stage.
    """

    num_classes: int = 10
    stem: str = "cifar"
    width: int = 64
    stage_sizes: tuple[int, ...] = (2, 2, 4, 4, 4)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images ``f32[b, h, w, c]`` to logits ``f32[b, num_classes]``.

        With ``train`` the batch's own statistics normalise, the collection ``batch_stats`` is updated, and
        the stem ``"imagenet"`` needs random numbers called ``"dropout"``.
        """
        imagenet = self.stem == "imagenet"
        for i, num_convs in enumerate(self.stage_sizes):
            x = Stage(
                **self.shared,
                num_convs=num_convs,
                channels=self.width * min(2**i, 8),
                use_bias=imagenet,
                name=f"stage{i + 1}",
            )(x, train)
            if imagenet or i + 1 < len(self.stage_sizes):
                # A small image may be down to one position: a window of two would leave nothing.
                window = (min(2, x.shape[1]), min(2, x.shape[2]))
                x = nn.max_pool(x, window, window)
        x = self._dense_layers(x, train) if imagenet else self._average(x)
        return x.astype(jnp.float32)

    def _average(self, x: jax.Array) -> jax.Array:
        x = x.mean((1, 2))
        return self.torch_dense(self.num_classes, fan_in=x.shape[-1], name="classifier")(x)

    def _dense_layers(self, x: jax.Array, train: bool) -> jax.Array:
        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, kernel_init=nn.initializers.normal(0.01), name=name)

        x = adaptive_avg_pool(x, 7).reshape(x.shape[0], -1)
        for i in (1, 2):
            x = nn.relu(dense(64 * self.width, f"classifier{i}")(x))
            x = nn.Dropout(0.5, deterministic=not train)(x)
        return dense(self.num_classes, "classifier")(x)


def adaptive_avg_pool(x: jax.Array, size: int) -> jax.Array:
    """torch's adaptive average pooling to ``size x size`` positions, which is exact, not resampling.

    Args:
      x: ``[b, h, w, c]``. Where ``h`` or ``w`` is no multiple of ``size``, the windows overlap.
      size: side of the output.

    Returns:
      ``[b, size, size, c]``.

    Example:
      >>> adaptive_avg_pool(jnp.arange(3.0).reshape(1, 1, 3, 1), 2)[0, 0, :, 0].tolist()
      [0.5, 1.5]
    """
    for axis in (1, 2):
        length = x.shape[axis]
        if length == size:
            continue
        windows = np.zeros((size, length), np.float32)
        for i in range(size):
            start, end = i * length // size, -(-(i + 1) * length // size)
            windows[i, start:end] = 1 / (end - start)
        x = jnp.moveaxis(jnp.tensordot(windows.astype(x.dtype), x, (1, axis)), 0, axis)
    return x


def vgg19(
    *,
    num_classes: int,
    stem: str = "",
    width: int = 0,
    dtype: DTypeLike = "float32",
    norm_axis_name: str | None = None,
) -> VGG:
    """Builds VGG-19 with batch normalisation; the options are those of :class:`VGG`.

    Args:
      num_classes: length of the logits.
      stem: ``"cifar"`` or ``"imagenet"``; it chooses the head, and the initialization its literature uses.
        ``""`` is the network's own, ``"cifar"``.
      width: channels of the first stage; ``0`` is the network's own, 64.
      dtype: of the computation, e.g. ``"bfloat16"``.
      norm_axis_name: axis of a pmap over which batch statistics are averaged.

    Raises:
      ValueError: if ``stem`` is neither, or a size is not positive, or ``dtype`` is not floating-point.
    """
    stem = stem or "cifar"
    width = width or 64
    check_stem(stem)
    check_positive(num_classes=num_classes, width=width)
    return VGG(
        num_classes=num_classes,
        stem=stem,
        width=width,
        dtype=floating(dtype),
        norm_axis_name=norm_axis_name,
        kernel_init=KERNEL_INITS[stem],
    )
