"""ResNets v1.5 and wide ResNets, as torchvision and the CIFAR literature have them.

References:
  He et al., Deep Residual Learning for Image Recognition, CVPR 2016.
  Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike, DTypeLike

# torch's default for convolutions and dense layers: uniform in +-1/sqrt(fan_in).
torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
KERNEL_INITS = {
    "cifar": torch_uniform,
    "imagenet": nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
}


class Layers(nn.Module):
    """Base of the modules below: the settings that all their layers share.

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

    def conv(self, features: int, window: int, stride: int, name: str) -> nn.Conv:
        """A square convolution without bias.

        Padded by ``window // 2`` on both sides as in torch; "SAME" pads otherwise where the stride is 2.
        """
        return nn.Conv(
            features,
            (window, window),
            (stride, stride),
            padding=window // 2,
            use_bias=False,
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


class Block(Layers):
    """A residual block: two 3x3 convolutions, or 1x1, 3x3, 1x1 with a bottleneck.

    Attributes:
      channels: of the inner convolutions, before ``widening``.
      stride: of the first 3x3 convolution and of the shortcut.
      bottleneck: whether the block is one of three convolutions, which returns ``4 * channels``.
      widening: factor on the inner channels of a bottleneck.
    """

    channels: int = 64
    stride: int = 1
    bottleneck: bool = False
    widening: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps ``[b, h, w, c]`` to ``[b, h / stride, w / stride, channels (or 4 * channels)]``."""
        inner, out = self.channels * self.widening, self.channels * 4
        if self.bottleneck:
            convs = [(inner, 1, 1), (inner, 3, self.stride), (out, 1, 1)]
        else:
            convs = [(self.channels, 3, self.stride), (self.channels, 3, 1)]
        y = x
        for i, (features, window, stride) in enumerate(convs, start=1):
            y = self.conv(features, window, stride, name=f"conv{i}")(y)
            y = self.norm(train, name=f"norm{i}")(y)
            if i < len(convs):
                y = nn.relu(y)
        if x.shape != y.shape:
            x = self.conv(y.shape[-1], 1, self.stride, name="shortcut_conv")(x)
            x = self.norm(train, name="shortcut_norm")(x)
        return nn.relu(x + y)


class Stage(Layers):
    """Blocks of one resolution; the first has the stride.

    Attributes:
      num_blocks: how many.
      channels: of each block.
      stride: of the first block.
      bottleneck: passed on to the blocks.
      widening: passed on to the blocks.
    """

    num_blocks: int = 2
    channels: int = 64
    stride: int = 1
    bottleneck: bool = False
    widening: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps ``[b, h, w, c]`` to the last block's output."""
        for i in range(self.num_blocks):
            x = Block(
                **self.shared,
                channels=self.channels,
                stride=self.stride if i == 0 else 1,
                bottleneck=self.bottleneck,
                widening=self.widening,
                name=f"block{i + 1}",
            )(x, train)
        return x


class ResNet(Layers):
    """A residual network. Channels double and the resolution halves from one stage to the next.

    Attributes:
      num_classes: length of the logits.
      stage_sizes: blocks in each stage.
      bottleneck: whether blocks are of three convolutions.
      widening: factor on the inner channels of bottlenecks.
      stem: ``"cifar"`` is 3x3, stride 1; ``"imagenet"`` is 7x7, stride 2, and a max-pool of stride 2.
      width: channels of the stem and of the first stage.
    """

    num_classes: int = 10
    stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
    bottleneck: bool = False
    widening: int = 1
    stem: str = "cifar"
    width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images ``f32[b, h, w, c]`` to logits ``f32[b, num_classes]``.

        With ``train`` the batch's own statistics normalise, and the collection ``batch_stats`` is updated.
        """
        window, stride = (3, 1) if self.stem == "cifar" else (7, 2)
        x = self.conv(self.width, window, stride, name="stem_conv")(x)
        x = nn.relu(self.norm(train, name="stem_norm")(x))
        if self.stem == "imagenet":
            # Flax takes pairs, as it documents; its annotation says only str.
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
        for i, num_blocks in enumerate(self.stage_sizes):
            x = Stage(
                **self.shared,
                num_blocks=num_blocks,
                channels=self.width * 2**i,
                stride=1 if i == 0 else 2,
                bottleneck=self.bottleneck,
                widening=self.widening,
                name=f"stage{i + 1}",
            )(x, train)
        x = x.mean((1, 2))
        x = nn.Dense(
            self.num_classes,
            dtype=self.dtype,
            kernel_init=torch_uniform,
            bias_init=functools.partial(_bias_uniform, fan_in=x.shape[-1]),
            name="classifier",
        )(x)
        return x.astype(jnp.float32)


def _bias_uniform(
    key: ArrayLike, shape: Sequence[int], dtype: DTypeLike = jnp.float32, *, fan_in: int
) -> jax.Array:
    """torch's default for the bias of a dense layer: uniform in +-1/sqrt(fan_in)."""
    bound = fan_in**-0.5
    return jax.random.uniform(key, tuple(shape), dtype, -bound, bound)


def _constructor(
    default_sizes: tuple[int, ...], *, bottleneck: bool = False, widening: int = 1
) -> Callable[..., ResNet]:
    def resnet(
        *,
        num_classes: int,
        stem: str = "cifar",
        width: int = 64,
        stage_sizes: Sequence[int] = (),
        dtype: DTypeLike = "float32",
        norm_axis_name: str | None = None,
    ) -> ResNet:
        """Builds the network; the options are those of :class:`ResNet`.

        Args:
          num_classes: length of the logits.
          stem: ``"cifar"`` or ``"imagenet"``; it also chooses the initialization its literature uses.
          width: channels of the first stage.
          stage_sizes: blocks in each stage, of any number of stages; ``()`` is the network's own.
          dtype: of the computation, e.g. ``"bfloat16"``.
          norm_axis_name: axis of a pmap over which batch statistics are averaged.

        Raises:
          ValueError: if ``stem`` is neither, or a size is not positive, or ``dtype`` is not floating-point.
        """
        if stem not in KERNEL_INITS:
            raise ValueError(f"stem is {stem!r}; choose from {', '.join(KERNEL_INITS)}")
        sizes = tuple(stage_sizes) or default_sizes
        if width < 1 or num_classes < 1 or min(sizes) < 1:
            raise ValueError(
                f"sizes must be positive: num_classes={num_classes}, width={width}, stage_sizes={sizes}"
            )
        return ResNet(
            num_classes=num_classes,
            stage_sizes=sizes,
            bottleneck=bottleneck,
            widening=widening,
            stem=stem,
            width=width,
            dtype=_floating(dtype),
            norm_axis_name=norm_axis_name,
            kernel_init=KERNEL_INITS[stem],
        )

    return resnet


def _floating(dtype: DTypeLike) -> jnp.dtype:
    try:
        resolved = jnp.dtype(dtype)
    except TypeError:
        resolved = None
    if resolved is None or not jnp.issubdtype(resolved, jnp.floating):
        raise ValueError(f"dtype is {dtype!r}; choose a floating-point one, e.g. float32 or bfloat16")
    return resolved


resnet18 = _constructor((2, 2, 2, 2))
resnet34 = _constructor((3, 4, 6, 3))
resnet50 = _constructor((3, 4, 6, 3), bottleneck=True)
resnet101 = _constructor((3, 4, 23, 3), bottleneck=True)
wide_resnet50_2 = _constructor((3, 4, 6, 3), bottleneck=True, widening=2)
