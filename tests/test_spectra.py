import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cuttlefish_jax.kernels import Kernel, Kernels
from cuttlefish_jax.spectra import accumulative_ranks, singular_values, stable_ranks

METHODS = ("exact", "lanczos")


def dense(path, inputs, outputs):
    return Kernel(path=path, layer="Dense", shape=(inputs, outputs), reduction_axes=(0,), output_axes=(1,))


def conv(path, inputs, outputs):
    shape = (3, 3, inputs, outputs)
    return Kernel(path=path, layer="Conv", shape=shape, reduction_axes=(0, 1, 2), output_axes=(3,))


def single(matrix):
    """Kernels and params of a network that is one dense layer."""
    matrix = jnp.asarray(matrix)
    return {"layer": {"kernel": matrix}}, Kernels((dense("layer", *matrix.shape),))


def svd_sigmas(matrix):
    return np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)


def svd_stable_rank(matrix):
    sigmas = svd_sigmas(matrix)
    return np.sum(sigmas**2, axis=-1) / sigmas[..., 0] ** 2


def with_spectrum(sigmas, m, n, seed=0):
    rng = np.random.default_rng(seed)
    k = len(sigmas)
    u, _ = np.linalg.qr(rng.standard_normal((m, k)))
    v, _ = np.linalg.qr(rng.standard_normal((n, k)))
    return ((u * sigmas) @ v.T).astype(np.float32)


NETWORK = Kernels(
    (
        conv("stage/conv", 8, 24),
        dense("wide", 40, 96),
        dense("tall", 96, 40),
        dense("again", 40, 96),
        Kernel(  # scanned: the stack axis in the middle
            path="blocks/fc", layer="Dense", shape=(40, 4, 96), reduction_axes=(0,), output_axes=(2,),
            stack_axes=(1,),
        ),
        Kernel(
            path="twice", layer="Dense", shape=(2, 3, 16, 40), reduction_axes=(2,), output_axes=(3,),
            stack_axes=(0, 1),
        ),
        Kernel(  # an attention output: two contracted axes
            path="attention/out", layer="DenseGeneral", shape=(4, 12, 48), reduction_axes=(0, 1),
            output_axes=(2,),
        ),
    )
)  # fmt: skip


def network_params(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    params = {}
    for path, kernel in NETWORK.items():
        *parents, name = path.split("/")
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = {"kernel": jnp.asarray(rng.standard_normal(kernel.shape), dtype), "bias": jnp.ones(3)}
    return params


def matrix_of(params, path):
    node = params
    for key in path.split("/"):
        node = node[key]
    return np.asarray(NETWORK[path].to_matrix(node["kernel"]), np.float64)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_stable_ranks_of_a_network_agree_with_a_float64_svd(method, dtype):
    params = network_params(dtype)
    ranks = stable_ranks(params, NETWORK, method=method)
    assert list(ranks) == list(NETWORK)
    for path, rank in ranks.items():
        assert rank.dtype == jnp.float32
        assert rank.shape == NETWORK[path].stack_shape
        np.testing.assert_allclose(rank, svd_stable_rank(matrix_of(params, path)), rtol=1e-2, err_msg=path)
        if method == "exact":
            np.testing.assert_allclose(rank, svd_stable_rank(matrix_of(params, path)), rtol=1e-5)


def test_singular_values_and_accumulative_ranks_agree_with_a_float64_svd():
    params = network_params()
    sigmas = singular_values(params, NETWORK)
    ranks = accumulative_ranks(params, NETWORK, p=0.7)
    assert list(sigmas) == list(ranks) == list(NETWORK)
    for path, kernel in NETWORK.items():
        expected = svd_sigmas(matrix_of(params, path))
        assert sigmas[path].shape == (*kernel.stack_shape, kernel.max_rank)
        np.testing.assert_allclose(sigmas[path], expected, rtol=1e-4, atol=3e-4 * expected.max())
        shares = np.cumsum(expected, -1) / expected.sum(-1, keepdims=True)
        assert ranks[path].dtype == jnp.int32
        np.testing.assert_array_equal(ranks[path], 1 + np.sum(shares < 0.7, -1))


@pytest.mark.parametrize("shape", [(64, 64), (256, 256), (512, 512), (128, 1152), (576, 192)])
def test_lanczos_is_within_one_percent_on_gaussian_matrices(shape):
    stack = np.random.default_rng(0).standard_normal((4, *shape)).astype(np.float32)
    kernel = Kernel(
        path="x", layer="Dense", shape=stack.shape, reduction_axes=(1,), output_axes=(2,), stack_axes=(0,)
    )
    ranks = stable_ranks({"x": {"kernel": stack}}, Kernels((kernel,)), method="lanczos")["x"]
    errors = np.asarray(ranks) / svd_stable_rank(stack) - 1
    assert errors.max() < 1e-2
    assert errors.min() > -1e-5  # sigma_1 is approached from below


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("decay", [0.3, 1.0, 2.0])
def test_power_law_spectra_as_of_trained_weights(decay, method):
    matrix = with_spectrum(np.arange(1, 201.0) ** -decay, 300, 200)
    rank = stable_ranks(*single(matrix), method=method)["layer"]
    np.testing.assert_allclose(rank, svd_stable_rank(matrix), rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "matrix",
    [
        np.outer(np.arange(1, 61.0), np.ones(50)),  # rank 1
        np.eye(60, 50) * 3,  # identical singular values
        with_spectrum([5.0] * 10 + [1.0] * 30, 60, 50),  # two distinct singular values
        with_spectrum([4.0, 2.0, 1.0], 50, 60),  # rank 3
        np.ones((1, 1)),
        np.arange(5.0).reshape(1, 5),
        np.arange(12.0).reshape(4, 3),  # fewer rows than Lanczos steps
        np.diag([1.0] + [0.0] * 49),
        np.zeros((40, 40)) + 1e-25,  # squares vanish in float32
        np.eye(40) * 1e25,  # squares overflow in float32
    ],
    ids=["outer", "eye", "two values", "rank 3", "1x1", "1x5", "4x3", "sparse", "tiny", "huge"],
)
def test_degenerate_matrices_are_exact(matrix, method):
    rank = stable_ranks(*single(np.asarray(matrix, np.float32)), method=method)["layer"]
    np.testing.assert_allclose(rank, svd_stable_rank(matrix), rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_zeros_have_stable_rank_zero(method):
    params, kernels = single(np.zeros((48, 40), np.float32))
    assert float(stable_ranks(params, kernels, method=method)["layer"]) == 0.0
    assert not np.any(singular_values(params, kernels)["layer"])
    assert int(accumulative_ranks(params, kernels)["layer"]) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_spoils_its_own_matrix_and_no_other(bad):
    weights = np.random.default_rng(0).standard_normal((3, 40, 48)).astype(np.float32)
    weights[1, 7, 5] = bad
    kernel = Kernel(
        path="x", layer="Dense", shape=(3, 40, 48), reduction_axes=(1,), output_axes=(2,), stack_axes=(0,)
    )
    params, kernels = {"x": {"kernel": jnp.asarray(weights)}}, Kernels((kernel,))
    for method in METHODS:
        ranks = stable_ranks(params, kernels, method=method)["x"]
        np.testing.assert_array_equal(np.isnan(ranks), [False, True, False])
    sigmas = singular_values(params, kernels)["x"]
    np.testing.assert_array_equal(np.isnan(sigmas).all(-1), [False, True, False])
    assert np.isfinite(sigmas[::2]).all()
    np.testing.assert_array_equal(accumulative_ranks(params, kernels)["x"] > 0, [True, False, True])


# Few distinct shapes, because each one compiles.
matrices = st.builds(
    lambda shape, rank, seed, scale: (
        scale * with_spectrum(np.random.default_rng(seed).uniform(0.1, 1.0, min(rank, *shape)), *shape, seed)
    ),
    shape=st.sampled_from([(1, 7), (5, 5), (9, 4), (36, 48)]),
    rank=st.integers(1, 36),
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e15]),
)


@settings(max_examples=40, deadline=None)
@given(matrices)
def test_properties_of_the_stable_rank(matrix):
    exact = float(stable_ranks(*single(matrix))["layer"])
    np.testing.assert_allclose(exact, svd_stable_rank(matrix), rtol=1e-5)
    assert 1 - 1e-5 <= exact <= min(matrix.shape) * (1 + 1e-5)
    transposed = stable_ranks(*single(matrix.T.copy()))["layer"]
    np.testing.assert_allclose(transposed, exact, rtol=1e-5)
    lanczos = float(stable_ranks(*single(matrix), method="lanczos")["layer"])
    np.testing.assert_allclose(lanczos, exact, rtol=1e-2)
    assert lanczos >= exact * (1 - 1e-5)


@settings(max_examples=40, deadline=None)
@given(matrices, st.floats(0.05, 0.95))
def test_properties_of_the_accumulative_rank(matrix, p):
    params, kernels = single(matrix)
    rank = int(accumulative_ranks(params, kernels, p=p)["layer"])
    shares = np.cumsum(svd_sigmas(matrix)) / np.sum(svd_sigmas(matrix))
    # 36 singular values of at most 3e-4 sigma_1 that are noise move the shares by no more than this.
    assert shares[rank - 1] >= p - 1e-2
    assert rank == 1 or shares[rank - 2] < p + 1e-2


def test_accumulative_rank_counts_an_exact_tie_as_reached():
    params, kernels = single(np.eye(10, dtype=np.float32))
    assert [int(accumulative_ranks(params, kernels, p=p)["layer"]) for p in (0.1, 0.8, 0.81, 1.0)] == [
        1,
        8,
        9,
        10,
    ]


@pytest.mark.parametrize("p", [0.0, -0.5, 1.01, math.nan])
def test_a_share_outside_its_range_is_refused(p):
    with pytest.raises(ValueError, match=r"p must be in \(0, 1\], got"):
        accumulative_ranks(*single(np.eye(3)), p=p)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"^method must be one of \['exact', 'lanczos'\], got 'power'$"):
        stable_ranks(*single(np.eye(3)), method="power")


@pytest.mark.parametrize("measure", [stable_ranks, singular_values, accumulative_ranks])
def test_params_of_another_model_are_refused(measure):
    _, kernels = single(np.eye(3))
    with pytest.raises(ValueError, match="params have no 'layer'"):
        measure({"other": {"kernel": jnp.eye(3)}}, kernels)
    with pytest.raises(ValueError, match=r"'layer' has shape \(4, 4\), expected \(3, 3\)"):
        measure({"layer": {"kernel": jnp.eye(4)}}, kernels)


def test_no_kernels_no_ranks():
    assert stable_ranks({}, Kernels(())) == {}


def test_a_second_call_does_not_recompile(caplog):
    def measure(seed):
        params = network_params(seed=seed)
        jax.block_until_ready(params)
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
            for method in METHODS:
                stable_ranks(params, Kernels(NETWORK.entries), method=method)
            singular_values(params, Kernels(NETWORK.entries))
            accumulative_ranks(params, Kernels(NETWORK.entries), p=0.5 + seed / 10)
        return [record.message for record in caplog.records if "Compiling" in record.message]

    jax.clear_caches()
    assert len(measure(seed=1)) >= 4  # this counts compilations
    assert measure(seed=2) == []


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_and_replicated_params_have_the_same_spectra(axis_type):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(axis_type, axis_type))
    kernels = Kernels(tuple(NETWORK[path] for path in ("stage/conv", "tall", "blocks/fc")))
    params = network_params()

    def put(leaf, sharded):
        # Every axis that the mesh divides, from the last one on: contracted, output and stack axes alike.
        names, spec = ["x", "y"], [None] * leaf.ndim
        for axis in reversed(range(leaf.ndim)):
            if sharded and names and leaf.shape[axis] % 4 == 0:
                spec[axis] = names.pop()
        return jax.device_put(leaf, NamedSharding(mesh, P(*spec)))

    sharded = jax.tree.map(lambda leaf: put(leaf, True), params)
    replicated = jax.tree.map(lambda leaf: put(leaf, False), params)
    assert not sharded["tall"]["kernel"].sharding.is_fully_replicated
    for measure in (
        lambda p: stable_ranks(p, kernels),
        lambda p: stable_ranks(p, kernels, method="lanczos"),
        lambda p: singular_values(p, kernels),
        lambda p: accumulative_ranks(p, kernels),
    ):
        expected = measure(params)
        for other in (sharded, replicated):
            for path, value in measure(other).items():
                noise = 3e-4 * np.max(expected[path]) if value.dtype == jnp.float32 else 0
                np.testing.assert_allclose(value, expected[path], rtol=1e-5, atol=noise, err_msg=path)
