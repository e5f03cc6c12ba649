"""Stable ranks from a warm start."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from program_tools import collective_sizes

from cuttlefish_jax.kernels import Kernel, Kernels
from cuttlefish_jax.lobpcg import leading_eigenvalues
from cuttlefish_jax.spectra import initial_vectors, warm_stable_ranks


def dense(path, *shape):
    """A dense layer's kernel; what comes before the last two axes are stack axes."""
    last = len(shape) - 1
    return Kernel(
        path=path, layer="Dense", shape=shape, reduction_axes=(last - 1,), output_axes=(last,),
        stack_axes=tuple(range(last - 1)),
    )  # fmt: skip


def conv(path, inputs, outputs):
    shape = (3, 3, inputs, outputs)
    return Kernel(path=path, layer="Conv", shape=shape, reduction_axes=(0, 1, 2), output_axes=(3,))


NETWORK = Kernels(
    (
        conv("conv", 8, 24),
        dense("wide", 40, 96),
        dense("again", 40, 96),
        dense("tall", 96, 40),
        # Scanned twice, the stack axes in the middle and in the wrong order.
        Kernel(
            path="scanned", layer="Dense", shape=(40, 3, 2, 30), reduction_axes=(0,), output_axes=(3,),
            stack_axes=(2, 1),
        ),
        dense("stack", 2, 30, 50),
        dense("same stack", 2, 30, 50),
        # An attention output: two contracted axes.
        Kernel(
            path="attention", layer="DenseGeneral", shape=(4, 12, 48), reduction_axes=(0, 1), output_axes=(2,)
        ),
        # What is contracted comes last.
        Kernel(path="turned", layer="Dense", shape=(24, 72), reduction_axes=(1,), output_axes=(0,)),
    )
)  # fmt: skip


def tree(arrays):
    return {path: {"kernel": jnp.asarray(array)} for path, array in arrays.items()}


def random_arrays(kernels, seed):
    rng = np.random.default_rng(seed)
    return {p: rng.standard_normal(k.shape, dtype=np.float32) for p, k in kernels.items()}


def svd_stable_ranks(arrays, kernels):
    ranks = {}
    for path, array in arrays.items():
        matrix = np.asarray(kernels[path].to_matrix(jnp.asarray(array)), np.float64)
        sigmas = np.linalg.svd(matrix, compute_uv=False)
        with np.errstate(invalid="ignore"):
            ranks[path] = np.sum(sigmas**2, axis=-1) / sigmas[..., 0] ** 2
    return ranks


def test_ranks_agree_with_a_float64_svd_while_the_weights_change(caplog):
    arrays, vectors = random_arrays(NETWORK, seed=0), initial_vectors(NETWORK)
    compiled = []
    for epoch in range(4):
        params = tree(arrays)
        jax.block_until_ready(params)
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
            ranks, new = warm_stable_ranks(params, Kernels(NETWORK.entries), vectors)
        compiled.append(any("Compiling" in record.message for record in caplog.records))
        assert list(ranks) == list(new) == list(NETWORK)
        for path, expected in svd_stable_ranks(arrays, NETWORK).items():
            assert ranks[path].dtype == new[path].dtype == jnp.float32
            assert ranks[path].shape == NETWORK[path].stack_shape
            assert new[path].shape == vectors[path].shape
            np.testing.assert_allclose(ranks[path], expected, rtol=1e-2, err_msg=f"{epoch} {path}")
            assert np.all(ranks[path] >= expected * (1 - 1e-5)), path  # sigma_1 is approached from below
        again = warm_stable_ranks(params, NETWORK, vectors)
        jax.tree.map(np.testing.assert_array_equal, (ranks, new), again)
        vectors = new
        step = random_arrays(NETWORK, seed=epoch + 1)
        arrays = {path: array + 0.3 * step[path] for path, array in arrays.items()}
    assert compiled == [True, False, False, False]


def test_gaussian_matrices_are_within_one_percent_and_then_read_only_three_times():
    kernels = Kernels((dense("square", 16, 96, 96),))
    arrays = random_arrays(kernels, seed=0)
    measure = jax.jit(lambda vectors: leading_eigenvalues([arrays["square"]], kernels.entries, vectors))
    (eigenvalues,), (traces,), vectors, (cold,) = measure([initial_vectors(kernels)["square"]])
    np.testing.assert_allclose(traces / eigenvalues, svd_stable_ranks(arrays, kernels)["square"], rtol=1e-2)
    assert np.min(cold) > 0
    *_, (warm,) = measure(vectors)
    assert np.all(warm == 0)


def orthonormal(size, count, seed):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, count)))[0]


def test_singular_vectors_that_cross_are_noticed():
    u, v = orthonormal(120, 3, seed=1), orthonormal(80, 3, seed=2)
    noise = 0.02 * np.random.default_rng(3).standard_normal((120, 80))
    before_and_after = [
        ([2.0, 0.0, 0.0], [0.0, 2.0, 0.0]),  # the first one goes, one orthogonal to it comes
        ([2.0, 1.8, 0.0], [1.8, 2.0, 0.0]),  # the second overtakes the first
        ([2.0, 1.8, 1.0], [2.0, 1.8, 2.5]),  # the third does
    ]
    epochs = [
        np.stack([(u * sigmas) @ v.T + noise for sigmas in epoch]).astype(np.float32)
        for epoch in zip(*before_and_after, strict=True)
    ]
    kernels = Kernels((dense("x", *epochs[0].shape),))
    vectors = initial_vectors(kernels)
    for weights in epochs:
        ranks, vectors = warm_stable_ranks(tree({"x": weights}), kernels, vectors)
        np.testing.assert_allclose(ranks["x"], svd_stable_ranks({"x": weights}, kernels)["x"], rtol=5e-3)


def test_one_that_comes_from_nowhere_is_found_in_a_few_measurements():
    u, v = orthonormal(120, 2, seed=1), orthonormal(80, 2, seed=2)
    noise = 0.02 * np.random.default_rng(3).standard_normal((120, 80))
    before, after = (((u * s) @ v.T + noise).astype(np.float32) for s in ([2.0, 0.0], [2.0, 2.5]))
    kernels = Kernels((dense("x", 120, 80),))
    _, vectors = warm_stable_ranks(tree({"x": before}), kernels, initial_vectors(kernels))
    for _ in range(3):
        _, vectors = warm_stable_ranks(tree({"x": after}), kernels, vectors)
    ranks, _ = warm_stable_ranks(tree({"x": after}), kernels, vectors)
    np.testing.assert_allclose(ranks["x"], svd_stable_ranks({"x": after}, kernels)["x"], rtol=5e-3)


def test_degenerate_matrices():
    rng = np.random.default_rng(0)
    u, v = orthonormal(60, 40, seed=1), orthonormal(40, 40, seed=2)
    nan, infinite = rng.standard_normal((2, 60, 40))
    nan[3, 5], infinite[4, 2] = np.nan, -np.inf
    stacked = {
        "outer": np.outer(np.arange(1, 61.0), np.ones(40)),
        "eye": np.eye(60, 40) * 3,
        "two values": (u * ([5.0] * 10 + [1.0] * 30)) @ v.T,
        "rank 3": (u[:, :3] * [4.0, 2.0, 1.0]) @ v[:, :3].T,
        "sparse": np.eye(60, 1) * np.eye(1, 40),
        "tiny": 1e-25 * rng.standard_normal((60, 40)),
        "huge": np.eye(60, 40) * 1e25,
        "zeros": np.zeros((60, 40)),
        "nan": nan,
        "infinite": infinite,
    }
    arrays = {
        "stacked": np.stack(list(stacked.values())),
        "1x1": -np.ones((1, 1)),
        "1x5": np.arange(5.0).reshape(1, 5),
        "4x3": np.arange(12.0).reshape(4, 3),
    }
    arrays = {path: array.astype(np.float32) for path, array in arrays.items()}
    kernels = Kernels(tuple(dense(path, *array.shape) for path, array in arrays.items()))
    finite = arrays | {"stacked": np.nan_to_num(arrays["stacked"])}
    expected = svd_stable_ranks(finite, kernels)
    expected["stacked"][-3:] = 0, np.nan, np.nan
    vectors = initial_vectors(kernels)
    for _ in range(2):
        ranks, vectors = warm_stable_ranks(tree(arrays), kernels, vectors)
        for path, rank in expected.items():
            np.testing.assert_allclose(ranks[path], rank, rtol=1e-3, err_msg=path)
        assert all(np.isfinite(value).all() for value in vectors.values())


def test_no_start_is_taken_for_the_end_where_dimensions_are_few():
    """Four random vectors in seven dimensions may have all of the second singular vector in them."""
    rng = np.random.default_rng(1)
    arrays, expected = {}, {}
    for size in (5, 6, 7, 8, 10, 12, 16):
        for rest in ((0.9, 0.9), (0.9, 0.9, 0.9), (0.9, 0.8), (0.95,), (0.95, 0.95, 0.95, 0.95)):
            sigmas = np.pad(np.array([1.0, *rest]), (0, size - len(rest) - 1))
            left, right = (np.linalg.qr(rng.standard_normal((500, size, size)))[0] for _ in range(2))
            path = f"{size} {rest}"
            arrays[path] = ((left * sigmas[None, None]) @ right).astype(np.float32)
            expected[path] = np.full(500, np.sum(sigmas**2))
    kernels = Kernels(tuple(dense(path, *array.shape) for path, array in arrays.items()))
    ranks, _ = warm_stable_ranks(tree(arrays), kernels, initial_vectors(kernels))
    for path, rank in ranks.items():
        np.testing.assert_allclose(rank, expected[path], rtol=0.02, err_msg=path)


@pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)]
)
def test_sharded_kernels_are_not_gathered(axis_type):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    specs = {"rows": P("x"), "columns": P(None, "x"), "conv": P(None, None, "x"), "stack": P("x")}
    kernels = Kernels(
        (dense("rows", 256, 320), dense("columns", 256, 320), conv("conv", 64, 96), dense("stack", 8, 64, 96))
    )
    arrays, vectors = random_arrays(kernels, seed=0), initial_vectors(kernels)
    sharded = {
        path: {"kernel": jax.device_put(array, NamedSharding(mesh, specs[path]))}
        for path, array in arrays.items()
    }
    measure = jax.jit(lambda params: warm_stable_ranks(params, kernels, vectors)[0]).lower(sharded).compile()
    sizes = collective_sizes(measure.as_text())
    # The largest are the blocks of four vectors; all kernels have 49,152 elements and more.
    assert sizes and max(sizes) <= 4 * 9 * 64 * 4
    expected = svd_stable_ranks(arrays, kernels)
    for path, rank in measure(sharded).items():
        np.testing.assert_allclose(rank, expected[path], rtol=1e-2, err_msg=path)
    # The counter sees a kernel that is gathered.
    everywhere = NamedSharding(mesh, P())
    gather = jax.jit(lambda x: x + 1, out_shardings=everywhere)
    assert max(collective_sizes(gather.lower(sharded["rows"]["kernel"]).compile().as_text())) == 256 * 320


def test_other_vectors_and_params_are_refused():
    kernels = Kernels((dense("layer", 6, 5),))
    params, vectors = tree(random_arrays(kernels, seed=0)), initial_vectors(kernels)
    with pytest.raises(
        ValueError, match=r"^the vectors of 'layer' have shape None, expected \(4, 5\): start"
    ):
        warm_stable_ranks(params, kernels, {})
    with pytest.raises(ValueError, match=r"'layer' have shape \(5,\), expected \(4, 5\)"):
        warm_stable_ranks(params, kernels, {"layer": vectors["layer"][0]})
    with pytest.raises(ValueError, match="params have no 'layer'"):
        warm_stable_ranks({"other": params["layer"]}, kernels, vectors)
    assert warm_stable_ranks({}, Kernels(()), {}) == ({}, {})
