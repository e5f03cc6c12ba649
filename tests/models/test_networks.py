"""What holds for every network, at a tiny size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from network_tools import random_variables, run_once

import cuttlefish_jax as cf
from cuttlefish_jax.models import MODELS, create_model


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and the side of its images."""

    name: str
    options: dict
    size: int

    def create(self, **options):
        return create_model(self.name, num_classes=5, **self.options, **options)

    @property
    def images(self):
        return jax.random.normal(jax.random.key(1), (4, self.size, self.size, 3))


CASES = {
    "vgg19-cifar": Case("vgg19", {"width": 2}, 32),
    "vgg19-imagenet": Case("vgg19", {"width": 1, "stem": "imagenet"}, 32),
    "deit": Case("deit_tiny", {"width": 12, "depth": 3, "patch": 4, "drop_path": 0.3}, 16),
    "resmlp": Case("resmlp_s12", {"width": 8, "depth": 3, "patch": 4, "drop_path": 0.3}, 16),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@every_case
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_and_parameters_are_float32_whatever_the_computation(case, dtype):
    model, images = case.create(dtype=dtype), case.images
    variables = random_variables(model, images)
    logits, captured = run_once(
        lambda variables: model.apply(variables, images, capture_intermediates=True), variables
    )
    assert logits.shape == (4, 5)
    assert logits.dtype == jnp.float32
    assert np.all(np.isfinite(logits))
    assert np.ptp(logits, axis=0).min() > 0
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    # Of all layers: a parameter that is not cast would make everything after it float32.
    del captured["intermediates"]["__call__"]
    assert {leaf.dtype for leaf in jax.tree.leaves(captured)} == {jnp.dtype(dtype)}


@every_case
def test_training(case):
    model, images = case.create(), case.images
    variables = random_variables(model, images)

    def step(variables):
        def loss(params):
            logits, updated = model.apply(
                {**variables, "params": params},
                images,
                train=True,
                rngs={"dropout": jax.random.key(2)},
                mutable=["batch_stats"],
            )
            return -jax.nn.log_softmax(logits)[:, 1].sum(), updated.get("batch_stats", {})

        return jax.grad(loss, has_aux=True)(variables["params"])

    grads, updated = run_once(step, variables)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))
    kernels = {path: leaf for path, leaf in flatten_dict(grads, sep="/").items() if path.endswith("kernel")}
    assert not [
        path for path, leaf in kernels.items() if not np.any(leaf)
    ]  # nothing is cut off from the loss
    changed = jax.tree.map(lambda old, new: np.all(old != new), variables.get("batch_stats", {}), updated)
    assert all(jax.tree.leaves(changed))


@every_case
def test_factorization_at_full_rank_leaves_the_output_unchanged(case):
    model, images = case.create(), case.images
    kernels = cf.find_kernels(model, images)
    plan = cf.FactorizationPlan.from_ranks(kernels, {path: k.max_rank for path, k in kernels.items()})
    variables = random_variables(model, images)
    low = {**variables, "params": cf.factorize_params(variables["params"], plan)}
    expected = run_once(lambda v: model.apply(v, images), variables)
    outputs = run_once(lambda v: cf.factorize(model, plan).apply(v, images), low)
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
    made = jax.eval_shape(lambda: cf.factorize(model, plan).init(jax.random.key(0), images))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, low)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vgg19", {"stem": "mnist"}, "stem is 'mnist'; choose from cifar, imagenet"),
        ("vgg19", {"width": -1}, "sizes must be positive: num_classes=10, width=-1"),
        ("vgg19", {"dtype": "int8"}, "dtype is 'int8'"),
        ("vgg19", {"heads": 2}, "vgg19 has no option 'heads'; choose from stem, width"),
        ("vgg91", {}, "no model 'vgg91'; did you mean vgg19"),
        ("deit_tiny", {"width": 32}, "heads=3 does not divide width=32: change one of them"),
        ("deit_tiny", {"depth": -1}, "sizes must be positive: .* depth=-1"),
        ("deit_tiny", {"patch": -4}, "sizes must be positive: .* patch=-4"),
        ("deit_tiny", {"heads": -3}, "sizes must be positive: .* heads=-3"),
        ("deit_tiny", {"drop_path": 1.0}, r"drop_path is 1.0, expected a share in \[0, 1\)"),
        ("deit_tiny", {"dtype": "float33"}, "dtype is 'float33'"),
        ("deit_tiny", {"stem": "cifar"}, "deit_tiny has no option 'stem'; choose from width, depth"),
        ("deit_large", {}, "no model 'deit_large'; did you mean deit"),
        ("resmlp_s12", {"width": -1}, "sizes must be positive: .* width=-1"),
        ("resmlp_s12", {"drop_path": -0.1}, r"drop_path is -0.1, expected a share in \[0, 1\)"),
        ("resmlp_s12", {"dtype": "int32"}, "dtype is 'int32'"),
        ("resmlp_s12", {"heads": 2}, "resmlp_s12 has no option 'heads'; choose from width, depth"),
    ],
)
def test_what_does_not_exist_is_named(name, options, message):
    with pytest.raises(ValueError, match=message) as error:
        create_model(name, num_classes=10, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("bert")])
def test_no_classes(name):
    with pytest.raises(ValueError, match="sizes must be positive: num_classes=0"):
        create_model(name, num_classes=0)


@pytest.mark.parametrize("name", ["deit_tiny", "resmlp_s12"])
def test_images_that_patches_do_not_fill(name):
    model = create_model(name, num_classes=5, width=12, depth=1, patch=5)
    message = "images of 15x16 pixels cannot be cut into patches of 5x5: change the image size or patch"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 15, 16, 3))))


def test_zero_and_nothing_are_the_networks_own():
    assert create_model("vgg19", num_classes=3, width=0, stem="") == create_model("vgg19", num_classes=3)
    unset = create_model("deit_base", num_classes=3, width=0, depth=0, heads=0, patch=0)
    assert unset == create_model("deit_base", num_classes=3, width=768, depth=12, heads=12, patch=16)
    unset = create_model("resmlp_s24", num_classes=3, width=0, depth=0, patch=0)
    assert unset == create_model("resmlp_s24", num_classes=3, width=384, depth=24, patch=16)


def test_models_are_hashable_and_equal_by_options():
    for name in MODELS:
        first, second = (create_model(name, num_classes=10, width=48) for _ in range(2))
        assert first == second
        assert hash(first) == hash(second)
