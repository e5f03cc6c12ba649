"""Augmentation of single images on the host: RandAugment, colour jitter, and what an example goes through.

Every function draws from the ``rng`` that it is given and from nothing else, so that an example is augmented
alike on whichever host, thread or process it is read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from cuttlefish_jax.training.data.images.decode import (
    INTERPOLATIONS,
    central_crop_box,
    crop_and_resize,
    random_crop_box,
)

MAX_MAGNITUDE = 10.0
ENHANCERS: dict[str, Callable[[Image.Image], Any]] = {
    "Color": ImageEnhance.Color,
    "Contrast": ImageEnhance.Contrast,
    "Brightness": ImageEnhance.Brightness,
    "Sharpness": ImageEnhance.Sharpness,
}
RANDAUGMENT_OPS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    *ENHANCERS,
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
)


def apply_op(
    name: str,
    image: Image.Image,
    strength: float,
    *,
    interpolation: str = "bilinear",
    fill: tuple[int, int, int] = (128, 128, 128),
) -> Image.Image:
    """Applies one operation of RandAugment; the larger ``|strength|``, the more of it.

    Args:
      name: one of ``RANDAUGMENT_OPS``.
      image: RGB.
      strength: in [-1, 1], the magnitude over its maximum; at 1 these are a rotation by 30 degrees, a shear
        by 0.3, a translation by 0.45 of the side, an enhancement by the factor 1.9, no bit of a colour
        left, all tones inverted, 110 added to dark tones. The sign is the direction of rotations, shears,
        translations and enhancements; the others ignore it.
      interpolation: of rotations, shears and translations, "bilinear" or "bicubic".
      fill: colour of what comes in from outside the image.

    Returns:
      A new RGB image.
    """
    size = abs(strength)
    if name == "AutoContrast":
        return ImageOps.autocontrast(image)
    if name == "Equalize":
        return ImageOps.equalize(image)
    if name == "Invert":
        return ImageOps.invert(image)
    if name == "Posterize":
        # ImageOps.posterize refuses to keep none of the 8 bits, as the largest strength asks.
        dropped = 4 + int(size * 4)
        return image.point([tone >> dropped << dropped for tone in range(256)] * 3)
    if name == "Solarize":
        return ImageOps.solarize(image, 256 - min(256, int(size * 256)))
    if name == "SolarizeAdd":
        added = int(size * 110)
        table = [min(255, tone + added) if tone < 128 else tone for tone in range(256)]
        return image.point(table * 3)
    if name in ENHANCERS:
        return ENHANCERS[name](image).enhance(max(0.1, 1 + 0.9 * strength))
    resample = INTERPOLATIONS[interpolation]
    if name == "Rotate":
        return image.rotate(30 * strength, resample=resample, fillcolor=fill)
    matrices = {
        "ShearX": (1, 0.3 * strength, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, 0.3 * strength, 1, 0),
        "TranslateX": (1, 0, 0.45 * strength * image.width, 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, 0.45 * strength * image.height),
    }
    affine = Image.Transform.AFFINE
    return image.transform(image.size, affine, matrices[name], resample=resample, fillcolor=fill)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandAugment:
    """Some operations drawn at random, all of about the same magnitude.

    The "increasing" variant of timm: every operation changes an image more, the larger the magnitude.

    Attributes:
      magnitude: mean strength, in [0, 10].
      magnitude_std: standard deviation of the strength, which is clipped to [0, 10].
      num_ops: operations drawn for an image, with replacement.
      probability: with which each one that was drawn is applied.

    References:
      Cubuk et al., RandAugment (NeurIPS 2020), section 3.

    Example:
      >>> RandAugment.parse("m9-mstd0.5-inc1")
      RandAugment(magnitude=9.0, magnitude_std=0.5, num_ops=2, probability=0.5)
    """

    magnitude: float = 9.0
    magnitude_std: float = 0.5
    num_ops: int = 2
    probability: float = 0.5

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if not (0 <= self.magnitude <= MAX_MAGNITUDE and self.magnitude_std >= 0):
            raise ValueError(
                f"randaugment magnitude {self.magnitude:g} with mstd {self.magnitude_std:g}: "
                "expected m0 to m10, and mstd of at least 0"
            )
        if not 0 <= self.probability <= 1:
            raise ValueError(f"randaugment probability {self.probability:g}: expected p0 to p1")

    @classmethod
    def parse(cls, text: str) -> RandAugment:
        """From timm's notation, e.g. ``"m9-mstd0.5-inc1"``: also n (operations) and p (probability).

        Raises:
          ValueError: if there is another key, or not "inc1".
        """
        fields = dict(m="magnitude", mstd="magnitude_std", n="num_ops", p="probability")
        values: dict[str, Any] = {}
        for part in text.split("-"):
            match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
            if part == "inc1":
                values["increasing"] = True
            elif match and match[1] in fields and not (match[1] == "n" and "." in match[2]):
                values[fields[match[1]]] = int(match[2]) if match[1] == "n" else float(match[2])
            else:
                raise ValueError(f"no randaugment {text!r} ({part!r}); write e.g. 'm9-mstd0.5-inc1'")
        if not values.pop("increasing", False):
            raise ValueError(f"no randaugment {text!r}; only increasing operations are there: add '-inc1'")
        return cls(**values)

    def __call__(
        self,
        image: Image.Image,
        rng: np.random.Generator,
        *,
        interpolation: str = "bilinear",
        fill: tuple[int, int, int] = (128, 128, 128),
    ) -> Image.Image:
        """The image after the operations; the arguments are those of :func:`apply_op`."""
        for i in rng.integers(len(RANDAUGMENT_OPS), size=self.num_ops):
            if rng.random() >= self.probability:
                continue
            strength = min(max(rng.normal(self.magnitude, self.magnitude_std) / MAX_MAGNITUDE, 0.0), 1.0)
            if rng.random() < 0.5:
                strength = -strength
            image = apply_op(RANDAUGMENT_OPS[i], image, strength, interpolation=interpolation, fill=fill)
        return image


def color_jitter(image: Image.Image, rng: np.random.Generator, amount: float) -> Image.Image:
    """Changes brightness, contrast and saturation, in random order.

    Args:
      image: RGB.
      rng: which is advanced.
      amount: each is multiplied by a factor that is uniform in [max(0, 1 - amount), 1 + amount].

    Returns:
      A new RGB image.
    """
    factors = rng.uniform(max(0.0, 1 - amount), 1 + amount, size=3)
    for i in rng.permutation(3):
        image = ENHANCERS[("Brightness", "Contrast", "Color")[i]](image).enhance(float(factors[i]))
    return image


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalTransform:
    """The centre of an image: the shorter side is resized to ``size / crop_ratio``, then it is cropped.

    Attributes:
      size: height and width of the result.
      crop_ratio: share of the shorter side that is kept, in (0, 1].
      interpolation: "bilinear" or "bicubic".

    Raises:
      ValueError: if the ratio is out of range, or the interpolation unknown.
    """

    size: int
    crop_ratio: float = 0.875
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        """Checks the options."""
        _check_interpolation(self.interpolation)
        if not 0 < self.crop_ratio <= 1:
            raise ValueError(f"crop_ratio {self.crop_ratio:g}: expected more than 0, and at most 1")

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Image.Image:
        """RGB of ``size`` x ``size``; ``rng`` is not used."""
        box = central_crop_box(*image.size, self.size, self.crop_ratio)
        # Twice the pixels: what is decoded at a reduced size is then hard to tell from the full one.
        return crop_and_resize(image, box, self.size, interpolation=self.interpolation, oversampling=2.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainTransform:
    """A random resized crop, then RandAugment and colour jitter. Mirroring is left to the device.

    Attributes:
      size: height and width of the result.
      scale: area of the crop, least and greatest, as a share of the image's.
      interpolation: "bilinear" or "bicubic".
      randaugment: None is without.
      color_jitter: amount, see :func:`color_jitter`; 0 is without.
      fill: colour of what RandAugment brings in from outside the image: the data set's mean.

    Raises:
      ValueError: if the interpolation is unknown, or the amount negative.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    interpolation: str = "bilinear"
    randaugment: RandAugment | None = None
    color_jitter: float = 0.0
    fill: tuple[int, int, int] = (128, 128, 128)

    def __post_init__(self) -> None:
        """Checks the options."""
        _check_interpolation(self.interpolation)
        if self.color_jitter < 0:
            raise ValueError(f"color_jitter {self.color_jitter:g}: expected at least 0")

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """RGB of ``size`` x ``size``; ``rng`` is advanced."""
        box = random_crop_box(rng, *image.size, scale=self.scale)
        image = crop_and_resize(image, box, self.size, interpolation=self.interpolation)
        if self.randaugment is not None:
            image = self.randaugment(image, rng, interpolation=self.interpolation, fill=self.fill)
        return color_jitter(image, rng, self.color_jitter) if self.color_jitter else image


def _check_interpolation(interpolation: str) -> None:
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"no interpolation {interpolation!r}; choose from {', '.join(INTERPOLATIONS)}")
