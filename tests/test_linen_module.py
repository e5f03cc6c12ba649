"""The ways a factorized Linen model is used: as any other module, in training, and wrongly."""

import functools
import pickle

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linen_modules import Block, Setup, Trained
from linen_zoo import (
    KEY,
    apply,
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
