import numpy as np
import pytest
from PIL import Image, ImageEnhance
from torch_tools import import_or_skip

from cuttlefish_jax.training.data.images.augment import (
    RANDAUGMENT_OPS,
    EvalTransform,
    RandAugment,
    TrainTransform,
    apply_op,
    color_jitter,
)
from cuttlefish_jax.training.data.images.decode import crop_and_resize, random_crop_box

FILL = (124, 116, 104)
# The operations whose strength has a direction.
SIGNED = (
    "Rotate",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
)


def textured(width=64, height=48):
    rng = np.random.default_rng(1)
    coarse = Image.fromarray(rng.integers(30, 200, (5, 6, 3)).astype(np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def pixels(image):
    return np.asarray(image, np.int64)


def timms_name(name):
    increasing = ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")
    return name + ("Increasing" if name in increasing else "Rel" if name.startswith("Translate") else "")


def test_the_operations_are_timms():
    auto_augment = import_or_skip("timm.data.auto_augment")
    assert [timms_name(name) for name in RANDAUGMENT_OPS] == auto_augment._RAND_INCREASING_TRANSFORMS


@pytest.mark.parametrize("name", RANDAUGMENT_OPS)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_an_operation_is_timms_to_the_pixel(name, interpolation, monkeypatch):
    auto_augment = import_or_skip("timm.data.auto_augment")
    image = textured()
    resample = getattr(Image.Resampling, interpolation.upper())
    hparams = dict(img_mean=FILL, interpolation=resample, magnitude_std=0)
    options = dict(interpolation=interpolation, fill=FILL)
    for magnitude in (0, 0.5, 3.3, 5, 8.7, 9, 10):
        theirs = auto_augment.AugmentOp(timms_name(name), prob=1.0, magnitude=magnitude, hparams=hparams)
        for sign in (1, -1):
            monkeypatch.setattr(auto_augment.random, "random", lambda sign=sign: 0.5 - 0.1 * sign)
            ours = apply_op(name, image, sign * magnitude / 10, **options)
            if (
                name == "Posterize" and magnitude == 10
            ):  # no bit is left; newer Pillows refuse, and timm with them
                assert ours.getextrema() == ((0, 0),) * 3
                continue
            np.testing.assert_array_equal(pixels(ours), pixels(theirs(image)))


@pytest.mark.parametrize("name", RANDAUGMENT_OPS)
def test_a_larger_strength_changes_an_image_more(name):
    image = textured()
    changes = [np.abs(pixels(apply_op(name, image, s)) - pixels(image)).mean() for s in (0.1, 0.5, 1.0)]
    if name in ("AutoContrast", "Equalize", "Invert"):  # those that have no strength
        assert changes[0] == changes[1] == changes[2] > 0
    elif name.startswith("Translate"):  # by more than the width of the shades
        assert min(changes) > 0
    else:
        assert changes[0] < changes[1] < changes[2]


@pytest.mark.parametrize("name", RANDAUGMENT_OPS)
def test_the_sign_is_the_direction_of_some(name):
    image = textured()
    ways = [apply_op(name, image, s).tobytes() for s in (0.8, -0.8)]
    assert (ways[0] != ways[1]) == (name in SIGNED)


def test_operations_do_what_they_are_called():
    image = textured()
    x = pixels(image)
    np.testing.assert_array_equal(pixels(apply_op("Invert", image, 0.9)), 255 - x)
    np.testing.assert_array_equal(pixels(apply_op("Posterize", image, 0.5)), x & 0b11000000)
    np.testing.assert_array_equal(pixels(apply_op("Solarize", image, 0.5)), np.where(x < 128, x, 255 - x))
    np.testing.assert_array_equal(pixels(apply_op("SolarizeAdd", image, 0.5)), np.where(x < 128, x + 55, x))
    np.testing.assert_allclose(pixels(apply_op("Brightness", image, 0.2)), np.minimum(x * 1.18, 255), atol=1)
    moved = pixels(apply_op("TranslateX", image, 0.5, fill=(1, 2, 3)))  # 0.225 of 64 pixels: 14.4
    np.testing.assert_array_equal(moved[5, -14:], [(1, 2, 3)] * 14)
    moved = pixels(apply_op("TranslateY", image, -0.5, fill=(1, 2, 3)))  # 10.8
    np.testing.assert_array_equal(moved[:10, 5], [(1, 2, 3)] * 10)


def test_parse_has_timms_defaults():
    auto_augment = import_or_skip("timm.data.auto_augment")
    theirs = auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1")
    ours = RandAugment.parse("m9-mstd0.5-inc1")
    assert (ours.num_ops, len(theirs.ops)) == (theirs.num_layers, len(RANDAUGMENT_OPS))
    for op in theirs.ops:
        assert (op.magnitude, op.magnitude_std, op.prob) == (9, 0.5, 0.5)
        assert (ours.magnitude, ours.magnitude_std, ours.probability) == (9, 0.5, 0.5)


def test_parse_reads_every_key():
    expected = RandAugment(magnitude=7.5, magnitude_std=1.0, num_ops=3, probability=0.75)
    assert RandAugment.parse("n3-inc1-m7.5-p0.75-mstd1") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("m9-mstd0.5", r"only increasing operations are there: add '-inc1'"),
        ("m9-mstd0.5-inc0", r"no randaugment 'm9-mstd0.5-inc0' \('inc0'\); write e.g. 'm9-mstd0.5-inc1'"),
        ("rand-m9-inc1", r"\('rand'\); write e.g."),
        ("m-inc1", r"\('m'\); write e.g."),
        ("n1.5-inc1", r"\('n1.5'\); write e.g."),
        ("m11-inc1", "randaugment magnitude 11 with mstd 0.5: expected m0 to m10"),
        ("m9-p2-inc1", "randaugment probability 2: expected p0 to p1"),
    ],
)
def test_what_cannot_be_parsed_is_a_one_line_error(text, message):
    with pytest.raises(ValueError, match=message) as error:
        RandAugment.parse(text)
    assert "\n" not in str(error.value)


def test_randaugment_draws_operations_magnitudes_and_signs_as_it_should(monkeypatch):
    calls = []

    def record(name, image, strength, **options):
        assert options == dict(interpolation="bicubic", fill=FILL)
        calls.append((name, strength))
        return image

    monkeypatch.setattr("cuttlefish_jax.training.data.images.augment.apply_op", record)
    rng, augment = np.random.default_rng(0), RandAugment.parse("m9-mstd0.5-inc1")
    image = Image.new("RGB", (4, 4))
    for _ in range(6000):
        augment(image, rng, interpolation="bicubic", fill=FILL)
    # 12,000 draws, each applied with probability 1/2: the standard deviation is 55.
    assert abs(len(calls) - 6000) < 220
    names, strengths = zip(*calls, strict=True)
    counts = np.array([names.count(name) for name in RANDAUGMENT_OPS])
    assert abs(counts - 400).max() < 80  # four standard deviations
    magnitudes = 10 * np.abs(strengths)
    assert magnitudes.max() == 10
    # A normal clipped at two standard deviations: 2.3 % lie on the bound, and the rest has this mean.
    assert abs((magnitudes == 10).mean() - 0.0228) < 0.008
    assert abs(np.mean(magnitudes) - (9 - 0.5 * 0.0085)) < 0.03
    assert abs(np.std(magnitudes) - 0.5) < 0.03
    assert abs((np.array(strengths) > 0).mean() - 0.5) < 0.03


def test_color_jitter_is_torchvisions_for_the_same_factors(monkeypatch):
    transforms = import_or_skip("torchvision.transforms")
    theirs = transforms.ColorJitter(0.4, 0.4, 0.4)
    assert (theirs.brightness, theirs.contrast, theirs.saturation) == ((0.6, 1.4),) * 3
    image = textured()
    for seed in range(8):
        ours = color_jitter(image, np.random.default_rng(seed), 0.4)
        rng = np.random.default_rng(seed)
        factors = rng.uniform(0.6, 1.4, size=3)
        drawn = (rng.permutation(3), *factors, None)
        monkeypatch.setattr(transforms.ColorJitter, "get_params", lambda *_, drawn=drawn: drawn)
        np.testing.assert_array_equal(pixels(ours), pixels(theirs(image)))


def test_color_jitter_of_nothing_changes_nothing():
    image = textured()
    assert color_jitter(image, np.random.default_rng(0), 0.0).tobytes() == image.tobytes()


FULL = TrainTransform(
    size=32, interpolation="bicubic", randaugment=RandAugment(), color_jitter=0.4, fill=FILL
)


def test_training_is_a_function_of_the_rng():
    images = [FULL(textured(), np.random.default_rng((0, 3, i))).tobytes() for i in (7, 8, 7)]
    assert images[0] == images[2] != images[1]


@pytest.mark.parametrize("transform", [FULL, EvalTransform(size=32)])
def test_transforms_make_rgb_of_one_size(transform):
    for size in ((64, 48), (20, 90), (7, 5)):
        image = transform(textured(*size), np.random.default_rng(0))
        assert (image.mode, image.size) == ("RGB", (32, 32))


def test_each_part_of_the_training_transform_can_be_left_out():
    image, options = textured(), dict(size=32, fill=FILL)

    def transformed(**others):
        return pixels(TrainTransform(**options, **others)(image, np.random.default_rng(5)))

    rng = np.random.default_rng(5)
    cropped = crop_and_resize(image, random_crop_box(rng, *image.size), 32)
    np.testing.assert_array_equal(transformed(), pixels(cropped))
    augmented = RandAugment()(cropped, rng, fill=FILL)
    np.testing.assert_array_equal(transformed(randaugment=RandAugment()), pixels(augmented))
    both = color_jitter(augmented, rng, 0.4)
    np.testing.assert_array_equal(transformed(randaugment=RandAugment(), color_jitter=0.4), pixels(both))
    assert 0 < np.abs(transformed(interpolation="bicubic") - pixels(cropped)).mean() < 8
    whole = transformed(scale=(1.0, 1.0))
    assert not np.array_equal(whole, pixels(cropped))


def test_evaluation_keeps_the_centre():
    image = Image.new("RGB", (100, 60), (255, 0, 0))
    image.paste((0, 255, 0), (26, 6, 74, 54))  # the middle 48 of 60
    inside = EvalTransform(size=28, crop_ratio=0.7)(image)
    assert inside.getcolors() == [(28 * 28, (0, 255, 0))]
    whole = EvalTransform(size=30, crop_ratio=1.0)(image)
    assert len(whole.getcolors()) > 1
    assert ImageEnhance.Color(whole).enhance(0.0).getpixel((0, 0)) == (76, 76, 76)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: EvalTransform(size=8, interpolation="cubic"),
            "no interpolation 'cubic'; choose from bilinear, b",
        ),
        (
            lambda: TrainTransform(size=8, interpolation=""),
            "no interpolation ''; choose from bilinear, bicubic",
        ),
        (
            lambda: EvalTransform(size=8, crop_ratio=1.5),
            "crop_ratio 1.5: expected more than 0, and at most 1",
        ),
        (lambda: EvalTransform(size=8, crop_ratio=0.0), "crop_ratio 0: expected more than 0, and at most 1"),
        (lambda: TrainTransform(size=8, color_jitter=-1.0), "color_jitter -1: expected at least 0"),
    ],
)
def test_impossible_options_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
