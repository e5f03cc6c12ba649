"""Encoded images to crops of one size, with Pillow: decoding, random resized crops, central crops.

Pillow releases the interpreter's lock while it decodes and resizes, so that reader threads run side by side.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator

import numpy as np
from PIL import Image

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
# The formats that ImageNet has. More would let a damaged or forged file reach Pillow's rarer decoders.
FORMATS = ("JPEG", "PNG")
CROP_TRIES = 10


class DecodingError(ValueError):
    """An encoded image that is damaged, or of another format."""


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # OSError, SyntaxError, ValueError, struct.error, ...: Pillow promises nothing
        raise DecodingError(f"an image that cannot be decoded: {error}") from error


def open_image(encoded: bytes) -> Image.Image:
    """Reads the header of an encoded image; the pixels are decoded when they are asked for.

    Raises:
      DecodingError: if it is not a JPEG or PNG.
    """
    with _decoding():
        return Image.open(io.BytesIO(encoded), formats=FORMATS)


def crop_and_resize(
    image: Image.Image,
    box: Box,
    size: int,
    *,
    interpolation: str = "bilinear",
    oversampling: float = 1.0,
) -> Image.Image:
    """Cuts a box out of an image and resizes it to a square, antialiased.

    A JPEG that has not been decoded yet is decoded at 1/2, 1/4 or 1/8 of its size if the box still has the
    pixels: libjpeg then does less work for the same result but for some sharpness.

    Args:
      image: of any colours; grey ones are repeated to three channels, CMYK becomes RGB.
      box: within the image, of its full size.
      size: height and width of the result.
      interpolation: "bilinear" or "bicubic".
      oversampling: how many times more pixels a side of the box must have than ``size`` after a reduced
        decoding.

    Returns:
      An RGB image of ``size`` x ``size``.

    Raises:
      DecodingError: if the image had not been decoded yet, and cannot be.
    """
    width, height = image.size
    left, top, right, bottom = box
    excess = min(right - left, bottom - top) / (size * oversampling)
    scale = next((s for s in (8, 4, 2) if excess >= s), 1)
    # Only JPEGs have a draft mode; the others answer None.
    if scale > 1 and (draft := image.draft(None, (width // scale, height // scale))) is not None:
        across, down = draft[1][2] / width, draft[1][3] / height
        left, top, right, bottom = left * across, top * down, right * across, bottom * down
    with _decoding():
        image.load()
        if image.mode != "RGB":
            image = image.convert("RGB")
    # A draft is rounded up to whole pixels, so the box lies within; resize allows no rounding error, though.
    box = (left, top, min(right, image.width), min(bottom, image.height))
    return image.resize((size, size), INTERPOLATIONS[interpolation], box=box)


def random_crop_box(
    rng: np.random.Generator,
    width: int,
    height: int,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """A box of random area and aspect ratio at a random place ("Inception" cropping).

    Boxes that do not fit are drawn again; after ten of them it is the largest central box of an allowed
    aspect ratio. Distributed as in torchvision's and timm's ``RandomResizedCrop``.

    Args:
      rng: which is advanced.
      width: of the image.
      height: of the image.
      scale: least and greatest area, as a share of the image's.
      ratio: least and greatest width / height; its logarithm is uniform.

    Returns:
      Left, top, right, bottom.

    References:
      Szegedy et al., Going Deeper with Convolutions (CVPR 2015), section 6.
    """
    for _ in range(CROP_TRIES):
        area = rng.uniform(*scale) * width * height
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def central_crop_box(width: int, height: int, size: int, crop_ratio: float) -> Box:
    """The box that is left of an image resized to ``size / crop_ratio`` and cropped to ``size``, unresized.

    Resizing this box to ``size`` x ``size`` is the same as resizing the shorter side of the whole image to
    ``size / crop_ratio`` and cropping its centre, for less work.

    Args:
      width: of the image.
      height: of the image.
      size: height and width of the crop.
      crop_ratio: size of the crop as a share of the resized image's shorter side, in (0, 1].

    Returns:
      Left, top, right, bottom, not whole numbers.

    Example:
      >>> central_crop_box(512, 512, 224, 0.875)
      (32.0, 32.0, 480.0, 480.0)
    """
    shorter = math.floor(size / crop_ratio)
    # The longer side is rounded down, as torchvision's Resize does.
    w = max(shorter, shorter * width // height)
    h = max(shorter, shorter * height // width)
    left, top = round((w - size) / 2), round((h - size) / 2)
    across, down = width / w, height / h
    return left * across, top * down, (left + size) * across, (top + size) * down
