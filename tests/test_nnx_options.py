"""NNX models with sharding names, layer types of one's own and extra batch norms; profiling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nnx_zoo import CASES, layer_at, made, params_of, plan_at, prepared, relative_error, shapes

import cuttlefish_jax as cf

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5)), jnp.float32)


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
    with pytest.raises(ValueError, match="extra batch norms cannot be merged"):
        cf.merge_params(low, plan)


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


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_bias_tells_the_copies_axis_where_the_kernel_does_not(axis):
    axes = nnx.StateAxes({...: axis})

    class Stack(nnx.Module):
        def __init__(self):
            make = nnx.vmap(lambda rngs: nnx.Conv(4, 5, (3, 3), rngs=rngs), out_axes=axes)
            self.layers = make(nnx.Rngs(0).split(3))

        def __call__(self, x):
            return nnx.vmap(lambda layer, x: layer(x), in_axes=(axes, None))(self.layers, x)

    model, x = Stack(), jax.random.normal(jax.random.key(0), (2, 6, 6, 4))
    kernels = cf.find_kernels(model, x)
    assert kernels["layers"].stack_axes == (axis % 5,)
    low = cf.factorize(model, cf.FactorizationPlan.from_ranks(kernels, {"layers": 5}))
    np.testing.assert_allclose(low(x), model(x), atol=1e-5)


@pytest.mark.parametrize(("inputs", "outputs", "copies"), [(12, 12, 12), (8, 5, 8), (8, 5, 3)])
@pytest.mark.parametrize("axis", [0, 1])
def test_copies_whose_axis_no_sizes_tell_lead_or_are_skipped(inputs, outputs, copies, axis):
    """They are skipped where other copies are on other axes."""

    class Stack(nnx.Module):
        def __init__(self):
            self.axes = nnx.StateAxes({...: axis})
            make = nnx.vmap(
                lambda rngs: nnx.List([
                    nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs),
                    nnx.Linear(outputs, 7, use_bias=False, rngs=rngs),
                    nnx.Linear(7, 6, use_bias=False, rngs=rngs),  # whose sizes tell
                ]),
                out_axes=self.axes,
            )  # fmt: skip
            self.layers = make(nnx.Rngs(0).split(copies))

        def __call__(self, x):
            run = nnx.vmap(lambda layers, x: layers[2](layers[1](layers[0](x))), in_axes=(self.axes, None))
            return run(self.layers, x)

    kernels = cf.find_kernels(Stack(), jnp.ones((2, inputs)))
    shape = (copies, inputs, outputs) if axis == 0 else (inputs, copies, outputs)
    if copies == inputs and axis == 1:
        reason = f"its kernel of shape {shape} is called as {inputs, outputs}: which axes are copies?"
        assert kernels.skipped["layers/0"] == reason
        assert "layers/0" not in kernels
    else:
        kernel = kernels["layers/0"]
        assert (kernel.shape, kernel.stack_axes, kernel.m, kernel.n) == (shape, (axis,), inputs, outputs)
