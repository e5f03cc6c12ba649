"""Layer types of one's own; those of the package are tested over the zoo."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linen_modules import StandardizedConv
from linen_zoo import prepared

import cuttlefish_jax as cf
from cuttlefish_jax.layer_types import LAYER_TYPES

KEY = jax.random.key(0)


def test_a_class_has_one_layer_type():
    class Own(nn.Dense):
        """Registered here only."""

    cf.register_layer(Own, cf.LayerType.refused("for this test"))
    assert cf.find_kernels(Own(3), jnp.ones((1, 2))).skipped == {"": "for this test"}
    for layer_class in (Own, nn.Dense):
        with pytest.raises(
            ValueError, match=f"^{layer_class.__name__} is registered already: a class has one"
        ):
            cf.register_layer(layer_class, LAYER_TYPES[nn.Dense])


@pytest.mark.parametrize(("thing", "named"), [(int, "int"), (nn.relu, "<"), (nn.Dense(3), "Dense")])
def test_only_classes_of_modules_are_registered(thing, named):
    with pytest.raises(TypeError) as error:
        cf.register_layer(thing, LAYER_TYPES[nn.Dense])
    assert str(error.value).startswith(f"register_layer needs a class of Flax modules, got {named}")


def test_a_subclass_is_another_type():
    class Doubled(nn.Dense):
        """Twice a dense layer."""

        @nn.compact
        def __call__(self, x):
            return 2 * super().__call__(x)

    for model, shape, base in ((Doubled(6), (2, 8), "Dense"), (StandardizedConv(4, (3,)), (2, 5, 3), "Conv")):
        kernels = cf.find_kernels(model, jnp.ones(shape))
        name = type(model).__name__
        assert kernels.skipped == {"": f"{name} may do more than {base}: cf.register_layer says what it does"}


@pytest.mark.parametrize("name", ["weighted", "projection", "experts", "transposed_kernel"])
def test_real_measurements(name):
    model, inputs, _, kernels = prepared(name)
    assert list(cf.profile_kernels(model, *inputs, repeats=1)) == list(kernels)


def test_tables_are_profiled_on_request():
    model, inputs, _, kernels = prepared("tied")
    assert list(cf.profile_kernels(model, *inputs, repeats=1, include_embeddings=True)) == list(kernels)


@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_a_transposed_convolution_with_circular_padding(transpose_kernel):
    model = nn.ConvTranspose(5, (3,), (2,), padding="CIRCULAR", transpose_kernel=transpose_kernel)
    x = jax.random.normal(KEY, (2, 7, 4))
    variables = model.init(KEY, x)
    kernels = cf.find_kernels(model, x)
    plan = cf.FactorizationPlan.from_ranks(kernels, {"": kernels[""].max_rank})
    params = cf.factorize_params(variables["params"], plan)
    expected = model.apply(variables, x)
    np.testing.assert_allclose(cf.factorize(model, plan).apply({"params": params}, x), expected, atol=1e-5)


def test_an_embedding_is_looked_up_and_attended_in_its_factors():
    model = nn.Embed(7, 6)
    variables = model.init(KEY, jnp.zeros(1, jnp.int32))
    lookup = cf.find_kernels(model, jnp.zeros((2, 5), jnp.int32), include_embeddings=True)[""]
    head = cf.find_kernels(model, jnp.ones((2, 5, 6)), include_embeddings=True, method="attend")[""]
    assert (lookup.positions, lookup.lookups, lookup.flops(), lookup.flops(2)) == (0, 5, 0, 2 * 5 * 2 * 6)
    assert (head.positions, head.lookups, head.flops()) == (5, 0, 2 * 5 * 42)
    assert head.flops(2) == 2 * 5 * 2 * (7 + 6)
    plan = cf.FactorizationPlan.from_ranks(cf.Kernels((lookup,), num_params=42), {"": 2})
    params = cf.factorize_params(variables["params"], plan)
    assert jax.tree.map(jnp.shape, params) == {"u": {"embedding": (7, 2)}, "v": {"kernel": (2, 6)}}
    low, merged = cf.factorize(model, plan), {"params": cf.merge_params(params, plan)}
    query, tokens = jax.random.normal(KEY, (3, 6)), jnp.arange(7)
    for x, method in ((tokens, "__call__"), (query, "attend")):
        actual = low.apply({"params": params}, x, method=method)
        np.testing.assert_allclose(actual, model.apply(merged, x, method=method), rtol=1e-5, atol=1e-5)
    own = nn.Embed(7, 6, promote_dtype=lambda *arrays, **options: arrays)
    skipped = cf.find_kernels(own, tokens, include_embeddings=True).skipped
    assert skipped == {"": "an embedding with a promote_dtype of its own"}


def test_an_unsupported_layer_asked_for_by_name_is_an_error_with_its_reason():
    model = nn.Sequential([nn.Conv(4, (3,), feature_group_count=2), nn.Dense(4), nn.Dense(4)])
    kernels = cf.find_kernels(model, jnp.ones((1, 5, 4)))
    with pytest.raises(ValueError, match=r"only layers that cannot be factorized: layers_0: grouped conv"):
        cf.make_plan(kernels, rank_rule=cf.RankRatio(0.5), rules=[cf.Rule("layers_0", rank=2)])
    with pytest.raises(ValueError, match="layers_0"):
        cf.FactorizationPlan.from_ranks(kernels, {"layers_0": 2})
    with pytest.raises(ValueError, match=r"rank 5 for 'layers_1' exceeds min\(m, n\) = 4"):
        cf.FactorizationPlan.from_ranks(kernels, {"layers_1": 5})
