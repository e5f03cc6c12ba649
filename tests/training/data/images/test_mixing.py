import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_tools import import_or_skip

from cuttlefish_jax.training.data.images.mixing import cutmix_weights, mix, mix_with, random_erasing


def batch(size=6, height=12, width=10, classes=5):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(size, height, width, 3)).astype(np.float32)
    targets = rng.dirichlet(np.ones(classes), size).astype(np.float32)
    return images, targets


def reference(weights, images, targets):
    """In float64, example by example."""
    weights, images, targets = (np.asarray(x, np.float64) for x in (weights, images, targets))
    own, last = weights.mean(), len(images) - 1
    mixed = [
        images[i] * weights[..., None] + images[last - i] * (1 - weights[..., None]) for i in range(last + 1)
    ]
    return np.stack(mixed), np.stack(
        [own * targets[i] + (1 - own) * targets[last - i] for i in range(last + 1)]
    )


def timms_mixup(monkeypatch, weight, use_cutmix, centre, classes, smoothing):
    mixup = import_or_skip("timm.data.mixup")
    mixer = mixup.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=smoothing, num_classes=classes)
    monkeypatch.setattr(mixer, "_params_per_batch", lambda: (weight, use_cutmix))
    monkeypatch.setattr(mixup.np.random, "randint", lambda *_, places=list(centre), **__: places.pop(0))
    return mixer


@pytest.mark.parametrize("size", [6, 5, 1])
def test_pixels_and_targets_are_mixed_with_the_mirrored_batch(size):
    images, targets = batch(size)
    weights = np.random.default_rng(1).uniform(size=(12, 10)).astype(np.float32)
    mixed, soft = mix_with(jnp.asarray(weights), weights.mean(), jnp.asarray(images), jnp.asarray(targets))
    expected = reference(weights, images, targets)
    np.testing.assert_allclose(mixed, expected[0], atol=1e-6)
    np.testing.assert_allclose(soft, expected[1], atol=1e-6)


@pytest.mark.parametrize("use_cutmix", [False, True])
@pytest.mark.parametrize(("weight", "centre"), [(0.3, (5, 4)), (0.7, (0, 9)), (0.0, (11, 0)), (0.98, (6, 6))])
def test_timm_mixes_alike(use_cutmix, weight, centre, monkeypatch):
    torch = import_or_skip("torch")
    images, _ = batch()
    labels, classes, smoothing = np.array([0, 3, 1, 4, 4, 2]), 5, 0.1
    mixer = timms_mixup(monkeypatch, weight, use_cutmix, centre, classes, smoothing)
    theirs, their_targets = mixer(
        torch.from_numpy(images.copy()).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)
    )
    targets = jax.nn.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes
    if use_cutmix:
        weights, share = cutmix_weights(jnp.float32(weight), jnp.array(centre), 12, 10)
    else:
        weights, share = jnp.full((12, 10), weight, jnp.float32), weight
    mixed, soft = mix_with(weights, share, jnp.asarray(images), targets)
    np.testing.assert_allclose(mixed, theirs.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    np.testing.assert_allclose(soft, their_targets.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("centre", "rows", "columns", "share"),
    [((4, 4), slice(2, 6), slice(2, 6), 1 - 16 / 64), ((0, 7), slice(0, 2), slice(5, 8), 1 - 6 / 64)],
)
def test_the_box_of_cutmix_is_cut_off_at_the_border(centre, rows, columns, share):
    weights, real_share = cutmix_weights(jnp.float32(0.75), jnp.array(centre), 8, 8)
    expected = np.ones((8, 8))
    expected[rows, columns] = 0
    np.testing.assert_array_equal(weights, expected)
    assert float(real_share) == share


@functools.cache
def draws():
    """The weights that ``mix`` drew with many keys: a batch of a one and a zero shows them."""
    images = jnp.stack([jnp.ones((24, 16, 1)), jnp.zeros((24, 16, 1))])
    keys = jax.random.split(jax.random.key(0), 2000)
    maps, soft = jax.jit(jax.vmap(lambda key: mix(key, images, jnp.eye(2))))(keys)
    maps = np.asarray(maps[:, 0, :, :, 0], np.float64)
    return maps, np.isin(maps, (0.0, 1.0)).all(axis=(1, 2)), np.asarray(soft, np.float64)


def test_batches_are_switched_between_mixup_and_cutmix():
    maps, is_cutmix, _ = draws()
    assert 0.46 < is_cutmix.mean() < 0.54
    mixup = maps[~is_cutmix]
    assert (mixup == mixup[:, :1, :1]).all()


def test_weights_are_beta_distributed():
    stats = pytest.importorskip("scipy.stats")
    maps, is_cutmix, _ = draws()
    assert stats.kstest(maps[~is_cutmix, 0, 0], stats.beta(0.8, 0.8).cdf).pvalue > 0.01
    # The same boxes from NumPy: the area is uniform, as Beta(1, 1) is, and so is the centre.
    rng = np.random.default_rng(0)
    sides = np.floor(np.array([24, 16]) * np.sqrt(rng.uniform(size=(4000, 1))))
    centres = np.floor(rng.uniform(size=(4000, 2)) * [24, 16])
    low, high = np.maximum(centres - sides // 2, 0), np.minimum(centres + (sides + 1) // 2, [24, 16])
    shares = 1 - (high - low).prod(axis=1) / (24 * 16)
    assert stats.ks_2samp(maps[is_cutmix].mean(axis=(1, 2)), shares).pvalue > 0.01


def test_targets_are_of_the_real_area():
    maps, _, soft = draws()
    np.testing.assert_allclose(soft[:, 0, 0], maps.mean(axis=(1, 2)), atol=1e-6)
    np.testing.assert_allclose(soft.sum(axis=2), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "is_cutmix"),
    [
        (dict(mixup_alpha=0.0), True),
        (dict(cutmix_alpha=0.0), False),
        (dict(switch_prob=1.0), True),
        (dict(switch_prob=0.0), False),
    ],
)
def test_each_of_them_alone(options, is_cutmix):
    images = jnp.stack([jnp.ones((24, 16, 1)), jnp.zeros((24, 16, 1))])
    mixed, _ = mix(jax.random.key(1), images, jnp.eye(2), **options)
    assert np.isin(mixed, (0.0, 1.0)).all() == is_cutmix


def test_without_alphas_nothing_is_mixed():
    images, targets = batch()
    mixed, soft = mix(jax.random.key(0), images, targets, mixup_alpha=0.0, cutmix_alpha=0.0)
    assert mixed is images
    assert soft is targets


def test_every_device_draws_a_weight_of_its_own_from_its_own_key():
    devices = jax.device_count()
    assert devices == 8
    images = jnp.tile(jnp.stack([jnp.ones((4, 4, 1)), jnp.zeros((4, 4, 1))]), (devices, 1, 1, 1, 1))
    targets = jnp.tile(jnp.eye(2), (devices, 1, 1))

    def step(images, targets):
        key = jax.random.fold_in(jax.random.key(0), jax.lax.axis_index("batch"))
        return mix(key, images, targets, cutmix_alpha=0.0)[1]

    soft = jax.pmap(step, axis_name="batch")(images, targets)
    assert len(np.unique(np.asarray(soft[:, 0, 0]))) == devices


def test_images_keep_their_dtype():
    images, targets = batch()
    mixed, soft = mix(jax.random.key(0), jnp.asarray(images, jnp.bfloat16), jnp.asarray(targets))
    assert (mixed.dtype, soft.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mixup_alpha=-1.0), "mixup -1 and cutmix 1 must be at least 0; 0 is without"),
        (dict(cutmix_alpha=-0.5), "mixup 0.8 and cutmix -0.5 must be at least 0; 0 is without"),
        (dict(switch_prob=1.5), "switch_prob 1.5: expected 0 to 1"),
    ],
)
def test_impossible_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        mix(jax.random.key(0), *batch(), **options)


erase = jax.jit(random_erasing, static_argnames=("probability", "area"))


def erased(count, height, width, probability):
    """Where ``random_erasing`` put noise into images of zeros."""
    images = jnp.zeros((count, height, width, 1))
    return np.asarray(erase(jax.random.key(0), images, jnp.arange(count), probability=probability))[..., 0]


def boxes(noise):
    """``int[n, 4]``: top, left, height and width of the noise of each image that has some."""
    found = []
    for mask in (image != 0 for image in noise):
        if mask.any():
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            assert mask.sum() == height * width  # it is a box
            found.append((rows[0], columns[0], height, width))
    return np.array(found)


def test_boxes_are_distributed_as_timms():
    module = import_or_skip("timm.data.random_erasing")
    torch = import_or_skip("torch")
    stats = pytest.importorskip("scipy.stats")
    module.random.seed(0)
    torch.manual_seed(0)
    eraser = module.RandomErasing(1.0, mode="pixel", device="cpu")
    theirs = boxes(eraser(torch.zeros(1500, 1, 40, 30)).numpy()[:, 0])
    ours = boxes(erased(1500, 40, 30, probability=1.0))
    assert len(ours) == len(theirs) == 1500
    for i in range(4):
        assert stats.ks_2samp(ours[:, i], theirs[:, i]).pvalue > 0.01
    assert stats.ks_2samp(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue > 0.01


def test_a_quarter_of_the_images_has_noise_of_unit_variance():
    noise = erased(2000, 32, 32, probability=0.25)
    assert abs(len(boxes(noise)) / 2000 - 0.25) < 0.04
    values = noise[noise != 0]
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.02


def test_an_example_is_erased_alike_wherever_it_stands():
    images = jnp.asarray(batch()[0])
    key, options = jax.random.key(3), dict(probability=0.7)
    together = erase(key, images, jnp.arange(6), **options)
    assert (np.asarray(together) != images).any()
    for i in (4, 0, 5):
        alone = erase(key, images[i : i + 1], jnp.array([i]), **options)
        np.testing.assert_array_equal(alone[0], together[i])


def test_what_is_not_erased_is_left_as_it_is():
    images = jnp.asarray(batch()[0])
    np.testing.assert_array_equal(erase(jax.random.key(0), images, jnp.arange(6), probability=0.0), images)
    # No box of all of the image's area fits into it.
    np.testing.assert_array_equal(
        erase(jax.random.key(0), images, jnp.arange(6), probability=1.0, area=(1.0, 1.0)), images
    )
