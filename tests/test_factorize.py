"""Params into factors and back, judged by a float64 SVD."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linen_zoo import CASES, once, plan_at, prepared

import cuttlefish_jax as cf
from cuttlefish_jax.kernels import Kernel, Kernels, subtree


def kernel(path, shape, split, stack=(), layer="DenseGeneral"):
    """A kernel whose own axes are the reduction axes, then the output axes."""
    own = [axis for axis in range(len(shape)) if axis not in stack]
    return Kernel(
        path=path,
        layer=layer,
        shape=shape,
        reduction_axes=tuple(own[:split]),
        output_axes=tuple(own[split:]),
        stack_axes=stack,
    )


NETWORK = Kernels(
    (
        kernel("square", (24, 24), 1, layer="Dense"),
        kernel("tall", (48, 16), 1, layer="Dense"),
        kernel("wide", (16, 48), 1, layer="Dense"),
        kernel("stage/conv", (3, 3, 8, 24), 3, layer="Conv"),
        kernel("stage/conv_1d", (3, 8, 40), 2, layer="Conv"),
        kernel("attention/query", (24, 4, 12), 1),
        kernel("attention/out", (4, 12, 24), 2),
        kernel("blocks/fc", (3, 16, 48), 1, stack=(0,), layer="Dense"),
        kernel("blocks/last", (16, 24, 3), 1, stack=(2,), layer="Dense"),
        kernel("twice", (2, 20, 3, 24), 1, stack=(0, 2), layer="Dense"),
    )
)


def network_params(dtype=jnp.float32):
    rng, params = np.random.default_rng(0), {"norm": {"scale": jnp.ones(5)}}
    for path, entry in NETWORK.items():
        *parents, name = path.split("/")
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = {"kernel": jnp.asarray(rng.standard_normal(entry.shape), dtype)}
    return params


def low_network(dtype=jnp.float32, ratio=0.25):
    params, plan = network_params(dtype), plan_at(NETWORK, ratio)
    return params, plan, cf.factorize_params(params, plan)


def as_matrix(kernel, array):
    """A kernel read as a matrix, in float64 NumPy."""
    order = kernel.stack_axes + kernel.reduction_axes + kernel.output_axes
    return np.transpose(np.asarray(array, np.float64), order).reshape(*kernel.stack_shape, kernel.m, kernel.n)


def matrix_of(params, entry):
    return as_matrix(entry, subtree(params, entry.path)["kernel"])


def halves(params_low, plan, path):
    """The two factors as float64 matrices, ``[*stack, m, r]`` and ``[*stack, r, n]``."""
    return tuple(matrix_of(params_low, factor) for factor in plan.kernels[path].factors(plan.ranks[path]))


def split(matrix, *ranks):
    """The pairs of factors of dense layers that all have this kernel, in float64."""
    names = {f"rank {rank}": rank for rank in ranks}
    kernels = Kernels(tuple(kernel(name, np.shape(matrix), 1, layer="Dense") for name in names))
    plan = cf.FactorizationPlan.from_ranks(kernels, names)
    params = {name: {"kernel": np.asarray(matrix, np.float32)} for name in names}
    low = cf.factorize_params(params, plan)
    return [halves(low, plan, name) for name in names]


def with_spectrum(sigmas, m, n, seed=0):
    rng = np.random.default_rng(seed)
    u, _ = np.linalg.qr(rng.standard_normal((m, len(sigmas))))
    v, _ = np.linalg.qr(rng.standard_normal((n, len(sigmas))))
    return ((u * sigmas) @ v.T).astype(np.float32)


def check_best_approximation(matrix, u, v):
    """Eckart-Young: no product of this rank is nearer. Stacked matrices one by one."""
    matrix = np.asarray(matrix, np.float64)
    tail = np.linalg.svd(matrix, compute_uv=False)[..., u.shape[-1] :]
    best = np.sqrt(np.sum(tail**2, axis=-1))
    error = np.linalg.norm(matrix - u @ v, axis=(-2, -1))
    assert np.all(error <= best + np.maximum(1e-3 * best, 1e-5 * np.linalg.norm(matrix, axis=(-2, -1))))


def check_balanced(matrix, u, v):
    sigmas = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)[..., : u.shape[-1]]
    expected = np.eye(u.shape[-1]) * sigmas[..., None, :]
    tolerance = 2e-5 * np.max(sigmas)
    np.testing.assert_allclose(np.swapaxes(u, -1, -2) @ u, expected, atol=tolerance, rtol=0)
    np.testing.assert_allclose(v @ np.swapaxes(v, -1, -2), expected, atol=tolerance, rtol=0)


# --- The factors --------------------------------------------------------------------------------------------


def test_factors_are_the_best_approximation_and_balanced():
    params, plan, low = low_network()
    for path in NETWORK:
        matrix = matrix_of(params, NETWORK[path])
        u, v = halves(low, plan, path)
        check_best_approximation(matrix, u, v)
        check_balanced(matrix, u, v)


def test_factors_of_bfloat16_params_are_bfloat16_and_as_good_as_it_can_say():
    params, plan, low = low_network(jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(low)} == {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}
    for path in NETWORK:
        matrix = matrix_of(params, NETWORK[path])
        tail = np.linalg.svd(matrix, compute_uv=False)[..., plan.ranks[path] :]
        u, v = halves(low, plan, path)
        error = np.linalg.norm(matrix - u @ v, axis=(-2, -1))
        rounding = 2**-8 * np.linalg.norm(matrix, axis=(-2, -1))
        np.testing.assert_array_less(error, np.hypot(np.linalg.norm(tail, axis=-1), rounding))


def test_the_signs_of_singular_vectors_are_told():
    params, plan, low = low_network()
    opposite = cf.factorize_params(jax.tree.map(jnp.negative, params), plan)
    for path in NETWORK:
        pairs = halves(low, plan, path), halves(opposite, plan, path)
        is_wide = NETWORK[path].m < NETWORK[path].n
        sides = [np.swapaxes(v, -1, -2) if is_wide else u for u, v in pairs]
        assert np.all(np.sum(sides[0] * np.abs(sides[0]), axis=-2) > 0)
        np.testing.assert_allclose(sides[0], sides[1], atol=1e-4)


def test_at_full_rank_the_product_is_the_kernel():
    params, plan, low = low_network(ratio=1.0)
    for path in NETWORK:
        matrix = matrix_of(params, NETWORK[path])
        u, v = halves(low, plan, path)
        assert np.linalg.norm(u @ v - matrix) < 2e-6 * np.linalg.norm(matrix)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e15, 1e25])
@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_squares_that_leave_the_range_of_float32(shape, scale):
    matrix = (scale * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)
    ((u, v),) = split(matrix, 4)
    check_best_approximation(matrix, u, v)
    check_balanced(matrix, u, v)


def test_the_scale_of_one_copy_is_not_that_of_another():
    scales = np.array([1, 1e-18, 1e18])[:, None, None]
    matrices = scales * np.random.default_rng(0).standard_normal((3, 20, 16))
    kernels = Kernels((kernel("x", matrices.shape, 1, stack=(0,), layer="Dense"),))
    plan = cf.FactorizationPlan.from_ranks(kernels, {"x": 4})
    low = cf.factorize_params({"x": {"kernel": jnp.asarray(matrices, jnp.float32)}}, plan)
    for matrix, u, v in zip(matrices, *halves(low, plan, "x"), strict=True):
        check_best_approximation(matrix, u, v)
        check_balanced(matrix, u, v)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (12, 12)])
def test_zeros_stay_zeros(shape):
    for u, v in split(np.zeros(shape), 1, 4, 12):
        assert not np.any(u @ v)
        assert max(np.max(np.abs(u)), np.max(np.abs(v))) < 1e-8


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (1, 9), (9, 1), (1, 1)])
def test_a_matrix_of_rank_one(shape):
    matrix = with_spectrum([3.0], *shape)
    for u, v in split(matrix, *sorted({1, min(4, *shape), min(shape)})):
        check_best_approximation(matrix, u, v)
        assert np.linalg.norm(u @ v - matrix) < 1e-6 * np.linalg.norm(matrix)
        # Nothing grows where there is nothing: the other columns and rows stay below those of the first.
        assert np.max(np.linalg.norm(u, axis=0)[1:], initial=0) < 0.1 * np.linalg.norm(u[:, 0])
        assert np.max(np.linalg.norm(v, axis=1)[1:], initial=0) < 0.1 * np.linalg.norm(v[0])


@pytest.mark.parametrize(
    "matrix",
    [
        3 * np.eye(12, 20),
        3 * np.eye(20, 12),
        with_spectrum([2.0] * 12, 12, 12),
        with_spectrum([5.0] * 3 + [1.0] * 9, 20, 12),
    ],
    ids=["wide", "tall", "orthogonal", "two values"],
)
def test_identical_singular_values(matrix):
    for u, v in split(matrix, 1, 3, 7, 12):
        check_best_approximation(matrix, u, v)
        check_balanced(matrix, u, v)


@pytest.mark.parametrize("shape", [(64, 40), (40, 64)])
def test_steep_spectra(shape):
    matrix = with_spectrum(np.arange(1, 41.0) ** -3, *shape)
    sigmas = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    ranks = (2, 8, 20, 40)
    for rank, (u, v) in zip(ranks, split(matrix, *ranks), strict=True):
        if sigmas[rank - 1] > 1e-2 * sigmas[0]:
            check_best_approximation(matrix, u, v)
        # Singular values below 3e-4 of the largest are below the Gram matrix's rounding, as documented.
        error = np.linalg.norm(matrix - u @ v)
        assert error <= np.linalg.norm(sigmas[rank:]) + 5e-4 * sigmas[0]


# --- The trees ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "extra_batch_norm"),
    [(name, False) for name in ("trained", "attention", "scan_last", "vmap_scan_axes", "general", "refused")]
    + [(name, True) for name in ("trained", "attention", "scan", "general", "refused")],
)
def test_the_tree_is_that_of_the_factorized_models_init(name, extra_batch_norm):
    model, inputs, variables, kernels = prepared(name)
    plan = plan_at(kernels, 0.5, extra_batch_norm=extra_batch_norm)
    low = cf.factorize(model, plan)
    made = jax.eval_shape(lambda: low.init(jax.random.key(0), *inputs, **CASES[name].kwargs))
    params = jax.eval_shape(lambda: cf.factorize_params(variables["params"], plan))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, made["params"])
    assert jax.tree.structure(params) == jax.tree.structure(made["params"])
    stats = cf.factorize_batch_stats(variables.get("batch_stats", {}), plan)
    chex.assert_trees_all_equal_shapes_and_dtypes(stats, made.get("batch_stats", {}))


def test_the_bias_moves_to_v_and_everything_else_stays():
    _, _, variables, kernels = prepared("trained")
    params = variables["params"]
    plan = cf.FactorizationPlan.from_ranks(kernels, {"conv": 2, "conv_1": 3})
    low = cf.factorize_params(params, plan)
    assert jax.tree.map(jnp.shape, low) == {
        "conv": {"u": {"kernel": (3, 3, 3, 2)}, "v": {"kernel": (1, 1, 2, 4), "bias": (4,)}},
        "conv_1": {"u": {"kernel": (3, 3, 4, 3)}, "v": {"kernel": (1, 1, 3, 6)}},
        "head": {"kernel": (6, 5), "bias": (5,)},
        "norm": {"scale": (4,), "bias": (4,)},
    }
    assert low["conv"]["v"]["bias"] is params["conv"]["bias"]
    assert low["head"]["kernel"] is params["head"]["kernel"]
    assert low["norm"]["scale"] is params["norm"]["scale"]


def test_extra_batch_norms_start_as_the_identity():
    _, _, variables, kernels = prepared("scan")
    plan = plan_at(kernels, 0.5, extra_batch_norm=True)
    norm = cf.factorize_params(variables["params"], plan)["blocks"]["Block_0"]["up"]["norm"]
    stats = cf.factorize_batch_stats({"other": 1}, plan)
    np.testing.assert_array_equal(norm["scale"], np.ones((3, 3)))
    np.testing.assert_array_equal(norm["bias"], np.zeros((3, 3)))
    np.testing.assert_array_equal(stats["blocks"]["Block_0"]["up"]["norm"]["var"], np.ones((3, 3)))
    np.testing.assert_array_equal(stats["stem"]["norm"]["mean"], np.zeros(2))
    assert stats.pop("other") == 1
    chex.assert_trees_all_equal(cf.factorize_batch_stats(None, plan), stats)


def test_inputs_are_not_changed():
    params, plan, low = low_network()
    before = jax.tree.map(np.array, params)
    structure = jax.tree.structure(params)
    low_structure = jax.tree.structure(low)
    merged = cf.merge_params(low, plan)
    assert jax.tree.structure(low) == low_structure
    merged["stage"]["conv"].clear()
    assert jax.tree.structure(low) == low_structure
    low["stage"].clear()
    assert jax.tree.structure(params) == structure
    chex.assert_trees_all_equal(params, before)
    batch_stats = {"norm": {"mean": jnp.zeros(3)}}
    cf.factorize_batch_stats(batch_stats, plan)["norm"].clear()
    assert batch_stats["norm"].keys() == {"mean"}


# --- Merging ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_merged_params_are_the_original_tree_with_the_products(dtype):
    params, plan, low = low_network(dtype)
    merged = once(lambda low: cf.merge_params(low, plan), low)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, params)
    tolerance = 1e-5 if dtype == jnp.float32 else 2**-7
    for path in NETWORK:
        u, v = halves(low, plan, path)
        matrix = matrix_of(merged, NETWORK[path])
        np.testing.assert_allclose(matrix, u @ v, rtol=tolerance, atol=tolerance)


def test_merging_and_factorizing_again_changes_no_product():
    _, plan, low = low_network()
    merged = once(lambda low: cf.merge_params(low, plan), low)
    again = once(lambda params: cf.merge_params(cf.factorize_params(params, plan), plan), merged)
    chex.assert_trees_all_close(again, merged, rtol=1e-5, atol=1e-5)


def test_the_unmodified_model_serves_merged_params():
    model, inputs, variables, kernels = prepared("attention")
    plan = plan_at(kernels, 0.5)
    low = cf.factorize_params(variables["params"], plan)
    expected = once(cf.factorize(model, plan).apply, {"params": low}, *inputs)
    actual = once(lambda low: model.apply({"params": cf.merge_params(low, plan)}, *inputs), low)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


# --- Errors -------------------------------------------------------------------------------------------------


def test_params_of_another_model_are_refused():
    params, plan, low = low_network()
    for rewrite in (cf.factorize_params, cf.merge_params):
        with pytest.raises(ValueError, match=r"^params have no 'square': there is no 'square' at the top$"):
            rewrite({"other": {"kernel": jnp.ones((2, 2))}}, plan)
    with pytest.raises(ValueError, match=r"^the kernel at 'tall' has shape \(4, 4\), expected \(48, 16\)"):
        cf.factorize_params({**params, "tall": {"kernel": jnp.ones((4, 4))}}, plan)
    with pytest.raises(ValueError, match=r"^params have no kernel at 'tall': the layer has \['bias'\]"):
        cf.factorize_params({**params, "tall": {"bias": jnp.ones(4)}}, plan)
    other_ranks = plan_at(NETWORK, 0.5)
    with pytest.raises(ValueError, match=r"^the kernel at 'square/u' has shape \(24, 6\), expected \(24, 1"):
        cf.merge_params(low, other_ranks)


@pytest.mark.parametrize("path", ["", "layer"])
def test_params_that_are_factorized_already_are_refused(path):
    entry = kernel(path, (8, 6), 1, layer="Dense")
    plan = cf.FactorizationPlan.from_ranks(Kernels((entry,)), {path: 2})
    layer = {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)}
    params = {path: layer} if path else layer
    low = cf.factorize_params(params, plan)
    with pytest.raises(ValueError, match=rf"^params have no kernel at '{path}': the layer has \['u', 'v'\]"):
        cf.factorize_params(low, plan)
    message = rf"^the layer at '{path}' is not factorized: it has \['bias', 'kernel'\], expected u and v$"
    with pytest.raises(ValueError, match=message):
        cf.merge_params(params, plan)
    assert subtree(low, f"{path}/u".lstrip("/")).keys() == {"kernel"}


def test_a_model_that_is_factorized_already_is_refused():
    model, x = nn.Dense(6), jnp.ones((1, 8))
    plan = cf.FactorizationPlan.from_ranks(cf.find_kernels(model, x), {"": 2})
    with pytest.raises(ValueError, match="the model is factorized already"):
        cf.factorize(cf.factorize(model, plan), plan)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="factorize needs a Flax module, got int"):
        cf.factorize(3, plan_at(NETWORK))


def test_merging_with_extra_batch_norms_is_refused():
    plan = plan_at(Kernels((kernel("x", (4, 4), 1),)), extra_batch_norm=True)
    low = cf.factorize_params({"x": {"kernel": jnp.ones((4, 4))}}, plan)
    with pytest.raises(ValueError, match="extra batch norms cannot be merged: use the factorized model"):
        cf.merge_params(low, plan)
