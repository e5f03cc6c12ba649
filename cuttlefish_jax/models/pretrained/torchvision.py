"""torchvision's names of ResNets, wide ResNets and VGG-19 with batch norm."""

from __future__ import annotations

from typing import Any

from cuttlefish_jax.models.pretrained.naming import Naming, Tensor, conv, dense, norm, number

_BUFFERS = ("*.num_batches_tracked",)
# Of a residual block's layers.
_BLOCK = dict(
    conv1="conv1",
    conv2="conv2",
    conv3="conv3",
    norm1="bn1",
    norm2="bn2",
    norm3="bn3",
    shortcut_conv="downsample.0",
    shortcut_norm="downsample.1",
)
# Convolutions in each stage of VGG-19, and the side of the image that its first dense layer sees.
_VGG19 = (2, 2, 4, 4, 4)
_VGG_SIDE = 7


def locate_resnet(path: str) -> Tensor | None:
    """Where torchvision has the parameter or statistic at ``path`` of a ResNet.

    Example:
      >>> locate_resnet("stage2/block1/shortcut_norm/var").names
      ('layer2.0.downsample.1.running_var',)
    """
    match path.split("/"):
        case ["stem_conv", leaf]:
            return conv("conv1", leaf)
        case ["stem_norm", leaf]:
            return norm("bn1", leaf)
        case ["classifier", leaf]:
            return dense("fc", leaf)
        case [stage, block, layer, leaf] if layer in _BLOCK:
            i, j = number(stage, "stage"), number(block, "block")
            if i is not None and j is not None:
                make = conv if "conv" in layer else norm
                return make(f"layer{i}.{j - 1}.{_BLOCK[layer]}", leaf)
    return None


def locate_vgg(path: str) -> Tensor | None:
    """Where torchvision has the parameter or statistic at ``path`` of a VGG-19 with batch norm.

    Example:
      >>> locate_vgg("stage2/conv1/kernel").names
      ('features.7.weight',)
    """
    match path.split("/"):
        case ["classifier1", "kernel"]:
            return Tensor(("classifier.0.weight",), flattened_dense_kernel)
        case ["classifier1", leaf]:
            return dense("classifier.0", leaf)
        case ["classifier2", leaf]:
            return dense("classifier.3", leaf)
        case ["classifier", leaf]:
            return dense("classifier.6", leaf)
        case [stage, layer, leaf]:
            i = number(stage, "stage")
            if i is None:
                return None
            # Convolution, norm and ReLU each have an index, and the max-pool after every stage.
            first = 3 * sum(_VGG19[: i - 1]) + (i - 1)
            for make, kind, offset in ((conv, "conv", 0), (norm, "norm", 1)):
                if (k := number(layer, kind)) is not None:
                    return make(f"features.{first + 3 * (k - 1) + offset}", leaf)
    return None


def flattened_dense_kernel(tensor: Any) -> Any:
    """The kernel after flattening ``[c, h, w]`` in torch, ``[h, w, c]`` here."""
    out = tensor.shape[0]
    by_channel = tensor.reshape(out, -1, _VGG_SIDE, _VGG_SIDE)
    return by_channel.transpose(2, 3, 1, 0).reshape(-1, out)


RESNET = Naming(
    title="torchvision ResNet", signature="layer1.0.conv1.weight", locate=locate_resnet, buffers=_BUFFERS
)
VGG = Naming(
    title="torchvision VGG-19-BN", signature="features.0.weight", locate=locate_vgg, buffers=_BUFFERS
)
