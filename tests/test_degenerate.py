"""Kernels at the edge of what a matrix can be, through the core: a result, or an error with their name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import cuttlefish_jax as cf
from cuttlefish_jax.kernels import Kernel, Kernels


def matrices(dtype):
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(6, 9))
    tiny, huge = (1e-4, 1e4) if dtype == "float16" else (1e-30, 1e30)
    largest = float(jnp.finfo(dtype).max)
    return {
        "zeros": np.zeros((6, 9)),
        "a zero": np.zeros((1, 1)),
        "a number": np.full((1, 1), -2.0),
        "a row": noise[:1],
        "a column": noise[:, :1],
        "rank one": np.outer(noise[:, 0], noise[0]),
        "orthogonal": np.linalg.qr(rng.normal(size=(9, 9)))[0][:6],
        "identity": np.eye(6, 9),
        "tiny": tiny * noise,
        "huge": huge * noise,
        "huge and tiny": np.where(np.eye(6, 9) > 0, huge, tiny),
        "the largest number": np.where(np.eye(6, 9) > 0, largest, 0),
        "an infinity": np.where(np.arange(54).reshape(6, 9) == 7, np.inf, noise),
        "infinities": np.full((6, 9), -np.inf),
        "a NaN": np.where(np.arange(54).reshape(6, 9) == 7, np.nan, noise),
    }


# All dtypes in one tree: what is compiled is the same for all.
PARAMS = {
    dtype: {name: {"kernel": jnp.asarray(w, dtype)} for name, w in matrices(dtype).items()}
    for dtype in ("float32", "bfloat16", "float16")
}


def kernel_of(path):
    dtype, name = path.split("/")
    shape = PARAMS[dtype][name]["kernel"].shape
    return Kernel(path=path, layer="Dense", shape=shape, reduction_axes=(0,), output_axes=(1,))


def kernels_of(paths):
    return Kernels(tuple(map(kernel_of, paths)), num_params=10_000)


PATHS = [f"{dtype}/{name}" for dtype, layers in PARAMS.items() for name in layers]
KERNELS = kernels_of(PATHS)
BAD = [path for path in PATHS if path.endswith(("/an infinity", "/infinities", "/a NaN"))]
ZERO = [path for path in PATHS if path.endswith(("/zeros", "/a zero"))]
LARGEST = [path for path in PATHS if path.endswith("/the largest number")]


def array(tree, path, *keys):
    for key in (*path.split("/"), *keys, "kernel"):
        tree = tree[key]
    return tree


# What they are in float64, after rounding.
STORED = {path: np.asarray(array(PARAMS, path)).astype(np.float64) for path in PATHS}


def spectrum(matrix):
    return np.linalg.svd(matrix, compute_uv=False)


@pytest.fixture(scope="module")
def stable_ranks():
    return cf.stable_ranks(PARAMS, KERNELS)


@pytest.fixture(scope="module")
def singular_values():
    return cf.singular_values(PARAMS, KERNELS)


def test_stable_ranks(stable_ranks):
    lanczos = cf.stable_ranks(PARAMS, KERNELS, method="lanczos")
    warm, vectors = cf.warm_stable_ranks(PARAMS, KERNELS, cf.initial_vectors(KERNELS))
    # Whatever the kernels were: the next measurement has something to start from.
    assert all(np.all(np.isfinite(v)) for v in vectors.values())
    again, _ = cf.warm_stable_ranks(PARAMS, KERNELS, vectors)
    for path, matrix in STORED.items():
        if path in BAD or path in ZERO:
            expected, tolerance = (np.nan if path in BAD else 0.0), 0.0
        else:
            sigmas = spectrum(matrix / np.abs(matrix).max())
            expected, tolerance = np.sum(sigmas**2) / sigmas[0] ** 2, 1e-4
        for found in (stable_ranks, lanczos):
            np.testing.assert_allclose(found[path], expected, rtol=tolerance, err_msg=path)
        if path in LARGEST and np.isnan(warm[path]):
            continue  # its products overflow; no number is better than a wrong one
        for found in (warm, again):
            np.testing.assert_allclose(found[path], expected, rtol=100 * tolerance, err_msg=path)


def test_singular_values_and_accumulative_ranks(singular_values):
    ranks = cf.accumulative_ranks(PARAMS, KERNELS, p=0.8)
    for path, matrix in STORED.items():
        sigmas = singular_values[path]
        if path in BAD:
            assert np.all(np.isnan(sigmas)) and ranks[path] == 0
            continue
        expected = spectrum(matrix)
        np.testing.assert_allclose(sigmas, expected, rtol=1e-4, atol=5e-4 * expected[0], err_msg=path)
        share = np.cumsum(expected / (expected[0] or 1))
        # Where all are equal, five of six hold 0.8 of the sum; of zeros none holds anything.
        assert ranks[path] == (1 if path in ZERO else 1 + np.sum(share < 0.8 * share[-1] - 1e-5)), path


@pytest.mark.parametrize("is_full", [False, True], ids=["rank 1", "full rank"])
def test_factors(is_full):
    ranks = {path: kernel.max_rank if is_full else 1 for path, kernel in KERNELS.items()}
    plan = cf.FactorizationPlan.from_ranks(KERNELS, ranks)
    low = cf.factorize_params(PARAMS, plan)
    merged = cf.merge_params(low, plan)
    for path, matrix in STORED.items():
        leaves = [array(low, path, factor) for factor in "uv"]
        product = np.asarray(array(merged, path)).astype(np.float64)
        dtype = array(PARAMS, path).dtype
        assert {leaf.dtype for leaf in (*leaves, array(merged, path))} == {dtype}
        if path in BAD:  # and no other layer is
            assert all(np.all(np.isnan(leaf)) for leaf in [*leaves, product])
            continue
        assert all(np.all(np.isfinite(leaf)) for leaf in leaves), path
        if path in LARGEST:  # which may be rounded up to infinity
            product = np.minimum(product, matrix.max())
        best = np.linalg.norm(spectrum(matrix)[plan.ranks[path] :])
        rounding = 4 * float(jnp.finfo(dtype).eps) + 1e-6
        assert np.linalg.norm(product - matrix) <= best + rounding * np.linalg.norm(matrix), path


@pytest.mark.parametrize("path", BAD)
def test_no_rank_is_made_of_a_kernel_that_is_not_finite(path, stable_ranks, singular_values):
    # Alone among good ones, whatever gives it its rank.
    some, everywhere = kernels_of([p for p in PATHS if p not in BAD or p == path]), cf.Rule("*")
    for rules in ([everywhere], [cf.Rule(path, rank=1), everywhere], [cf.Rule(path, rank_ratio=0.5)]):
        with pytest.raises(ValueError, match=f"^the stable rank of '{path}' is nan, expected a finite"):
            cf.make_plan(some, stable_ranks, rules=rules)
    with pytest.raises(ValueError, match=f"^the spectrum of '{path}' is nan, expected a finite"):
        cf.make_plan(some, singular_values=singular_values, rank_rule=cf.EnergyRank(), rules=[everywhere])
    with pytest.raises(ValueError, match=f"^the stable rank of '{path}' is nan: has training diverged"):
        cf.RankTracker().update({p: stable_ranks[p] for p in some})
    # A layer that is kept is nobody's business.
    kept = cf.make_plan(some, stable_ranks, rules=[cf.Rule(path, keep=True), everywhere]).kept
    assert kept[path] == f"rule {path!r}"


@pytest.mark.parametrize(
    "rule", [cf.ScaledStableRank(), cf.StableRank(), cf.EnergyRank(0.9), cf.EffectiveRank()], ids=repr
)
def test_plans_of_kernels_that_are_hardly_matrices(rule, stable_ranks, singular_values):
    kernels = kernels_of([path for path in PATHS if path not in BAD])
    plan = cf.make_plan(
        kernels, stable_ranks, singular_values=singular_values, rank_rule=rule, rules=[cf.Rule("*")]
    )
    assert {path: plan.kept[path] for path in ZERO} == dict.fromkeys(ZERO, "its kernel is zero")
    for name in ("a number", "a row", "a column"):
        assert plan.kept[f"float32/{name}"] == "rank 1 of 1 would not make it smaller"
    if not isinstance(rule, cf.ScaledStableRank | cf.EffectiveRank):  # these see more in it
        assert plan.ranks["float32/rank one"] == 1
    assert all(1 <= rank < kernels[path].max_rank for path, rank in plan.ranks.items())


@pytest.mark.slow
def test_a_training_state_goes_through_the_switch():
    class State(TrainState):
        average: dict

    # At full rank, where singular values of zero have their rows in the factors.
    kernels = kernels_of(
        [path for path in PATHS if path.startswith("float32") and path not in (*BAD, *LARGEST)]
    )
    plan = cf.FactorizationPlan.from_ranks(kernels, {p: kernel.max_rank for p, kernel in kernels.items()})
    full = {"float32": {path.split("/")[1]: {"kernel": array(PARAMS, path)} for path in kernels}}
    tx = optax.adam(1e-3)
    state = State.create(apply_fn=None, params=full, tx=tx, average=full)
    gradient = jax.tree.map(jnp.ones_like, full)
    state = state.replace(opt_state=tx.update(gradient, state.opt_state, full)[1])
    low = cf.switch(state, plan, tx, apply_fn=lambda: None)
    for keys, leaf in jax.tree_util.tree_leaves_with_path((low.params, low.average, low.opt_state)):
        assert np.all(np.isfinite(leaf)), jax.tree_util.keystr(keys)
