import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from cuttlefish_jax.models import create_model


def init_shapes(model, size=32):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, 3))))


def test_paths_and_shapes_of_a_basic_network():
    model = create_model("resnet18", num_classes=3, width=4, stage_sizes=(1, 2))
    variables = init_shapes(model)
    norm = {"scale": (4,), "bias": (4,)}
    norm2 = {"scale": (8,), "bias": (8,)}
    assert jax.tree.map(lambda p: p.shape, variables["params"]) == {
        "stem_conv": {"kernel": (3, 3, 3, 4)},
        "stem_norm": norm,
        "stage1": {
            "block1": {
                "conv1": {"kernel": (3, 3, 4, 4)},
                "norm1": norm,
                "conv2": {"kernel": (3, 3, 4, 4)},
                "norm2": norm,
            }
        },
        "stage2": {
            "block1": {
                "conv1": {"kernel": (3, 3, 4, 8)},
                "norm1": norm2,
                "conv2": {"kernel": (3, 3, 8, 8)},
                "norm2": norm2,
                "shortcut_conv": {"kernel": (1, 1, 4, 8)},
                "shortcut_norm": norm2,
            },
            "block2": {
                "conv1": {"kernel": (3, 3, 8, 8)},
                "norm1": norm2,
                "conv2": {"kernel": (3, 3, 8, 8)},
                "norm2": norm2,
            },
        },
        "classifier": {"kernel": (8, 3), "bias": (3,)},
    }
    assert set(variables) == {"params", "batch_stats"}


def test_paths_and_shapes_of_a_wide_bottleneck():
    model = create_model("wide_resnet50_2", num_classes=3, width=4, stage_sizes=(1,), stem="imagenet")
    params = init_shapes(model)["params"]
    shapes = {path: p.shape for path, p in traverse_util.flatten_dict(params, sep="/").items()}
    assert shapes == {
        "stem_conv/kernel": (7, 7, 3, 4),
        "stem_norm/scale": (4,),
        "stem_norm/bias": (4,),
        "stage1/block1/conv1/kernel": (1, 1, 4, 8),
        "stage1/block1/norm1/scale": (8,),
        "stage1/block1/norm1/bias": (8,),
        "stage1/block1/conv2/kernel": (3, 3, 8, 8),
        "stage1/block1/norm2/scale": (8,),
        "stage1/block1/norm2/bias": (8,),
        "stage1/block1/conv3/kernel": (1, 1, 8, 16),
        "stage1/block1/norm3/scale": (16,),
        "stage1/block1/norm3/bias": (16,),
        "stage1/block1/shortcut_conv/kernel": (1, 1, 4, 16),
        "stage1/block1/shortcut_norm/scale": (16,),
        "stage1/block1/shortcut_norm/bias": (16,),
        "classifier/kernel": (16, 3),
        "classifier/bias": (3,),
    }


@pytest.mark.parametrize(("stem", "resolutions"), [("cifar", [32, 32, 16]), ("imagenet", [16, 8, 4])])
def test_resolution_of_stem_and_stages(stem, resolutions):
    model = create_model("resnet18", num_classes=3, width=4, stage_sizes=(1, 1), stem=stem)

    def outputs():
        images = jnp.zeros((2, 32, 32, 3))
        variables = model.init(jax.random.key(0), images)
        return model.apply(variables, images, capture_intermediates=True)[1]["intermediates"]

    seen = jax.eval_shape(outputs)
    layers = [seen["stem_conv"], seen["stage1"], seen["stage2"]]
    assert [layer["__call__"][0].shape[1] for layer in layers] == resolutions


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", jnp.bfloat16])
def test_logits_and_parameters_are_float32_whatever_the_computation(dtype):
    model = create_model("resnet18", num_classes=5, width=4, stage_sizes=(1,), dtype=dtype)
    images = jnp.ones((2, 8, 8, 3))
    variables = model.init(jax.random.key(0), images)
    logits, captured = model.apply(variables, images, capture_intermediates=True)
    assert logits.shape == (2, 5)
    assert logits.dtype == jnp.float32
    assert captured["intermediates"]["stem_conv"]["__call__"][0].dtype == jnp.dtype(dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_strided_convolution_pads_like_torch():
    # torch's padding=1 with stride 2 starts one pixel outside the image; "SAME" would start on it.
    model = create_model("resnet18", num_classes=2, width=1, stage_sizes=(1, 1))
    images = jax.random.normal(jax.random.key(1), (1, 6, 6, 3))
    variables = model.init(jax.random.key(0), images)
    _, captured = model.apply(variables, images, capture_intermediates=True)
    x = np.asarray(captured["intermediates"]["stage1"]["__call__"][0])[0, :, :, 0]
    y = np.asarray(captured["intermediates"]["stage2"]["block1"]["conv1"]["__call__"][0])[0, :, :, 0]
    kernel = np.asarray(variables["params"]["stage2"]["block1"]["conv1"]["kernel"])[:, :, 0, 0]
    padded = np.pad(x, 1)
    expected = [
        [np.sum(padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3] * kernel) for j in range(3)] for i in range(3)
    ]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("stem", "std"), [("cifar", (3 * 9 * 128) ** -0.5), ("imagenet", (2 / (9 * 256)) ** 0.5)]
)
def test_initialization(stem, std):
    model = create_model("resnet18", num_classes=10, width=128, stage_sizes=(1, 1), stem=stem)
    params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    kernel = params["stage2"]["block1"]["conv1"]["kernel"]
    np.testing.assert_allclose(jnp.std(kernel), std, rtol=0.02)
    bound = 256**-0.5
    for leaf in jax.tree.leaves(params["classifier"]):
        assert 0.6 * bound < jnp.max(jnp.abs(leaf)) <= bound


def test_batch_statistics_follow_torch_momentum():
    model = create_model("resnet18", num_classes=2, width=2, stage_sizes=(1,))
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    variables = model.init(jax.random.key(0), images)
    _, updated = model.apply(
        variables, images, train=True, mutable=["batch_stats", "intermediates"], capture_intermediates=True
    )
    mean = updated["intermediates"]["stem_conv"]["__call__"][0].mean((0, 1, 2))
    np.testing.assert_allclose(updated["batch_stats"]["stem_norm"]["mean"], 0.1 * mean, rtol=1e-5, atol=1e-7)


def test_synchronised_batch_norm_sees_the_batches_of_all_devices():
    options = dict(num_classes=2, width=2, stage_sizes=(1,))
    images = jax.random.normal(jax.random.key(1), (2, 2, 8, 8, 3))
    variables = create_model("resnet18", **options).init(jax.random.key(0), images[0])

    def logits(model, x):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])[0]

    whole = logits(create_model("resnet18", **options), images.reshape(4, 8, 8, 3)).reshape(2, 2, 2)
    synchronised = create_model("resnet18", **options, norm_axis_name="batch")
    over_devices = jax.vmap(lambda x: logits(synchronised, x), axis_name="batch")(images)
    apart = jax.vmap(lambda x: logits(create_model("resnet18", **options), x))(images)
    np.testing.assert_allclose(over_devices, whole, atol=1e-5)
    assert jnp.max(jnp.abs(apart - whole)) > 1e-3


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet19", {}, "no model 'resnet19'; did you mean resnet18"),
        ("alexnet", {}, "choose from resnet18, resnet34"),
        ("resnet18", {"widht": 32}, "resnet18 has no option 'widht'; did you mean width"),
        ("resnet18", {"rank": 3}, "resnet18 has no option 'rank'; choose from stem, width, stage_sizes"),
        ("resnet18", {"stem": "mnist"}, "stem is 'mnist'; choose from cifar, imagenet"),
        ("resnet18", {"dtype": "int8"}, "dtype is 'int8'"),
        ("resnet18", {"dtype": "float33"}, "dtype is 'float33'"),
        ("resnet18", {"width": -1}, "sizes must be positive: num_classes=10, width=-1"),
        ("resnet18", {"stage_sizes": (2, 0)}, "sizes must be positive"),
    ],
)
def test_what_does_not_exist_is_named(name, options, message):
    with pytest.raises(ValueError, match=message) as error:
        create_model(name, num_classes=10, **options)
    assert "\n" not in str(error.value)


def test_zero_and_nothing_are_the_networks_own():
    unset = create_model("resnet34", num_classes=10, width=0, stem="", stage_sizes=())
    assert unset == create_model("resnet34", num_classes=10)
    assert unset == create_model("resnet34", num_classes=10, width=64, stem="cifar", stage_sizes=(3, 4, 6, 3))
