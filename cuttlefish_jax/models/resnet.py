"""ResNets v1.5 and wide ResNets, as torchvision and the CIFAR literature have them.

References:
  He et al., Deep Residual Learning for Image Recognition, CVPR 2016.
  Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from cuttlefish_jax.models.layers import KERNEL_INITS, ConvLayers, check_positive, check_stem, floating


class Block(ConvLayers):
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


class Stage(ConvLayers):
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


class ResNet(ConvLayers):
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
        x = self.torch_dense(self.num_classes, fan_in=x.shape[-1], name="classifier")(x)
        return x.astype(jnp.float32)


def _constructor(
    default_sizes: tuple[int, ...], *, bottleneck: bool = False, widening: int = 1
) -> Callable[..., ResNet]:
    def resnet(
        *,
        num_classes: int,
        stem: str = "",
        width: int = 0,
        stage_sizes: Sequence[int] = (),
        dtype: DTypeLike = "float32",
        norm_axis_name: str | None = None,
    ) -> ResNet:
        """Builds the network; the options are those of :class:`ResNet`.

        Args:
          num_classes: length of the logits.
          stem: ``"cifar"`` or ``"imagenet"``; it also chooses the initialization its literature uses.
            ``""`` is the network's own, ``"cifar"``.
          width: channels of the first stage; ``0`` is the network's own, 64.
          stage_sizes: blocks in each stage, of any number of stages; ``()`` is the network's own.
          dtype: of the computation, e.g. ``"bfloat16"``.
          norm_axis_name: axis of a pmap over which batch statistics are averaged.

        Raises:
          ValueError: if ``stem`` is neither, or a size is not positive, or ``dtype`` is not floating-point.
        """
        stem = stem or "cifar"
        width = width or 64
        sizes = tuple(stage_sizes) or default_sizes
        check_stem(stem)
        check_positive(num_classes=num_classes, width=width, stage_sizes=sizes)
        return ResNet(
            num_classes=num_classes,
            stage_sizes=sizes,
            bottleneck=bottleneck,
            widening=widening,
            stem=stem,
            width=width,
            dtype=floating(dtype),
            norm_axis_name=norm_axis_name,
            kernel_init=KERNEL_INITS[stem],
        )

    return resnet


resnet18 = _constructor((2, 2, 2, 2))
resnet34 = _constructor((3, 4, 6, 3))
resnet50 = _constructor((3, 4, 6, 3), bottleneck=True)
resnet101 = _constructor((3, 4, 23, 3), bottleneck=True)
wide_resnet50_2 = _constructor((3, 4, 6, 3), bottleneck=True, widening=2)
