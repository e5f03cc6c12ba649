"""Sharding metadata of the factors: that of the kernel's axes, the rank unsharded."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import cuttlefish_jax as cf

KEY = jax.random.key(0)


class Network(nn.Module):
    """A convolution, a scanned dense layer, heads and a table: all with the names of their axes."""

    boxed: object = nn.with_partitioning

    @nn.compact
    def __call__(self, x):
        def init(*names):
            return self.boxed(nn.initializers.lecun_normal(), names)

        bias = self.boxed(nn.initializers.zeros_init(), ("model",))
        x = nn.Conv(8, (3,), kernel_init=init(None, "data", "model"), bias_init=bias, name="conv")(x)
        step = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 1},
            split_rngs={"params": True},
            length=2,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = step(nn.Dense(8, kernel_init=init("data", "model"), use_bias=False, name="blocks"), x, None)
        heads = nn.DenseGeneral((2, 4), kernel_init=init("data", "heads", None), use_bias=False, name="heads")
        return nn.Einsum((8, 2, 4), "...hk,dhk->...d", False, kernel_init=init("model", "heads", None))(
            heads(x)
        )


def specs(tree):
    return nn.get_partition_spec(tree)


EXPECTED = {
    "conv": {
        "u": {"kernel": P(None, "data", None)},
        "v": {"kernel": P(None, None, "model"), "bias": P("model")},
    },
    "blocks": {"u": {"kernel": P("data", "layers", None)}, "v": {"kernel": P(None, "layers", "model")}},
    "heads": {"u": {"kernel": P("data", None)}, "v": {"kernel": P(None, "heads", None)}},
    "Einsum_0": {"u": {"kernel": P(None, "heads", None)}, "v": {"kernel": P(None, "model")}},
}


@pytest.mark.parametrize("boxed", [nn.with_partitioning, nn.with_logical_partitioning])
def test_factors_have_the_names_of_the_kernels_axes(boxed):
    model, x = Network(boxed), jnp.ones((2, 5, 8))
    kernels = cf.find_kernels(model, x)
    plan = cf.FactorizationPlan.from_ranks(kernels, dict.fromkeys(kernels, 2))
    full = jax.eval_shape(model.init, KEY, x)["params"]
    made = jax.eval_shape(cf.factorize(model, plan).init, KEY, x)["params"]
    assert specs(made) == EXPECTED
    params = jax.eval_shape(lambda params: cf.factorize_params(params, plan), full)
    assert jax.tree.structure(params) == jax.tree.structure(made)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, made)
    merged = jax.eval_shape(lambda params: cf.merge_params(params, plan), params)
    assert jax.tree.structure(merged) == jax.tree.structure(full)


def test_a_sharded_factorized_step_on_eight_devices():
    mesh = Mesh(np.reshape(jax.devices(), (4, 2)), ("data", "model"))
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("data", "model"))
    model = nn.Sequential([nn.Dense(16, kernel_init=init), nn.relu, nn.Dense(8, kernel_init=init)])
    x = jax.random.normal(KEY, (8, 12))
    kernels = cf.find_kernels(model, x)
    plan = cf.FactorizationPlan.from_ranks(kernels, dict.fromkeys(kernels, 3))
    low, tx = cf.factorize(model, plan), optax.adam(0.1)
    params = cf.factorize_params(model.init(KEY, x)["params"], plan)

    def step(params, opt_state, x):
        loss, gradient = jax.value_and_grad(lambda p: jnp.mean(low.apply({"params": p}, x) ** 2))(params)
        updates, opt_state = tx.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), loss

    expected = jax.jit(step)(params, tx.init(params), x)
    shardings = nn.get_sharding(jax.eval_shape(low.init, KEY, x)["params"], mesh)
    placed = jax.device_put(nn.unbox(params), shardings)
    assert placed["layers_0"]["u"]["kernel"].sharding.spec == P("data", None)
    assert placed["layers_0"]["u"]["kernel"].addressable_shards[0].data.shape == (3, 3)
    assert placed["layers_0"]["v"]["kernel"].addressable_shards[0].data.shape == (3, 8)
    batch = jax.device_put(x, NamedSharding(mesh, P("data")))
    stepped, loss = jax.jit(step)(placed, tx.init(placed), batch)
    np.testing.assert_allclose(loss, expected[1], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), stepped, nn.unbox(expected[0])
    )


def test_the_switch_carries_boxed_states():
    from flax.training.train_state import TrainState

    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("data", "model"))
    model, x, tx = nn.Dense(6, kernel_init=init), jnp.ones((2, 8)), optax.adam(0.1)
    params = model.init(KEY, x)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    state = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, params))
    plan = cf.FactorizationPlan.from_ranks(cf.find_kernels(model, x), {"": 2})
    low = cf.switch(state, plan, tx)
    bare = cf.switch(
        state.replace(params=nn.unbox(state.params), opt_state=nn.unbox(state.opt_state)), plan, tx
    )
    assert jax.tree.structure(low.opt_state) == jax.tree.structure(tx.init(low.params))
    assert low.params["u"]["kernel"].names == ("data", None)
    for a, b in zip(jax.tree.leaves(low.opt_state), jax.tree.leaves(bare.opt_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
