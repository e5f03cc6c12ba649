"""What several experiments have in common: the data sets of images."""

from typing import Any

DIGITS = ("svhn", "digits")  # a mirrored digit is no digit


def use_small_images(config: Any, dataset: str) -> None:
    """Images of 32x32 pixels, which lie on the device: CIFAR-10, CIFAR-100, SVHN, Fashion-MNIST, digits."""
    config.data.name = dataset
    config.data.image_size = 32
    config.data.crop_padding = 4
    config.data.flip = dataset not in DIGITS
    config.data.on_device = True


def use_imagenet(config: Any) -> None:
    """ImageNet at 224x224: random resized crops and flips, read and decoded on the way."""
    config.data.name = "imagenet"
    config.data.image_size = 224
    config.data.crop_padding = 0  # the random resized crop is made when an image is decoded
    config.data.flip = True
    config.data.on_device = False
    config.data.workers = 16
