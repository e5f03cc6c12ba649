import io

import numpy as np
import pytest
from PIL import Image
from torch_tools import import_or_skip

from cuttlefish_jax.training.data.images.decode import (
    DecodingError,
    central_crop_box,
    crop_and_resize,
    open_image,
    random_crop_box,
)


def textured(width, height, cell=16):
    """An RGB image of smooth shades, about ``cell`` pixels wide, and a little noise."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (height // cell + 2, width // cell + 2, 3)).astype(np.uint8)
    shades = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    noise = rng.normal(0, 4, (height, width, 3))
    return Image.fromarray(np.clip(shades + noise, 0, 255).astype(np.uint8))


def encoded(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "JPEG", "quality": 90, **options})
    return buffer.getvalue()


def difference(a, b):
    return np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))


class TimmsRandom:
    """The module ``random`` as timm uses it, drawing from a NumPy generator."""

    def __init__(self, rng):
        self.uniform = rng.uniform
        self.randint = lambda low, high: int(rng.integers(low, high + 1))


@pytest.mark.parametrize(
    ("width", "height"), [(500, 375), (375, 500), (40, 30), (1000, 100), (100, 1000), (3, 2)]
)
def test_random_crop_is_timms_for_the_same_random_numbers(width, height, monkeypatch):
    transforms = import_or_skip("timm.data.transforms")
    ours, theirs = np.random.default_rng(3), np.random.default_rng(3)
    monkeypatch.setattr(transforms, "random", TimmsRandom(theirs))
    image = Image.new("L", (width, height))
    get_params = transforms.RandomResizedCropAndInterpolation.get_params
    for _ in range(200):
        top, left, h, w = get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
        assert random_crop_box(ours, width, height) == (left, top, left + w, top + h)


def test_random_crop_is_distributed_as_torchvisions():
    torch = import_or_skip("torch")
    transforms = import_or_skip("torchvision.transforms")
    stats = pytest.importorskip("scipy.stats")
    torch.manual_seed(0)
    rng, image = np.random.default_rng(0), Image.new("L", (500, 375))
    get_params = transforms.RandomResizedCrop.get_params
    theirs = np.array([get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)])
    boxes = np.array([random_crop_box(rng, 500, 375) for _ in range(3000)])
    ours = np.stack([boxes[:, 1], boxes[:, 0], boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]], axis=1)
    for i in range(4):
        assert stats.ks_2samp(ours[:, i], theirs[:, i]).pvalue > 0.01
    for derived in (lambda x: x[:, 2] * x[:, 3], lambda x: x[:, 3] / x[:, 2]):
        assert stats.ks_2samp(derived(ours), derived(theirs)).pvalue > 0.01


def test_random_crop_lies_within_the_image_and_has_the_asked_for_area():
    rng = np.random.default_rng(0)
    for _ in range(300):
        left, top, right, bottom = random_crop_box(rng, 64, 48, scale=(0.25, 0.5))
        assert 0 <= left < right <= 64
        assert 0 <= top < bottom <= 48
        assert 0.23 < (right - left) * (bottom - top) / (64 * 48) < 0.53
        assert 0.7 < (right - left) / (bottom - top) < 1.4


def test_the_smallest_image_can_be_cropped():
    rng = np.random.default_rng(0)
    assert {random_crop_box(rng, 1, 1) for _ in range(100)} == {(0, 0, 1, 1)}


def test_a_crop_that_never_fits_is_the_largest_central_one():
    assert random_crop_box(np.random.default_rng(0), 900, 30, scale=(1.0, 1.0)) == (430, 0, 470, 30)
    assert random_crop_box(np.random.default_rng(0), 30, 900, scale=(1.0, 1.0)) == (0, 430, 30, 470)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crop_and_resize_is_torchvisions_but_for_the_border(interpolation):
    functional = import_or_skip("torchvision.transforms.functional")
    image = textured(200, 150)
    ours = crop_and_resize(image, (30, 20, 170, 140), 64, interpolation=interpolation)
    mode = functional.InterpolationMode(interpolation)
    theirs = functional.resized_crop(image, 20, 30, 120, 140, [64, 64], mode)
    off = difference(ours, theirs)
    # A filter at the border sees the pixels that lie just outside the box, instead of none.
    assert off[4:-4, 4:-4].max() <= 1
    assert off.mean() < 0.5


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (301, 257), (100, 80), (224, 224)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_central_crop_is_torchvisions_resize_and_crop(size, interpolation):
    transforms = import_or_skip("torchvision.transforms")
    image = textured(*size)
    mode = transforms.InterpolationMode(interpolation)
    theirs = transforms.CenterCrop(224)(transforms.Resize(256, mode)(image))
    ours = crop_and_resize(image, central_crop_box(*size, 224, 0.875), 224, interpolation=interpolation)
    assert difference(ours, theirs).max() <= 1


@pytest.mark.parametrize(("factor", "expected"), [(1.9, 1), (2.1, 2), (4.2, 4), (8.5, 8), (30, 8)])
def test_a_jpeg_is_decoded_no_larger_than_needed(factor, expected):
    side = round(32 * factor)
    image = textured(side + 40, side + 29, cell=round(4 * factor))
    box = np.array([15, 7, 15 + side, 7 + side])
    opened = open_image(encoded(image, subsampling=0))
    reduced = crop_and_resize(opened, tuple(box), 32)
    assert opened.size == (-(-image.width // expected), -(-image.height // expected))

    def off_by(pixels):
        shift = np.array([pixels, 0, pixels, 0]) * factor
        return difference(reduced, crop_and_resize(image, tuple(box + shift), 32)).mean()

    # The same place to a small part of a pixel.
    assert off_by(0) < 0.5 * min(off_by(0.25), off_by(-0.25))


def test_oversampling_keeps_a_decoded_jpeg_larger():
    opened = open_image(encoded(textured(300, 300)))
    crop_and_resize(opened, (0, 0, 300, 300), 64, oversampling=2.0)
    assert opened.size == (150, 150)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_jpegs_of_all_colours_become_rgb(mode):
    image = textured(80, 60).convert("L").convert(mode)
    result = crop_and_resize(open_image(encoded(image, quality=95)), (0, 0, 60, 60), 30)
    expected = crop_and_resize(textured(80, 60).convert("L"), (0, 0, 60, 60), 30)
    assert result.mode == "RGB"
    assert difference(result, expected).mean() < 4


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "RGB"])
def test_pngs_become_rgb(mode):
    image = Image.new("RGB", (40, 30), (0, 0, 255)).convert(mode)
    result = crop_and_resize(open_image(encoded(image, format="PNG")), (0, 0, 30, 30), 10)
    colour = (29, 29, 29) if mode == "L" else (0, 0, 255)
    assert result.getcolors() == [(100, colour)]


def test_other_formats_are_refused():
    with pytest.raises(DecodingError, match="an image that cannot be decoded: cannot identify image"):
        open_image(encoded(textured(20, 20), format="BMP"))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"format": "PNG"}])
def test_a_truncated_image_is_found_when_it_is_decoded(options):
    data = encoded(textured(200, 200), **options)
    image = open_image(data[: len(data) // 2])
    with pytest.raises(DecodingError, match="an image that cannot be decoded"):
        crop_and_resize(image, (0, 0, 100, 100), 10)


def test_a_scrambled_png_is_found_when_it_is_decoded():
    data = bytearray(encoded(textured(50, 50), format="PNG"))
    data[60:90] = bytes(30)
    with pytest.raises(DecodingError, match="an image that cannot be decoded"):
        crop_and_resize(open_image(bytes(data)), (0, 0, 50, 50), 10)
