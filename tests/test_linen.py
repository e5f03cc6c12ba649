"""The two invariants, for every model of the zoo; then gradients and pmap.

The layers by themselves, in every context and dtype, are in test_layer_table.py.
"""

import functools

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linen_zoo import (
    CASES,
    KEY,
    apply,
    best_approximation,
    init,
    made_by_init,
    message_of,
    once,
    plan_at,
    prepared,
    relative_error,
    shapes,
)

import cuttlefish_jax as cf
from cuttlefish_jax.kernels import subtree

BFLOAT16 = jnp.bfloat16
# The others have nothing that the table of layers does not have, and compiling takes its time.
COMPUTED = [
    name
    for name in CASES
    if name not in ("dense", "conv_1d_causal", "conv_2d", "general", "einsum", "remat", "scan", "vmap")
]
# Params in float32, computed with in bfloat16: the table has both in the same dtype.
MIXED = ["attention", "experts", "scan_remat", "tied", "tokens", "trained"]


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

        mixed = {"bf16": (low(rounded, full, params), expected(rounded, variables["params"]))}
        return (mixed if name in MIXED else {}) | {
            "f32": (low(model, full, params), expected(model, variables["params"])),
            "truncated": (low(model, half, truncated), expected(model, replaced)),
            "merged": (cf.merge_params(params, full), variables["params"]),
        }

    return once(run, variables, replaced)


# --- The invariants -----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", ["conv_2d_valid", "general", "setup_shared", "remat", "vmap_last"])
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


@pytest.mark.parametrize("name", ["setup_shared", "nested", "scan"])
def test_gradients_under_pmap_over_eight_devices(name):
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
