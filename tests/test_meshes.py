"""Params on meshes, of automatic and of explicit axes: what is computed of them is what it is without one."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cuttlefish_jax as cf


class Network(nn.Module):
    """A convolution, two dense layers, a stack of them, and heads."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), name="conv")(x).mean((1, 2))
        step = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 1},
            split_rngs={"params": True},
            length=2,
        )
        x, _ = step(nn.Dense(8, name="blocks"), x, None)
        x = nn.DenseGeneral((2, 4), name="heads")(nn.Dense(8, name="wide")(x))
        return nn.Dense(6, name="kept")(x.reshape(-1, 8))


X = jnp.ones((2, 5, 5, 4))
MODEL = Network()
RANKS = {"conv": 5, "blocks": 3, "wide": 3, "heads": 4}
PLAN = cf.FactorizationPlan.from_ranks(cf.find_kernels(MODEL, X), RANKS)
PARAMS = MODEL.init(jax.random.key(0), X)["params"]
# Axes of inputs, of outputs, of several at a time, and of the copies.
SPECS = {"conv": P(None, None, "x"), "blocks": P("x", "y"), "wide": P(None, ("x", "y")), "heads": P("y", "x")}
SPECS_LOW = {
    "conv": (P(None, None, "x", None), P(None, None, None, None)),
    "blocks": (P("x", "y", None), P(None, "y", None)),
    "wide": (P(None, None), P(None, ("x", "y"))),
    "heads": (P("y", None), P(None, "x", None)),
}


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), tree)


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit])
def mesh(request):
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(request.param,) * 2)


def placed(tree, mesh):
    """A tree of the structure of the params, or of the factorized ones."""

    def put(keys, leaf):
        layer, *_, last = (key.key for key in keys)
        if last != "kernel" or layer not in SPECS:
            spec = P()
        else:
            spec = SPECS[layer] if len(keys) == 2 else SPECS_LOW[layer]["uv".index(keys[1].key)]
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(put, tree)


def check_places(low, mesh, names=("u", "v")):
    """On explicit axes the factors are where their kernels were; on others the compiler may choose."""
    for path, specs in SPECS_LOW.items():
        for name, spec in zip(names, specs, strict=True):
            leaf = low[path][name]["kernel"]
            assert leaf.sharding.mesh == mesh
            if AxisType.Explicit in mesh.axis_types:
                assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)


def test_the_switch_of_a_state(mesh):
    tx = optax.adam(1e-3)
    state = TrainState.create(apply_fn=MODEL.apply, params=PARAMS, tx=tx)
    adam = state.opt_state[0]._replace(
        mu=random_like(PARAMS, 1), nu=optax.tree.mul(*[random_like(PARAMS, 2)] * 2)
    )
    state = state.replace(opt_state=(adam, *state.opt_state[1:]))
    on_mesh = state.replace(
        params=placed(PARAMS, mesh),
        opt_state=(adam._replace(mu=placed(adam.mu, mesh), nu=placed(adam.nu, mesh)), *state.opt_state[1:]),
    )
    expected, low = (cf.switch(s, PLAN, tx) for s in (state, on_mesh))
    chex.assert_trees_all_close(low.params, expected.params, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(low.opt_state, expected.opt_state, rtol=1e-3, atol=1e-4)
    for tree in (low.params, low.opt_state[0].mu, low.opt_state[0].nu):
        check_places(tree, mesh)


def test_factors_and_their_products(mesh):
    params = placed(PARAMS, mesh)
    low, expected = cf.factorize_params(params, PLAN), cf.factorize_params(PARAMS, PLAN)
    chex.assert_trees_all_close(low, expected, rtol=1e-4, atol=1e-5)
    check_places(low, mesh)
    merged = cf.merge_params(low, PLAN)
    chex.assert_trees_all_close(merged, cf.merge_params(expected, PLAN), rtol=1e-4, atol=1e-5)
    if AxisType.Explicit in mesh.axis_types:
        for path in RANKS:
            before, after = (tree[path]["kernel"] for tree in (params, merged))
            assert after.sharding.is_equivalent_to(before.sharding, after.ndim)
    calibration = {path: random_like(PARAMS[path]["kernel"], 3) for path in RANKS}
    chex.assert_trees_all_close(
        cf.merge_params(cf.factorize_params(params, PLAN, calibration=calibration), PLAN),
        cf.merge_params(cf.factorize_params(PARAMS, PLAN, calibration=calibration), PLAN),
        rtol=1e-3,
        atol=1e-4,
    )


def test_averages_of_params(mesh):
    low = cf.factorize_params(PARAMS, PLAN)
    ema = random_like(PARAMS, 4)
    projected = cf.moments.project_average(placed(ema, mesh), placed(low, mesh), PLAN)
    chex.assert_trees_all_close(projected, cf.moments.project_average(ema, low, PLAN), rtol=1e-3, atol=1e-4)
    check_places(projected, mesh)


@pytest.mark.parametrize("transform", [jax.jit, lambda fn: fn])
def test_updates_of_factors(mesh, transform):
    low = cf.factorize_params(PARAMS, PLAN)
    gradients = random_like(low, 5)
    tx = optax.chain(cf.frobenius_decay(0.1, PLAN), cf.precondition_factors(PLAN), optax.scale(-0.1))

    def update(gradients, params):
        return tx.update(gradients, tx.init(params), params)[0]

    expected = update(gradients, low)
    found = transform(update)(placed(gradients, mesh), placed(low, mesh))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
    check_places(found, mesh)


def test_factors_that_are_split_by_one_axis_of_the_mesh_twice(mesh):
    u, v = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8)), jnp.float32)
    low = {"u": {"kernel": u}, "v": {"kernel": v}}
    plan = cf.FactorizationPlan.from_ranks(cf.find_kernels(nn.Dense(8, False), jnp.ones((1, 8))), {"": 8})
    specs = {"u": {"kernel": P("x", "y")}, "v": {"kernel": P("y", "x")}}
    on_mesh = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), low, specs)
    merged = cf.merge_params(on_mesh, plan)["kernel"]
    np.testing.assert_allclose(merged, np.asarray(u, np.float64) @ np.asarray(v), rtol=1e-4, atol=1e-5)
    if AxisType.Explicit in mesh.axis_types:
        assert merged.sharding.is_equivalent_to(NamedSharding(mesh, P("x")), 2)


def test_an_nnx_model_and_its_optimizer(mesh):
    def switched(put):
        model, tx = nnx.Linear(8, 6, rngs=nnx.Rngs(0)), optax.adam(1e-3)
        model.kernel.set_value(put(model.kernel.get_value()))
        plan = cf.FactorizationPlan.from_ranks(cf.find_kernels(model, jnp.ones((1, 8))), {"": 3})
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        optimizer.update(model, jax.tree.map(lambda leaf: leaf / 3, nnx.state(model, nnx.Param)))
        low, low_optimizer = cf.switch((model, optimizer), plan, tx)
        return nnx.to_pure_dict(nnx.state((low, low_optimizer)))

    found = switched(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, P("x", "y"))))
    chex.assert_trees_all_close(found, switched(lambda leaf: leaf), rtol=1e-3, atol=1e-5)


def test_float64_factors_are_multiplied_in_float64():
    with jax.enable_x64(True):
        u, v = np.random.default_rng(0).standard_normal((2, 8, 8))
        plan = cf.FactorizationPlan.from_ranks(cf.find_kernels(nn.Dense(8), jnp.ones((1, 8))), {"": 8})
        merged = cf.merge_params({"u": {"kernel": jnp.asarray(u)}, "v": {"kernel": jnp.asarray(v)}}, plan)
        np.testing.assert_allclose(merged["kernel"], u @ v, rtol=1e-12, atol=1e-12)
