"""The invariants, for every model of the NNX zoo; then what is NNX's own.

The layers by themselves, in every context and dtype, are in test_layer_table.py.
"""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nnx_zoo import (
    CASES,
    Block,
    Shared,
    layer_at,
    made,
    once,
    params_of,
    plan_at,
    prepared,
    relative_error,
    shapes,
)

import cuttlefish_jax as cf

BFLOAT16 = jnp.bfloat16
# Compiling takes its time: these have nothing that another case or the table of layers does not have.
LEFT_OUT = {"linear", "conv_1d", "conv_2d", "general", "einsum", "scan", "vmap"}
LEFT_OUT |= {"tokens", "nested_jit", "over_batch", "refused"}
COMPUTED = [name for name in CASES if name not in LEFT_OUT]
# Params in float32, computed with in bfloat16: the table has both in the same dtype.
MIXED = ["attention", "embedding", "scan_remat_last", "trained"]
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5)), jnp.float32)


def best_approximation(model, plan):
    """A copy with every planned kernel replaced by its truncated SVD, in float64."""
    copy = nnx.clone(model)
    for path, rank in plan.ranks.items():
        kernel = plan.kernels[path]
        variable = getattr(layer_at(copy, path), kernel.param)
        p, s, q = np.linalg.svd(np.asarray(kernel.to_matrix(variable[...]), np.float64), full_matrices=False)
        s[..., rank:] = 0
        variable.set_value(kernel.from_matrix(((p * s[..., None, :]) @ q).astype(np.float32)))
    return copy


@functools.cache
def results(name):
    """All that the tests of a case compare, from one compiled function: compiling takes most of the time."""
    model, x, kernels = prepared(name)
    rounded, _, same_kernels = prepared(name, BFLOAT16)
    assert kernels == same_kernels
    full, half = plan_at(kernels), plan_at(kernels, 0.5)
    state, replaced = nnx.state(model), nnx.state(best_approximation(model, half))
    graphdef, rounded_graphdef = nnx.graphdef(model), nnx.graphdef(rounded)
    low_rounded = nnx.eval_shape(lambda: cf.factorize(rounded, full))

    def run(state, replaced):
        low = cf.factorize(nnx.merge(graphdef, state), full)
        low_state = nnx.state(low)
        mixed = {}
        if name in MIXED:
            mixed["bf16"] = (
                nnx.merge(nnx.graphdef(low_rounded), low_state)(x),
                nnx.merge(rounded_graphdef, state)(x),
            )
        return mixed | {
            "merged": cf.merge_params(low, full),
            "f32": (low(x), nnx.merge(graphdef, state)(x)),
            "truncated": (
                cf.factorize(nnx.merge(graphdef, state), half)(x),
                nnx.merge(graphdef, replaced)(x),
            ),
        }

    return once(run, state, replaced)


# --- The invariants -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_kernels_and_what_is_skipped(name):
    case, (model, x, kernels) = CASES[name], prepared(name)
    assert {path: kernel.positions or kernel.lookups for path, kernel in kernels.items()} == case.positions
    assert kernels.skipped.keys() == case.skipped.keys()
    for path, reason in case.skipped.items():
        assert reason in kernels.skipped[path]
    assert kernels.num_params == sum(leaf.size for leaf in jax.tree.leaves(params_of(model)))
    abstract = nnx.eval_shape(lambda: case.model(rngs=nnx.Rngs(0, dropout=1)))
    assert cf.find_kernels(abstract, jax.ShapeDtypeStruct(x.shape, x.dtype), **case.options) == kernels


# bfloat16 has 8 bits; the factors round once more between them, and softmax and norms amplify it.
@pytest.mark.parametrize(
    ("name", "what", "tolerance"),
    [(name, "f32", 1e-5) for name in COMPUTED] + [(name, "bf16", 6e-2) for name in MIXED],
)
def test_full_rank_keeps_the_function(name, what, tolerance):
    actual, expected = results(name)[what]
    assert actual.dtype == expected.dtype
    assert relative_error(actual, expected) < tolerance


@pytest.mark.parametrize("name", COMPUTED)
def test_a_truncated_plan_is_the_model_with_the_best_kernels_of_those_ranks(name):
    actual, expected = results(name)["truncated"]
    assert relative_error(actual, expected) < 1e-4
    assert relative_error(actual, results(name)["f32"][1]) > 1e-3  # something was cut off


@pytest.mark.parametrize("name", COMPUTED)
def test_merging_gives_the_original_back(name):
    model, _, _ = prepared(name)
    merged, params = results(name)["merged"], params_of(model)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, params)
    chex.assert_trees_all_close(merged, params, rtol=1e-5, atol=1e-5)
    nnx.update(nnx.clone(model), merged)  # fits


@pytest.mark.parametrize("name", CASES)
def test_abstract_models_and_params_have_the_tree_of_the_factorized_model(name):
    model, _, kernels = prepared(name)
    plan = plan_at(kernels, 0.34)
    graphdef, state = nnx.split(model)
    low = jax.eval_shape(lambda state: params_of(cf.factorize(nnx.merge(graphdef, state), plan)), state)
    params = jax.eval_shape(lambda params: cf.factorize_params(params, plan), params_of(model))
    abstract = nnx.eval_shape(lambda: CASES[name].model(rngs=nnx.Rngs(0, dropout=1)))
    assert shapes(low) == shapes(params) == shapes(params_of(cf.factorize(abstract, plan)))
    assert sum(leaf.size for leaf in jax.tree.leaves(low)) == plan.num_params


# --- Models -------------------------------------------------------------------------------------------------


def test_shared_layers_stay_shared_and_the_model_is_left_alone():
    model, x, kernels = prepared("shared")
    before = nnx.to_pure_dict(nnx.state(model))
    low = cf.factorize(model, plan_at(kernels, 0.5))
    assert low.shared is low.layers[0]
    assert isinstance(low.shared.u, nnx.Linear) and low.shared.u.kernel.shape == (6, 3)
    assert low.encode(x).shape == (2, 6)
    nnx.update(low, jax.tree.map(jnp.zeros_like, nnx.state(low)))
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model)), before)
    assert type(model.shared) is nnx.Linear


def test_a_method_calls_some_of_the_layers():
    model, x, _ = prepared("shared")
    for method in ("encode", Shared.encode, model.encode):
        kernels = cf.find_kernels(model, x, method=method)
        assert {path: k.positions for path, k in kernels.items()} == {"encode_layer": 1, "layers/0": 1}
        assert kernels.skipped == {"layers/1": "Linear that is not called"}


def test_all_but_the_params_is_kept():
    model, _, kernels = prepared("trained")
    model = nnx.clone(model)
    model.norm.mean[...] += 3
    model.dropout.rngs.count[...] += 5
    low = cf.factorize(model, plan_at(kernels, 0.5))
    for variables in (nnx.BatchStat, nnx.RngState):
        chex.assert_trees_all_equal(*(nnx.to_pure_dict(nnx.state(m, variables)) for m in (low, model)))
    low.train()
    assert not low.dropout.deterministic


class Curious(nnx.Module):
    """Reads the settings of its layer."""

    def __init__(self, rngs):
        self.layer = nnx.Linear(5, 6, use_bias=False, rngs=rngs)

    def __call__(self, x):
        y = self.layer(x)
        return y / self.layer.out_features if self.layer.use_bias or self.layer.bias is None else y


def test_settings_of_a_factorized_layer_can_be_read():
    model = made(Curious)
    kernels = cf.find_kernels(model, X)
    assert list(kernels) == ["layer"]
    low = cf.factorize(model, plan_at(kernels))
    assert relative_error(low(X), model(X)) < 1e-5
    nnx.jit(lambda low: low.layer.out_features)(low)  # what is static there can be hashed
    with pytest.raises(AttributeError, match="a factorized layer has no 'kernel'"):
        _ = low.layer.kernel


def test_decode_caches_work_on():
    attention = made(lambda rngs: nnx.MultiHeadAttention(2, 8, decode=True, rngs=rngs))
    attention.init_cache((2, 5, 8))
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    kernels = cf.find_kernels(attention, x[:, :1])
    low = cf.factorize(attention, plan_at(kernels))

    def run(state, low_state):
        modules = [
            nnx.merge(*parts) for parts in ((nnx.graphdef(attention), state), (nnx.graphdef(low), low_state))
        ]
        outputs = [jnp.stack([module(x[:, t : t + 1]) for t in range(2)]) for module in modules]
        return outputs, modules[1].cache_index[...]

    (expected, actual), index = once(run, nnx.state(attention), nnx.state(low))
    assert relative_error(actual, expected) < 1e-5
    assert index == 2


class Linen(nn.Module):
    """Has the paths of Shared's NNX twin below."""

    def setup(self):
        self.first, self.second = nn.Dense(6), nn.Conv(4, (3,), strides=2)
        self.third = nn.DenseGeneral(3, axis=(-2, -1))

    def __call__(self, x):
        return self.third(nn.relu(self.second(nn.relu(self.first(x)))))


class Twin(nnx.Module):
    """Linen, in NNX."""

    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(5, 6, rngs=rngs), nnx.Conv(6, 4, (3,), strides=2, rngs=rngs)
        self.third = nnx.LinearGeneral((4, 4), 3, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        return self.third(nnx.relu(self.second(nnx.relu(self.first(x)))))


def test_one_plan_serves_linen_and_nnx():
    x, linen, twin = jax.random.normal(jax.random.key(0), (2, 7, 5)), Linen(), made(Twin)
    params = nnx.to_pure_dict(params_of(twin))
    ranks = {"first": 2, "second": 3, "third": 1}
    plans = [cf.FactorizationPlan.from_ranks(cf.find_kernels(model, x), ranks) for model in (linen, twin)]
    plans = [cf.FactorizationPlan.from_json(plan.to_json()) for plan in plans]
    graphdef, state = nnx.split(twin)

    def run(state, params):
        # The plan of each for the other.
        low, low_params = (
            cf.factorize(nnx.merge(graphdef, state), plans[0]),
            cf.factorize_params(params, plans[1]),
        )
        outputs = low(x), cf.factorize(linen, plans[1]).apply({"params": low_params}, x)
        return outputs, (params_of(low), low_params)

    outputs, (of_nnx, of_linen) = once(run, state, params)
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(nnx.to_pure_dict(of_nnx), of_linen, rtol=1e-5, atol=1e-6)


def test_params_of_a_model_its_state_and_as_a_tree():
    model, _, kernels = prepared("sequential")
    plan, state = plan_at(kernels, 0.5), nnx.state(model, nnx.Param)
    expected = np.linalg.svd(np.asarray(model.layers[2].kernel[...], np.float64), compute_uv=False)
    for params in (model, state, nnx.state(model), nnx.as_pure(state)):
        np.testing.assert_allclose(cf.singular_values(params, kernels)["layers/2"], expected, rtol=1e-4)
        stable_rank = np.sum(expected**2) / expected[0] ** 2
        np.testing.assert_allclose(cf.stable_ranks(params, kernels)["layers/2"], stable_rank, rtol=1e-4)
    low = cf.factorize_params(state, plan)
    assert isinstance(low, nnx.State) and isinstance(low["layers"][0]["u"]["kernel"], nnx.Param)
    chex.assert_trees_all_equal(nnx.to_pure_dict(cf.factorize_params(model, plan)), nnx.to_pure_dict(low))
    arrays = cf.factorize_params(nnx.as_pure(state), plan)
    assert isinstance(arrays["layers"][0]["u"]["kernel"], jax.Array)
    chex.assert_trees_all_equal(nnx.to_pure_dict(low), nnx.to_pure_dict(arrays))


# --- Errors -------------------------------------------------------------------------------------------------


def message_of(fn):
    with pytest.raises(ValueError) as error:
        fn()
    message = str(error.value)
    assert "\n" not in message
    return message


def test_errors_say_what_is_wrong_in_a_line():
    model, _, kernels = prepared("sequential")
    plan = plan_at(kernels, 0.5)
    abstract = nnx.eval_shape(lambda: CASES["sequential"].model(rngs=nnx.Rngs(0)))
    low = cf.factorize(abstract, plan)
    expected = "'layers/0/bias' has no value: the model is abstract, initialise it first"
    assert expected in message_of(lambda: cf.stable_ranks(abstract, kernels))
    assert "'layers/0' is factorized already" in message_of(lambda: cf.factorize(low, plan))
    assert "no kernel at 'layers/0'" in message_of(lambda: cf.factorize_params(low, plan))
    assert "'layers/0' is not factorized" in message_of(lambda: cf.merge_params(model, plan))
    other = made(
        lambda rngs: nnx.Sequential(nnx.Linear(5, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 7, rngs=rngs))
    )
    expected = "another model: the kernel at 'layers/2' has shape (8, 7), expected (8, 6)"
    assert expected in message_of(lambda: cf.factorize(other, plan))
    assert "the params of another model" in message_of(lambda: cf.stable_ranks(other, kernels))
    assert "another model: this one has no layer 'layers/0'" in message_of(
        lambda: cf.factorize(made(lambda rngs: Block(rngs=rngs)), plan)
    )
    convs = made(lambda rngs: nnx.Sequential(nnx.Conv(5, 8, 1, rngs=rngs), nnx.relu, nnx.relu))
    expected = "another model: 'layers/0' is a Conv, in the plan a Dense"
    assert expected in message_of(lambda: cf.factorize(convs, plan))


def test_a_refused_layer_that_is_asked_for_by_name():
    _, _, kernels = prepared("refused")
    asked = lambda: cf.make_plan(kernels, rank_rule=cf.RankRatio(0.5), rules=[cf.Rule("tied")])  # noqa: E731
    assert "cannot be factorized: tied: its kernel is also that of 'tied_too'" in message_of(asked)
    spectral = made(lambda rngs: nnx.SpectralNorm(nnx.Linear(4, 4, rngs=rngs), rngs=rngs))
    expected = {"layer_instance": "its kernel is computed by SpectralNorm"}
    assert cf.find_kernels(spectral, jnp.ones((2, 4))).skipped == expected
    masked = nnx.Conv(
        4, 4, (3,), mask=jnp.ones((3, 4, 4)), kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0)
    )
    assert cf.find_kernels(masked, jnp.ones((2, 6, 4))).skipped == {"": "convolution with a mask"}
