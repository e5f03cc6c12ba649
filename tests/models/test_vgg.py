import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from network_tools import random_variables, run_once

from cuttlefish_jax.models import create_model
from cuttlefish_jax.models.vgg import adaptive_avg_pool


def init_shapes(model, size=32):
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, 3))))
    return {path: p.shape for path, p in traverse_util.flatten_dict(variables["params"], sep="/").items()}


def channels(width):
    return [width * factor for factor in (1, 1, 2, 2, 4, 4, 4, 4, *[8] * 8)]


NAMES = [(i, j) for i, convs in enumerate((2, 2, 4, 4, 4), start=1) for j in range(1, convs + 1)]


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_paths_and_shapes(stem):
    expected, inputs = {}, 3
    for (i, j), outputs in zip(NAMES, channels(2), strict=True):
        expected[f"stage{i}/conv{j}/kernel"] = (3, 3, inputs, outputs)
        expected[f"stage{i}/norm{j}/scale"] = expected[f"stage{i}/norm{j}/bias"] = (outputs,)
        if stem == "imagenet":
            expected[f"stage{i}/conv{j}/bias"] = (outputs,)
        inputs = outputs
    if stem == "imagenet":
        expected |= {"classifier1/kernel": (7 * 7 * 16, 128), "classifier1/bias": (128,)}
        expected |= {"classifier2/kernel": (128, 128), "classifier2/bias": (128,)}
        inputs = 128
    expected |= {"classifier/kernel": (inputs, 5), "classifier/bias": (5,)}
    assert init_shapes(create_model("vgg19", num_classes=5, width=2, stem=stem)) == expected


@pytest.mark.parametrize(
    ("stem", "size", "sides"),
    [
        ("cifar", 32, [32, 16, 8, 4, 2]),
        ("cifar", 28, [28, 14, 7, 3, 1]),
        ("cifar", 8, [8, 4, 2, 1, 1]),
        ("imagenet", 224, [224, 112, 56, 28, 14]),
    ],
)
def test_resolutions(stem, size, sides):
    model = create_model("vgg19", num_classes=5, width=1, stem=stem)

    def outputs():
        images = jnp.zeros((2, size, size, 3))
        variables = model.init(jax.random.key(0), images)
        return model.apply(variables, images, capture_intermediates=True)

    logits, seen = jax.eval_shape(outputs)
    assert logits.shape == (2, 5)
    assert [seen["intermediates"][f"stage{i}"]["__call__"][0].shape[1] for i in range(1, 6)] == sides


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_small_images_still_decide(stem):
    # A window of two on one position would be an empty image, and the mean over it not a number.
    model = create_model("vgg19", num_classes=5, width=2, stem=stem)
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    logits = run_once(lambda v: model.apply(v, images), random_variables(model, images))
    assert np.all(np.isfinite(logits))
    assert np.any(logits[0] != logits[1])


def test_the_last_stage_of_cifar_is_averaged():
    model = create_model("vgg19", num_classes=5, width=1)
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    variables = random_variables(model, images)
    logits, seen = run_once(lambda v: model.apply(v, images, capture_intermediates=True), variables)
    features = np.asarray(seen["intermediates"]["stage5"]["__call__"][0], np.float64)
    dense = jax.tree.map(lambda p: np.asarray(p, np.float64), variables["params"]["classifier"])
    expected = features.mean((1, 2)) @ dense["kernel"] + dense["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(7, 7), (14, 21), (1, 3), (5, 10), (8, 16)])
def test_adaptive_average_pooling(shape):
    x = np.random.default_rng(0).normal(size=(2, *shape, 3)).astype(np.float32)
    height, width = shape
    # Its definition: from the floor of i h / 7 to the ceiling of (i + 1) h / 7.
    expected = np.zeros((2, 7, 7, 3))
    for i in range(7):
        for j in range(7):
            rows = slice(int(np.floor(i * height / 7)), int(np.ceil((i + 1) * height / 7)))
            columns = slice(int(np.floor(j * width / 7)), int(np.ceil((j + 1) * width / 7)))
            expected[:, i, j] = x[:, rows, columns].astype(np.float64).mean((1, 2))
    np.testing.assert_allclose(adaptive_avg_pool(jnp.asarray(x), 7), expected, atol=1e-6)


def test_dropout_of_the_dense_layers():
    model = create_model("vgg19", num_classes=5, width=1, stem="imagenet")
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    variables = random_variables(model, images)

    def train(key, variables):
        return model.apply(
            variables,
            images,
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=True,
        )[1]["intermediates"]

    seen = run_once(jax.vmap(train, in_axes=(0, None)), jax.random.split(jax.random.key(1)), variables)
    before, after = (np.asarray(seen[name]["__call__"][0]) for name in ("classifier1", "Dropout_0"))
    active = np.maximum(before, 0) > 0
    kept = after != 0
    np.testing.assert_allclose(after[kept], 2 * before[kept], rtol=1e-6)
    assert 0.3 < kept[active].mean() < 0.7
    assert np.any(kept[0] != kept[1])


@pytest.mark.parametrize(
    ("stem", "std"), [("cifar", (3 * 9 * 64) ** -0.5), ("imagenet", (2 / (9 * 64)) ** 0.5)]
)
def test_initialization(stem, std):
    model = create_model("vgg19", num_classes=10, width=8, stem=stem)
    params = run_once(lambda key: model.init(key, jnp.zeros((1, 8, 8, 3))), jax.random.key(0))["params"]
    np.testing.assert_allclose(jnp.std(params["stage5"]["conv2"]["kernel"]), std, rtol=0.02)
    if stem == "imagenet":
        np.testing.assert_allclose(jnp.std(params["classifier2"]["kernel"]), 0.01, rtol=0.02)
        biases = [params["stage5"]["conv2"]["bias"], params["classifier"]["bias"]]
        assert not np.any(np.concatenate(biases))
    else:
        for leaf in jax.tree.leaves(params["classifier"]):
            assert 0.6 * 64**-0.5 < jnp.max(jnp.abs(leaf)) <= 64**-0.5
