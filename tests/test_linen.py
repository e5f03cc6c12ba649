"""The two invariants, for every layer and context of the zoo; then the ways a factorized model is used."""

import functools
import pickle

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linen_modules import Block, Setup, Trained
from linen_zoo import CASES, best_approximation, once, plan_at, prepared, relative_error

import cuttlefish_jax as cf
from cuttlefish_jax.kernels import subtree

KEY = jax.random.key(0)
BFLOAT16 = jnp.bfloat16


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def apply(model, variables, *args, **kwargs):
    return once(lambda variables: model.apply(variables, *args, **kwargs), variables)


def init(model, *args, **kwargs):
    return once(lambda key: model.init(key, *args, **kwargs), KEY)


def made_by_init(model, *args, **kwargs):
    return jax.eval_shape(lambda: model.init(KEY, *args, **kwargs))


@functools.cache
def results(name):
    """All that the tests of a case compare, from one compiled function: compiling takes most of the time."""
    kwargs = CASES[name].kwargs
    model, inputs, variables, kernels = prepared(name)
    rounded, _, same_variables, same_kernels = prepared(name, BFLOAT16)
    chex.assert_trees_all_equal(variables, same_variables)
    assert kernels == same_kernels
    full, half = plan_at(kernels), plan_at(kernels, 0.5)
    replaced = best_approximation(variables["params"], half)

    def run(variables, replaced):
        params, truncated = (cf.factorize_params(variables["params"], plan) for plan in (full, half))

        def low(model, plan, params):
            return expected(cf.factorize(model, plan), params)

        def expected(model, params):
            return model.apply({**variables, "params": params}, *inputs, **kwargs)

        return {
            "f32": (low(model, full, params), expected(model, variables["params"])),
            "bf16": (low(rounded, full, params), expected(rounded, variables["params"])),
            "truncated": (low(model, half, truncated), expected(model, replaced)),
            "merged": (cf.merge_params(params, full), variables["params"]),
        }

    return once(run, variables, replaced)


# --- The invariants -----------------------------------------------------------------------------------------


# bfloat16 has 8 bits; the factors round once more between them, and softmax and norms amplify it.
@pytest.mark.parametrize(("what", "tolerance"), [("f32", 1e-5), ("bf16", 6e-2)])
@pytest.mark.parametrize("name", CASES)
def test_full_rank_keeps_the_function(name, what, tolerance):
    actual, expected = results(name)[what]
    assert actual.dtype == expected.dtype
    assert relative_error(actual, expected) < tolerance


@pytest.mark.parametrize("name", CASES)
def test_a_truncated_plan_is_the_model_with_the_best_kernels_of_those_ranks(name):
    actual, expected = results(name)["truncated"]
    assert relative_error(actual, expected) < 1e-4
    assert relative_error(actual, results(name)["f32"][1]) > 1e-3  # something was cut off


@pytest.mark.parametrize("name", CASES)
def test_merging_gives_the_original_back(name):
    merged, params = results(name)["merged"]
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, params)
    chex.assert_trees_all_close(merged, params, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_init_gives_the_tree_of_factorize_params(name):
    model, inputs, variables, kernels = prepared(name)
    plan = plan_at(kernels, 0.34)
    made = made_by_init(cf.factorize(model, plan), *inputs, **CASES[name].kwargs)
    params = jax.eval_shape(lambda: cf.factorize_params(variables["params"], plan))
    assert shapes(made) == shapes({**variables, "params": params})
    assert sum(leaf.size for leaf in jax.tree.leaves(made["params"])) == plan.num_params


NO_STATISTICS = {"scan_shared", "vmap", "vmap_last", "vmap_scan", "vmap_scan_axes", "over_batch"}
NO_STATISTICS |= {"rnn", "lstm", "gru"}
BATCH_AXES = {"experts", "experts_vmap_last"}


@pytest.mark.parametrize("name", CASES)
def test_extra_batch_norms_are_in_the_tree_of_init(name):
    model, inputs, variables, kernels = prepared(name)
    plan = plan_at(kernels, 0.34, extra_batch_norm=True)
    low = cf.factorize(model, plan)
    if name in NO_STATISTICS:  # the model's nn.scan or nn.vmap drops the collection
        with pytest.raises(flax.errors.ScopeCollectionNotFound, match="batch_stats"):
            made_by_init(low, *inputs)
        return
    if name in BATCH_AXES:
        message = message_of(lambda: made_by_init(low, *inputs))
        assert "general' cannot have an extra batch norm: it has batch axes" in message
        return
    if name == "tied":
        message = message_of(lambda: made_by_init(low, *inputs))
        assert message == "'table' cannot have an extra batch norm: it is also a head (attend)"
        return
    made = made_by_init(low, *inputs, **CASES[name].kwargs)
    params = jax.eval_shape(lambda: cf.factorize_params(variables["params"], plan))
    stats = jax.eval_shape(lambda: cf.factorize_batch_stats(variables.get("batch_stats", {}), plan))
    assert shapes(made) == shapes({**variables, "params": params, "batch_stats": stats})
    assert sum(leaf.size for leaf in jax.tree.leaves(made["params"])) == plan.num_params


def test_fresh_factors_do_not_take_over_an_initializer_of_the_layers_own():
    model = nn.Dense(6, kernel_init=lambda key, shape, dtype: jnp.zeros((8, 6), dtype), param_dtype=BFLOAT16)
    plan = plan_at(cf.find_kernels(model, jnp.ones((2, 8))), 0.5)
    params = init(cf.factorize(model, plan), jnp.ones((2, 8)))["params"]
    assert params["u"]["kernel"].dtype == params["v"]["kernel"].dtype == BFLOAT16
    assert np.all(np.std(np.asarray(params["u"]["kernel"], np.float32), axis=0) > 0.1)
    assert np.all(np.std(np.asarray(params["v"]["kernel"], np.float32), axis=1) > 0.1)


# --- Under transformations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv_2d_valid", "general", "setup_shared", "vmap_last"])
def test_gradients_are_those_of_the_product_by_the_chain_rule(name):
    model, inputs, variables, kernels = prepared(name)
    plan = plan_at(kernels, 0.5)
    low = cf.factorize(model, plan)

    def run(full_params):
        def loss(model, params):
            return jnp.sum(jnp.sin(model.apply({"params": params}, *inputs)))

        params = cf.factorize_params(full_params, plan)
        merged = cf.merge_params(params, plan)
        of_low = jax.value_and_grad(functools.partial(loss, low))(params)
        return params, of_low, jax.value_and_grad(functools.partial(loss, model))(merged)

    params, (low_loss, low_gradient), (loss, gradient) = once(run, variables["params"])
    chex.assert_tree_all_finite(low_gradient)
    assert relative_error(low_loss, loss) < 1e-5
    for path, rank in plan.ranks.items():
        g = np.asarray(plan.kernels[path].to_matrix(subtree(gradient, path).pop("kernel")))
        halves = dict(zip("uv", plan.kernels[path].factors(rank), strict=True))
        factors, actual = subtree(params, path), subtree(low_gradient, path)
        u, v = (np.asarray(half.to_matrix(factors[key]["kernel"])) for key, half in halves.items())
        g_u, g_v = (np.asarray(half.to_matrix(actual[key].pop("kernel"))) for key, half in halves.items())
        assert np.abs(g).max() > 1e-2
        assert relative_error(g_u, g @ v.mT) < 1e-4
        assert relative_error(g_v, u.mT @ g) < 1e-4
        chex.assert_trees_all_close(actual["v"], subtree(gradient, path), rtol=1e-4, atol=1e-5)


MAPPED = [
    "dense", "conv_2d", "general", "transposed", "einsum", "attention",
    "setup_shared", "nested", "remat", "scan", "vmap",
]  # fmt: skip


@pytest.mark.parametrize("name", MAPPED)
def test_pmap_over_eight_devices(name):
    model, (x,), variables, kernels = prepared(name)
    plan = plan_at(kernels, 0.5)
    low = cf.factorize(model, plan)
    params = once(lambda params: cf.factorize_params(params, plan), variables["params"])
    batch = jax.random.normal(KEY, (8, *x.shape))

    def step(params, x):
        gradient = jax.grad(lambda params: jnp.mean(jnp.sin(low.apply({"params": params}, x))))(params)
        return jax.lax.pmean(gradient, "devices"), low.apply({"params": params}, x)

    assert jax.local_device_count() == 8
    mapped = jax.pmap(step, axis_name="devices", in_axes=(None, 0), out_axes=(None, 0))
    gradient, output = jax.device_get(mapped(params, batch))
    one_device = jax.vmap(step, axis_name="devices", in_axes=(None, 0), out_axes=(None, 0))
    chex.assert_trees_all_close((gradient, output), once(one_device, params, batch), rtol=1e-4, atol=1e-5)


def test_traces_of_nn_jit_are_not_mixed_up_with_those_of_other_plans():
    # Without params, which init makes, nothing in the arguments tells the models apart.
    model, x = nn.jit(nn.Dense)(6), jnp.ones((2, 8))
    kernels = cf.find_kernels(model, x)
    plans = {rank: cf.FactorizationPlan.from_ranks(kernels, {"": rank}) for rank in (2, 3)}
    for _ in range(2):
        assert made_by_init(model, x)["params"].keys() == {"kernel", "bias"}
        assert cf.find_kernels(model, x) == kernels
        for rank, plan in plans.items():
            made = made_by_init(cf.factorize(model, plan), x)
            assert made["params"]["u"]["kernel"].shape == (8, rank)


def test_equal_blocks_under_nn_jit_keep_their_own_ranks():
    model, (x,), _, kernels = prepared("jit_repeated")
    plan = cf.FactorizationPlan.from_ranks(kernels, {"first/up": 2, "second/up": 3, "second/down": 1})
    low = cf.factorize(model, plan)
    variables = init(low, x)
    assert variables["params"]["first"]["up"]["u"]["kernel"].shape == (6, 2)
    assert variables["params"]["second"]["up"]["u"]["kernel"].shape == (6, 3)
    merged = {"params": once(lambda params: cf.merge_params(params, plan), variables["params"])}
    expected = apply(model, merged, x)
    assert relative_error(apply(low, variables, x), expected) < 1e-5
    assert relative_error(low.apply(variables, x), expected) < 1e-5  # eagerly, on nn.jit's own traces


# --- As any other module ------------------------------------------------------------------------------------


@functools.cache
def truncated(name):
    """A case's model at half rank: the factorized model, its variables, the full one's equal ones."""
    model, inputs, variables, kernels = prepared(name)
    plan = plan_at(kernels, 0.5)

    def convert(params):
        params = cf.factorize_params(params, plan)
        return params, cf.merge_params(params, plan)

    params, merged = once(convert, variables["params"])
    low_variables, merged_variables = {**variables, "params": params}, {**variables, "params": merged}
    return cf.factorize(model, plan), low_variables, model, merged_variables, inputs


def test_methods_of_the_model():
    low, variables, model, merged, (x,) = truncated("setup_shared")
    expected = apply(model, merged, x, method="encode")
    for method in ("encode", Setup.encode, model.encode, lambda module, x: module.encode(x)):
        assert relative_error(apply(low, variables, x, method=method), expected) < 1e-5
    # It meets some of the layers only: those are made, as the model's own init does.
    assert set(made_by_init(low, x, method="encode")["params"]) == {"encode_layer", "shared"}
    output, made = jax.eval_shape(lambda: low.init_with_output(KEY, x, method=Setup.encode))
    assert output.shape == (2, 6) and set(made["params"]) == {"encode_layer", "shared"}


def test_bound_and_lazily_initialised():
    low, variables, model, merged, (x,) = truncated("setup_shared")
    bound = once(lambda variables: low.bind(variables)(x), variables)
    assert relative_error(bound, apply(model, merged, x)) < 1e-5
    made = jax.eval_shape(lambda: low.lazy_init(KEY, jax.ShapeDtypeStruct(x.shape, x.dtype)))
    assert shapes(made) == shapes(variables)


class Parent(nn.Module):
    """Calls a module twice, the second time on what comes out of the first."""

    child: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="head")(self.child(self.child(x)))


def test_as_a_submodule_called_twice():
    block, x = nn.Sequential([Block(), nn.tanh, nn.Dense(6)]), jnp.arange(12.0).reshape(2, 6)
    plan = plan_at(cf.find_kernels(block, x), 0.5)
    low = Parent(cf.factorize(block, plan))
    variables = init(low, x)
    assert variables["params"]["child"]["layers_2"].keys() == {"u", "v"}
    merged = {"params": variables["params"] | {"child": cf.merge_params(variables["params"]["child"], plan)}}
    assert relative_error(apply(low, variables, x), apply(Parent(block), merged, x)) < 1e-5


def test_in_a_sequential_that_is_factorized_again():
    model, x = nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(4)]), jnp.ones((2, 6))
    plan = plan_at(cf.find_kernels(model, x), 0.5)
    outer = nn.Sequential([cf.factorize(model, plan), nn.Dense(3)])
    variables = init(outer, x)
    full = {"layers_0": cf.merge_params(variables["params"]["layers_0"], plan)}
    expected = apply(nn.Sequential([model, nn.Dense(3)]), {"params": variables["params"] | full}, x)
    assert relative_error(apply(outer, variables, x), expected) < 1e-5

    again = plan_at(cf.find_kernels(outer, x))

    def run(params):
        return cf.factorize(outer, again).apply({"params": cf.factorize_params(params, again)}, x)

    assert relative_error(once(run, variables["params"]), expected) < 1e-4


def test_intermediates_and_tables():
    low, variables, model, merged, (x,) = truncated("setup_shared")
    _, captured = apply(low, variables, x, capture_intermediates=True)
    _, expected = apply(model, merged, x, capture_intermediates=True)
    captured, expected = captured["intermediates"], expected["intermediates"]
    for path in ("encode_layer", "shared", "out"):
        assert set(captured[path]) == {"__call__", "u", "v"}
        chex.assert_trees_all_close(captured[path]["__call__"], expected[path]["__call__"], rtol=1e-5)
    assert len(captured["shared"]["u"]["__call__"]) == 2
    chex.assert_trees_all_close(captured["__call__"], expected["__call__"], rtol=1e-5)
    table = low.tabulate(KEY, x, console_kwargs={"width": 120, "force_terminal": False})
    assert "encode_layer/u" in table
    assert f"Total Parameters: {low.plan.num_params}" in table


def test_it_is_hashable_comparable_and_picklable():
    low, variables, _, _, (x,) = truncated("setup_shared")
    other = cf.factorize(low.model, plan_at(low.plan.kernels))
    same = cf.factorize(low.model, plan_at(low.plan.kernels, 0.5))
    copy = pickle.loads(pickle.dumps(low))
    assert low == same == copy and hash(low) == hash(same) == hash(copy)
    assert low != other
    traced = []

    @functools.partial(jax.jit, static_argnums=0)
    def run(model, variables):
        traced.append(model)
        return model.apply(variables, x)

    np.testing.assert_array_equal(run(low, variables), run(copy, variables))
    assert len(traced) == 1


# --- Training -----------------------------------------------------------------------------------------------


def train(model, variables, x):
    return apply(model, variables, x, True, rngs={"dropout": jax.random.key(7)}, mutable=["batch_stats"])


def test_batch_statistics_and_dropout_are_the_models():
    low, variables, model, merged, (x, _) = truncated("trained")
    output, updates = train(low, variables, x)
    expected, expected_updates = train(model, merged, x)
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(updates, expected_updates, rtol=1e-4, atol=1e-5)
    assert not np.allclose(updates["batch_stats"]["norm"]["mean"], 1.0)  # what the zoo starts from


def test_extra_batch_norms_train_and_then_keep_still():
    model, x = Trained(), jax.random.normal(KEY, (8, 6, 6, 3))
    kernels = cf.find_kernels(model, x, False)
    plan = cf.FactorizationPlan.from_ranks(kernels, {"conv": 2, "conv_1": 3}, extra_batch_norm=True)
    low = cf.factorize(model, plan)
    variables = init(low, x, False)
    _, updates = train(low, variables, x)
    _, inner = apply(low, variables, x, False, capture_intermediates=True)
    hidden = np.asarray(inner["intermediates"]["conv"]["u"]["__call__"][0])
    stats = jax.device_get(updates["batch_stats"])
    np.testing.assert_allclose(stats["conv"]["norm"]["mean"], 0.1 * hidden.mean((0, 1, 2)), atol=1e-5)
    assert relative_error(stats["conv"]["norm"]["var"], 0.9 + 0.1 * hidden.var((0, 1, 2))) < 1e-4
    chex.assert_trees_all_equal(
        variables["batch_stats"], cf.factorize_batch_stats({"norm": variables["batch_stats"]["norm"]}, plan)
    )
    # In evaluation the statistics are constants: examples do not depend on one another.
    trained = {**variables, **updates}
    both = once(lambda v: (low.apply(v, x, False)[:2], low.apply(v, x[:2], False)), trained)
    assert relative_error(*both) < 1e-4


# --- Errors -------------------------------------------------------------------------------------------------


def message_of(fn):
    with pytest.raises(ValueError) as error:
        fn()
    message = str(error.value)
    assert "\n" not in message
    return message


def test_errors_say_what_is_wrong_in_a_line():
    low, variables, _, _, (x,) = truncated("setup_shared")
    dense, (y,), _, kernels = prepared("dense")
    assert "factorized already: make a plan for its .model" in message_of(lambda: cf.factorize(low, low.plan))
    assert "use init, apply or bind" in message_of(lambda: low(x))
    other = cf.factorize(dense, low.plan)
    expected = "the plan was made for another model: params have no 'encode_layer/u'"
    assert expected in message_of(lambda: other.init(KEY, y))
    wider = cf.factorize(nn.Dense(7), plan_at(kernels))
    assert "kernel at 'v' has shape (6, 7), expected (6, 6)" in message_of(lambda: wider.init(KEY, y))
    conv = cf.factorize(nn.Conv(6, (1,)), plan_at(kernels))
    expected = "'' is a Conv, in the plan a Dense: another model's plan"
    assert expected in message_of(lambda: conv.init(KEY, y))
    with pytest.raises(TypeError, match="factorize needs a Flax module, got function"):
        cf.factorize(lambda x: x, low.plan)
    with pytest.raises(AttributeError, match="no attribute 'decode'"):
        low.apply(variables, x, method="decode")
