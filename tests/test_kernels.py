"""What find_kernels finds and refuses, over the zoo; and how a kernel is read as a matrix."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linen_modules import Block
from linen_zoo import CASES, once, plan_at, prepared

import cuttlefish_jax as cf
from cuttlefish_jax.kernels import Kernel, check_kernel, insert_axes, kernel_sides, subtree


def leaves_of(params):
    """``{"path/of/param": leaf}``."""
    return {
        "/".join(key.key for key in keys): leaf
        for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }


def kernel_of(name, path=""):
    """A case's kernel and its parameter."""
    _, _, variables, kernels = prepared(name)
    return kernels[path], np.asarray(subtree(variables["params"], path)["kernel"])


# --- Which kernels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_kernels_come_in_call_order_with_their_positions(name):
    kernels = prepared(name)[-1]
    found = [(path, kernel.positions) for path, kernel in kernels.items()]
    assert found == list(CASES[name].positions.items())
    assert [kernel.path for kernel in kernels.entries] == list(kernels)


@pytest.mark.parametrize("name", CASES)
def test_what_is_skipped_has_its_reason(name):
    skipped, expected = prepared(name)[-1].skipped, CASES[name].skipped
    assert skipped.keys() == expected.keys()
    for path, reason in expected.items():
        assert reason in skipped[path]


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_is_accounted_for(name):
    _, _, variables, kernels = prepared(name)
    leaves = leaves_of(variables["params"])
    assert kernels.num_params == sum(leaf.size for leaf in leaves.values())
    accounted = set()
    for key, leaf in leaves.items():
        layer, _, param = f"/{key}".rpartition("/")
        layer = layer.lstrip("/")
        # The stacks of the zoo have these names.
        stacked = (
            0 if name == "scan_shared" else sum(part in ("blocks", "members") for part in key.split("/"))
        )
        if layer in kernels and param == kernels[layer].param:
            accounted.add(layer)
            stacked += {"general": 2, "einsum": 2}.get(layer.rpartition("/")[-1], 0)  # batch axes
            kernel = kernels[layer]
            assert kernel.shape == leaf.shape
            assert len(kernel.stack_shape) == stacked
            assert kernel.num_params() == leaf.size == math.prod(kernel.stack_shape) * kernel.m * kernel.n
        elif leaf.ndim - stacked >= 2 and param != "bias":
            assert layer in kernels.skipped or key in kernels.skipped
            accounted |= {layer, key} & kernels.skipped.keys()
    assert accounted == kernels.keys() | kernels.skipped.keys()


class TwoTables(nn.Module):
    """A convolution over patches and embedded positions, as in vision transformers, in either order."""

    positions_first: bool = False

    @nn.compact
    def __call__(self, x):
        table = nn.Embed(4, 6, name="positions")
        positions = table(jnp.arange(4)) if self.positions_first else None
        x = nn.Conv(6, (2, 2), strides=2, name="patches")(x).reshape(len(x), 4, 6)
        x = Block(name="block")(x + (table(jnp.arange(4)) if positions is None else positions))
        return nn.Dense(3, name="head")(x)


class OwnTable(nn.Module):
    """A table that is a plain parameter: no layer comes before the first one."""

    @nn.compact
    def __call__(self, x):
        x = x + self.param("table", nn.initializers.normal(0.02), (5, 6))
        return nn.Dense(3, name="head")(Block(name="block")(nn.Dense(6, name="first")(x)))


def test_behind_an_embedding_no_kernel_is_the_first_layer():
    for name in CASES:
        assert prepared(name)[-1].embedding_first == (name in ("tied", "tokens", "tokens_embedded"))
    kernels = prepared("tokens")[-1]
    plan = cf.make_plan(kernels, rank_rule=cf.RankRatio(0.25))
    assert list(plan.ranks) == [f"attention/{name}" for name in ("query", "key", "value", "out")]
    assert plan.kept == {"head": "last layer"} | kernels.skipped


IDS_BY_A_LAYER = nn.Sequential([nn.Dense(4), lambda x: x.argmax(-1), nn.Embed(4, 6), Block()])


@pytest.mark.parametrize(
    ("model", "shape", "first"),
    [
        (TwoTables(), (2, 4, 4, 3), ["patches"]),
        (TwoTables(positions_first=True), (2, 4, 4, 3), []),
        (OwnTable(), (2, 5, 6), ["first"]),
        (IDS_BY_A_LAYER, (2, 5, 6), ["layers_0"]),
    ],
)
def test_an_embedding_behind_a_kernel_leaves_it_the_first_layer(model, shape, first):
    kernels = cf.find_kernels(model, jnp.ones(shape))
    assert kernels.embedding_first == (not first)
    kept = cf.make_plan(kernels, rank_rule=cf.RankRatio(0.2)).kept
    assert [path for path, reason in kept.items() if reason == "first layer"] == first


def test_an_embedding_that_only_reads_out_is_not_the_first_layer():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, x):
            table = nn.Embed(5, 6, name="table")
            return table.attend(nn.Dense(6, name="in")(x)) + table(jnp.zeros(1, jnp.int32)).sum()

    kernels = cf.find_kernels(Tied(), jnp.ones((2, 3)))
    assert list(kernels) == ["in"] and not kernels.embedding_first


@pytest.mark.parametrize("name", ["conv_2d", "tokens", "scan", "over_batch", "trained", "rnn"])
def test_shapes_are_enough_and_the_batch_does_not_count(name):
    model, (x, *rest), _, kernels = prepared(name)
    larger = jax.ShapeDtypeStruct((7, *x.shape[1:]), x.dtype)
    assert cf.find_kernels(model, larger, *rest) == kernels


def test_flags_may_be_given_by_name():
    model, (x, train), _, kernels = prepared("trained")
    assert cf.find_kernels(model, x, train=train) == kernels
    assert cf.find_kernels(model, x, train=True) == kernels  # dropout makes do with the params' key


def test_the_kernels_of_a_factorized_model_are_the_factors():
    model, x = nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(4)]), jnp.ones((2, 6))
    plan = plan_at(cf.find_kernels(model, x), 0.5)
    kernels = cf.find_kernels(nn.Sequential([cf.factorize(model, plan), nn.Dense(3)]), x)
    paths = ["layers_0/layers_0/u", "layers_0/layers_0/v", "layers_0/layers_2/u", "layers_0/layers_2/v"]
    assert list(kernels) == [*paths, "layers_1"] and not kernels.skipped
    assert kernels.num_params == plan.num_params + 4 * 3 + 3


def test_a_model_that_no_memory_holds():
    model = nn.Sequential([nn.Dense(1_000_000), nn.Dense(1_000_000)])
    kernels = cf.find_kernels(model, jax.ShapeDtypeStruct((2, 1_000_000), jnp.float32))
    assert kernels.num_params == 2 * (10**12 + 10**6)
    assert [kernel.flops() for kernel in kernels.values()] == [2 * 10**12] * 2


class Box:
    """Holds a value, but not the names of its axes."""

    value = jnp.ones((3, 4))


def test_boxed_params_are_found_and_have_to_know_the_names_of_their_axes():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    model, x = nn.Sequential([nn.Dense(4, kernel_init=init), Block(4)]), jnp.ones((2, 3))
    kernels = cf.find_kernels(model, x)
    assert list(kernels) == ["layers_0", "layers_1/up", "layers_1/down"]
    params = once(model.init, jax.random.key(0), x)["params"]
    for tree in (params, nn.meta.unbox(params)):
        check_kernel(tree, kernels["layers_0"])
        assert kernel_sides(tree, kernels["layers_0"]).shape == (3, 4)
    with pytest.raises(ValueError, match="'layers_0' is a Box, not an array: take params out of their boxes"):
        check_kernel({"layers_0": {"kernel": Box()}}, kernels["layers_0"])
    assert kernels.num_params == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_finding_twice_gives_equal_hashable_kernels():
    model, inputs, _, kernels = prepared("scan_jit")
    again = cf.find_kernels(model, *inputs)
    assert again is not kernels
    assert again == kernels and hash(again) == hash(kernels)
    assert {again: 1} == {kernels: 1}
    assert kernels != prepared("scan_last")[-1]


@pytest.mark.parametrize(
    ("thing", "named"), [(nn.Dense, "type"), (lambda x: x, "function"), ({"kernel": 1}, "dict")]
)
def test_only_modules_have_kernels(thing, named):
    with pytest.raises(TypeError, match=f"find_kernels needs a Flax module, got {named}$"):
        cf.find_kernels(thing, jnp.ones((2, 3)))


# --- As matrices --------------------------------------------------------------------------------------------


def windows(x, size, axes):
    """``[*batch, *positions, *size, channels]``, what the windows of a convolution see."""
    view = np.lib.stride_tricks.sliding_window_view(x, size, axes)
    return np.moveaxis(view, x.ndim - 1, -1)


def pad_after(x):
    return np.pad(x, [(0, 0), *[(0, 1)] * (x.ndim - 2), (0, 0)])


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("dense", lambda x: x),
        ("general", lambda x: x),
        ("general_apart", lambda x: np.moveaxis(x, 2, 1)),
        ("general_one", lambda x: x),
        ("conv_2d_pointwise", lambda x: x[:, ::2, ::2]),
        ("conv_2d_valid", lambda x: windows(x, (3, 2), (1, 2))),
        ("conv_1d", lambda x: windows(np.pad(x, ((0, 0), (1, 1), (0, 0))), (3,), (1,))[:, ::2]),
        ("conv_3d", lambda x: windows(pad_after(x), (2, 3, 2), (1, 2, 3))[:, :, ::2]),
    ],
)
def test_a_layer_multiplies_its_unfolded_inputs_by_the_matrix(name, inputs):
    model, (x,), variables, _ = prepared(name)
    kernel, param = kernel_of(name)
    matrix = np.asarray(kernel.to_matrix(param))
    assert matrix.shape == (kernel.m, kernel.n)
    output = np.asarray(once(model.apply, variables, x)) - np.asarray(variables["params"].get("bias", 0))
    unfolded = inputs(np.asarray(x)).reshape(-1, kernel.m)
    np.testing.assert_allclose(unfolded @ matrix, output.reshape(-1, kernel.n), rtol=1e-4, atol=1e-5)
    assert kernel.positions * len(x) == len(unfolded)
    sides = kernel_sides(variables["params"], kernel)
    np.testing.assert_array_equal(np.reshape(sides, matrix.shape), matrix)


def test_attention_reads_its_heads_as_one_axis():
    query, out = (kernel_of("attention", name)[0] for name in ("query", "out"))
    assert (query.shape, query.m, query.n) == ((8, 2, 4), 8, 8)
    assert (out.shape, out.reduction_axes, out.output_axes) == ((2, 4, 8), (0, 1), (2,))


@pytest.mark.parametrize(
    ("name", "path", "copy_at"),
    [
        ("scan", "blocks/Block_0/up", lambda w, i: w[i]),
        ("scan_last", "blocks/Block_0/up", lambda w, i: w[..., i]),
        ("vmap_last", "members/down", lambda w, i: w[..., i]),
        ("vmap_scan", "members/blocks/Block_0/up", lambda w, i, j: w[i, j]),
        ("vmap_scan_axes", "members/blocks/Block_0/up", lambda w, i, j: w[i, ..., j]),
    ],
)
def test_a_stack_is_a_matrix_for_every_copy(name, path, copy_at):
    kernel, param = kernel_of(name, path)
    matrices = kernel.to_matrix(param)
    assert matrices.shape == (*kernel.stack_shape, kernel.m, kernel.n)
    for index in np.ndindex(kernel.stack_shape):
        np.testing.assert_array_equal(matrices[index], copy_at(param, *index))


@st.composite
def kernels(draw):
    """Kernels of every form that Linen makes: their own axes, with stack axes inserted one by one."""
    sizes = st.lists(st.integers(1, 4), min_size=1, max_size=3)
    reduction, output, stack = draw(sizes), draw(sizes), draw(st.lists(st.integers(1, 3), max_size=2))
    layer = draw(st.sampled_from(["Dense", "DenseGeneral"] if len(output) > 1 else ["Conv", "DenseGeneral"]))
    shape, indices = [*reduction, *output], []
    for size in stack:
        indices.append(draw(st.integers(-len(shape) - 1, len(shape))))
        shape.insert(indices[-1] if indices[-1] >= 0 else len(shape) + 1 + indices[-1], size)
    axes, stack_axes = insert_axes(len(reduction) + len(output), tuple(indices))
    return Kernel(
        path="layer",
        layer=layer,
        shape=tuple(shape),
        reduction_axes=axes[: len(reduction)],
        output_axes=axes[len(reduction) :],
        stack_axes=tuple(sorted(stack_axes)),
        stack_indices=tuple(indices),
    )


@settings(max_examples=25, deadline=None)
@given(kernels(), st.integers(1, 4))
def test_matrices_and_factors_of_any_shape(kernel, rank):
    param = np.arange(math.prod(kernel.shape)).reshape(kernel.shape)
    matrix = np.asarray(kernel.to_matrix(param))
    assert matrix.shape == (*kernel.stack_shape, kernel.m, kernel.n)
    np.testing.assert_array_equal(kernel.from_matrix(matrix), param)
    for stack in np.ndindex(kernel.stack_shape):
        index = [slice(None)] * param.ndim
        for axis, i in zip(kernel.stack_axes, stack, strict=True):
            index[axis] = i
        np.testing.assert_array_equal(matrix[stack], param[tuple(index)].reshape(kernel.m, kernel.n))

    u, v = kernel.factors(rank)
    assert (u.path, v.path, u.layer, v.layer) == ("layer/u", "layer/v", kernel.layer, kernel.layer)
    assert (u.m, u.n, v.m, v.n) == (kernel.m, rank, rank, kernel.n)
    assert u.stack_shape == v.stack_shape == kernel.stack_shape
    assert u.num_params() + v.num_params() == kernel.num_params(rank)
    assert u.flops() + v.flops() == kernel.flops(rank)
    own = [size for axis, size in enumerate(u.shape) if axis not in u.stack_axes]
    assert own == [kernel.shape[axis] for axis in kernel.reduction_axes] + [rank]
    window = [1] * (len(kernel.reduction_axes) - 1) if kernel.layer == "Conv" else []
    own = [size for axis, size in enumerate(v.shape) if axis not in v.stack_axes]
    assert own == [*window, rank] + [kernel.shape[axis] for axis in kernel.output_axes]


@given(st.lists(st.integers(2, 9), max_size=4), st.lists(st.integers(-9, 9), max_size=3))
def test_inserted_axes_are_where_numpy_inserts_them(own, inserted):
    array, indices = np.empty(own), []
    for index in inserted:
        indices.append(max(-array.ndim - 1, min(index, array.ndim)))
        array = np.expand_dims(array, indices[-1])
    axes, new = insert_axes(len(own), tuple(indices))
    assert sorted(axes + new) == list(range(array.ndim))
    assert [array.shape[axis] for axis in axes] == own
    assert all(array.shape[axis] == 1 for axis in new)


def test_pointwise_is_a_convolution_over_one_position():
    assert kernel_of("conv_2d_pointwise")[0].is_pointwise
    assert not kernel_of("conv_2d")[0].is_pointwise
    assert not kernel_of("dense")[0].is_pointwise


# --- Params of another model --------------------------------------------------------------------------------


def test_params_of_another_model_are_named():
    kernel = kernel_of("scan", "blocks/Block_0/up")[0]
    params = prepared("scan")[2]["params"]
    check_kernel(params, kernel)
    check_kernel(jax.eval_shape(lambda: params), kernel)
    assert subtree(params, "") is params
    for broken, message in [
        ({}, "params have no 'blocks/Block_0/up': there is no 'blocks' at the top"),
        ({"blocks": {}}, "there is no 'Block_0' at blocks$"),
        ({"blocks": {"Block_0": jnp.ones(3)}}, "there is no 'up' at blocks/Block_0$"),
        (
            {"blocks": {"Block_0": {"up": {"u": 1, "bias": 2}}}},
            r"no kernel at 'blocks/Block_0/up': the layer has \['bias', 'u'\]",
        ),
        ({"blocks": {"Block_0": {"up": 3}}}, "the layer has int"),
        (
            {"blocks": {"Block_0": {"up": {"kernel": jnp.ones((6, 8))}}}},
            r"has shape \(6, 8\), expected \(3, 6, 8\): these are the params of another model",
        ),
    ]:
        for use in (check_kernel, kernel_sides):
            with pytest.raises(ValueError, match=message):
                use(broken, kernel)
