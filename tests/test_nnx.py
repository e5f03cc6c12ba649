"""The invariants, for every layer and context of the NNX zoo; then what is NNX's own."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nnx_zoo import CASES, Block, Shared, made, once, plan_at, prepared

import cuttlefish_jax as cf

BFLOAT16 = jnp.bfloat16
# Compiling takes its time: these have nothing that another case does not have.
COMPUTED = [name for name in CASES if name not in ("tokens", "vmap", "nested_jit", "over_batch", "refused")]
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5)), jnp.float32)


def relative_error(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.max(np.abs(actual - expected)) / np.max(np.abs(expected))


def shapes(state):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), nnx.to_pure_dict(state))


def params_of(model):
    return nnx.state(model, nnx.Param)


def layer_at(model, path):
    for key in path.split("/") if path else ():
        model = model[int(key)] if key.isdigit() else getattr(model, key)
    return model


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
        return {
            "merged": cf.merge_params(low, full),
            "f32": (low(x), nnx.merge(graphdef, state)(x)),
            "bf16": (
                nnx.merge(nnx.graphdef(low_rounded), low_state)(x),
                nnx.merge(rounded_graphdef, state)(x),
            ),
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
@pytest.mark.parametrize(("what", "tolerance"), [("f32", 1e-5), ("bf16", 6e-2)])
@pytest.mark.parametrize("name", COMPUTED)
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


def test_names_of_axes_for_sharding():
    mesh = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def init(*names):
        return nnx.with_partitioning(nnx.initializers.lecun_normal(), names)

    with jax.set_mesh(mesh):
        model = nnx.Sequential(
            nnx.Linear(8, 8, kernel_init=init("rows", "columns"), rngs=nnx.Rngs(0)),
            nnx.Conv(8, 4, (3,), kernel_init=init(None, "columns", None), rngs=nnx.Rngs(1)),
        )
        plan = plan_at(cf.find_kernels(model, jnp.ones((1, 5, 8))), 0.5)
        low = cf.factorize(model, plan)
    names = {
        path: leaf.get_metadata("out_sharding", None) for path, leaf in nnx.to_flat_state(params_of(low))
    }
    assert names == {
        ("layers", 0, "u", "kernel"): ("rows", None),
        ("layers", 0, "v", "kernel"): (None, "columns"),
        ("layers", 0, "v", "bias"): None,
        ("layers", 1, "u", "kernel"): (None, "columns", None),
        ("layers", 1, "v", "kernel"): (None, None, None),
        ("layers", 1, "v", "bias"): None,
    }
    for path, leaf in nnx.to_flat_state(params_of(low)):
        if names[path]:
            assert leaf.get_value().sharding.spec == jax.sharding.PartitionSpec(*names[path])
    specs = nnx.get_partition_spec(params_of(low))
    assert specs["layers"][0]["v"]["kernel"].get_value() == jax.sharding.PartitionSpec(None, "columns")
    merged = cf.merge_params(low, plan)
    for old, new in zip(*(nnx.to_flat_state(state) for state in (params_of(model), merged)), strict=True):
        assert old[0] == new[0] and old[1].get_metadata() == new[1].get_metadata()


class Scaled(nnx.Module):
    """A layer of somebody's own: the output axis comes first, under another name."""

    def __init__(self, din, dout, *, rngs):
        self.din, self.dout = din, dout
        self.weight = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (dout, din)))

    def __call__(self, x):
        return x @ self.weight[...].T / 2


def test_a_layer_type_of_ones_own():
    model, x = made(lambda rngs: nnx.Sequential(Scaled(5, 8, rngs=rngs), jnp.tanh)), X
    assert cf.find_kernels(model, x).skipped == {"layers/0/weight": "not a kernel, but a parameter of Scaled"}
    layer_type = cf.LayerType(
        param="weight",
        axes=lambda layer: cf.KernelAxes(reduction=(1,), output=(0,)),
        first=lambda layer, rank: dict(dout=rank),
        second=lambda layer, rank: dict(in_features=rank, out_features=layer.dout, use_bias=False),
        second_type=nnx.Linear,
    )
    cf.register_layer(Scaled, layer_type)
    kernels = cf.find_kernels(model, x)
    assert (kernels["layers/0"].m, kernels["layers/0"].n) == (5, 8)
    low = cf.factorize(model, plan_at(kernels))
    assert relative_error(low(x), model(x)) < 1e-5
    assert shapes(params_of(low))["layers"][0]["u"]["weight"][0] == (5, 5)
    with pytest.raises(ValueError, match="Scaled is registered already"):
        cf.register_layer(Scaled, layer_type)


@pytest.mark.parametrize("name", ["trained", "scan", "embedding"])
def test_extra_batch_norms_are_in_the_tree_of_factorize_params(name):
    _, _, kernels = prepared(name)
    plan = plan_at(kernels, 0.34, extra_batch_norm=True)
    abstract = nnx.eval_shape(lambda: CASES[name].model(rngs=nnx.Rngs(0, dropout=1)))
    low = cf.factorize(abstract, plan)
    assert shapes(params_of(low)) == shapes(cf.factorize_params(abstract, plan))
    assert sum(leaf.size for leaf in jax.tree.leaves(params_of(low))) == plan.num_params
    assert layer_at(low, next(iter(plan.ranks))).norm.use_running_average is (name == "trained")  # as it was


def test_extra_batch_norms_train_and_then_keep_still():
    model, x = made(lambda rngs: nnx.Sequential(nnx.Linear(5, 6, rngs=rngs), nnx.tanh)), X
    plan = plan_at(cf.find_kernels(model, x), 0.5, extra_batch_norm=True)
    low = cf.factorize(model, plan)
    norm, hidden = low.layers[0].norm, low.layers[0].u(x)
    trained = low(x)
    np.testing.assert_allclose(norm.mean[...], 0.1 * hidden.mean(0), atol=1e-6)
    low.eval()
    assert not np.allclose(low(x), trained)
    np.testing.assert_allclose(norm.mean[...], 0.1 * hidden.mean(0), atol=1e-6)
    assert "extra batch norms cannot be merged" in message_of(lambda: cf.merge_params(low, plan))


def test_profiling():
    model, x, kernels = prepared("scan")
    profile = cf.profile_kernels(model, x, repeats=1)
    assert list(profile) == list(kernels)
    timings = {timing.path: timing for timing in profile.timings}
    assert {path: timing.calls for path, timing in timings.items()} == {
        path: 3 if "blocks" in path else 1 for path in kernels
    }
    assert timings["blocks/down"].input_shape == (2, 4, 8)
    assert profile["blocks"] > 0


def test_profiling_a_tied_embedding():
    model, x, _ = prepared("embedding")
    profile = cf.profile_kernels(model, x, repeats=1, paths=["embed"], include_embeddings=True)
    assert [(timing.calls, timing.input_shape) for timing in profile.timings] == [(2, (2, 5))]
    assert profile["embed"] > 0


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
