import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cuttlefish_jax.training.config import default_config
from cuttlefish_jax.training.data import make_preprocess
from cuttlefish_jax.training.data.images.preprocess import crop_and_flip

SIZE, PADDING = 8, 2
crop = jax.jit(crop_and_flip, static_argnames=("padding", "flip"))
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)


def make_images(count, seed=0):
    return np.random.default_rng(seed).integers(1, 256, (count, SIZE, SIZE, 3), np.uint8)


def settings(**changes):
    data = default_config().data
    data.update(crop_padding=PADDING, flip=True)
    data.update(changes)
    return data


def crops(image):
    """Every crop of the padded image, mirrored or not: pixels -> (row, column, mirrored)."""
    padded = np.pad(image, [(PADDING, PADDING), (PADDING, PADDING), (0, 0)])
    found = {}
    for row in range(2 * PADDING + 1):
        for column in range(2 * PADDING + 1):
            crop = padded[row : row + SIZE, column : column + SIZE]
            found[crop.tobytes()] = (row, column, False)
            found[crop[:, ::-1].tobytes()] = (row, column, True)
    return found


def test_every_result_is_a_crop_and_all_crops_are_as_likely():
    images = make_images(1)
    result = crop(
        jax.random.key(0), images.repeat(5000, axis=0), jnp.arange(5000), padding=PADDING, flip=True
    )
    possible = crops(images[0])
    counts = dict.fromkeys(possible.values(), 0)
    for image in np.asarray(result):
        counts[possible[image.tobytes()]] += 1
    assert len(counts) == 2 * (2 * PADDING + 1) ** 2
    # 5,000 draws of 50 equally likely crops: 100 each, with a standard deviation of 10.
    assert min(counts.values()) > 55
    assert max(counts.values()) < 145


def test_without_flip_nothing_is_mirrored_and_without_padding_nothing_is_moved():
    images = make_images(64)
    key, index = jax.random.key(0), jnp.arange(64)
    for image, original in zip(
        np.asarray(crop(key, images, index, padding=PADDING, flip=False)), images, strict=True
    ):
        assert not crops(original)[image.tobytes()][2]
    flipped = np.asarray(crop(key, images, index, padding=0, flip=True))
    mirrored = np.array([(a == b[:, ::-1]).all() for a, b in zip(flipped, images, strict=True)])
    unchanged = np.array([(a == b).all() for a, b in zip(flipped, images, strict=True)])
    assert (mirrored ^ unchanged).all()
    assert 15 < mirrored.sum() < 49


def test_augmentation_belongs_to_the_example_not_to_its_place_in_the_batch():
    train_fn, _ = make_preprocess(settings(), MEAN, STD)
    images, index = make_images(16), np.random.default_rng(0).permutation(1000)[:16].astype(np.int32)
    whole = jax.jit(train_fn)(jax.random.key(3), images, index)
    order = np.random.default_rng(1).permutation(16)
    shuffled = jax.jit(train_fn)(jax.random.key(3), images[order], index[order])
    np.testing.assert_array_equal(shuffled, whole[order])
    over_devices = jax.jit(jax.vmap(train_fn, (None, 0, 0)))(
        jax.random.key(3), images.reshape(4, 4, SIZE, SIZE, 3), index.reshape(4, 4)
    )
    np.testing.assert_array_equal(over_devices.reshape(whole.shape), whole)
    assert not np.array_equal(jax.jit(train_fn)(jax.random.key(4), images, index), whole)


def test_normalisation_in_float32():
    train_fn, eval_fn = make_preprocess(settings(crop_padding=0, flip=False), MEAN, STD)
    images = make_images(4)
    expected = (images / 255 - np.array(MEAN)) / np.array(STD)
    for result in (
        eval_fn(jnp.asarray(images)),
        train_fn(jax.random.key(0), jnp.asarray(images), jnp.arange(4)),
    ):
        assert result.dtype == jnp.float32
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_padding_is_black_before_normalisation():
    train_fn, _ = make_preprocess(settings(flip=False), MEAN, STD)
    images = np.full((32, SIZE, SIZE, 3), 255, np.uint8)
    result = np.asarray(jax.jit(train_fn)(jax.random.key(0), jnp.asarray(images), jnp.arange(32)))
    black = -np.array(MEAN) / np.array(STD)
    is_black = np.isclose(result, black, atol=1e-5).all(-1)
    assert is_black.any()
    np.testing.assert_allclose(
        result[~is_black], np.broadcast_to((1 - np.array(MEAN)) / STD, result[~is_black].shape), rtol=1e-5
    )


@pytest.mark.parametrize("flip", [True, False])
def test_preprocessing_without_augmentation_ignores_the_key(flip):
    train_fn, eval_fn = make_preprocess(settings(crop_padding=0, flip=flip), MEAN, STD)
    images = jnp.asarray(make_images(16))
    same = np.array_equal(
        jax.jit(train_fn)(jax.random.key(0), images, jnp.arange(16)), jax.jit(eval_fn)(images)
    )
    assert same == (not flip)
