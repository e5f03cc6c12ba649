"""What holds for any matrix, of whatever shape, dtype and spectrum, and for any history of stable ranks.

Matrices of all shapes are measured in one tree, so that an example compiles nothing.
"""

import json

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import cuttlefish_jax as cf
from cuttlefish_jax.kernels import Kernel, Kernels

SHAPES = [(1, 5), (5, 1), (4, 4), (3, 8), (8, 3), (12, 7)]
DTYPES = ["float32", "bfloat16", "float16"]
KERNELS = Kernels(
    tuple(
        Kernel(path=f"l{i}", layer="Dense", shape=shape, reduction_axes=(0,), output_axes=(1,))
        for i, shape in enumerate(SHAPES)
    ),
    num_params=sum(m * n for m, n in SHAPES),
)
# Where squares are told apart in float32: smaller singular values, as shares of the largest, are mixed.
GRAM = 3e-4
seeds = st.integers(0, 2**32 - 1)
# From one singular value to equal ones, over six orders of magnitude, zeros among them.
spectra = st.lists(st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 0.5, 0.9, 1.0]), min_size=8, max_size=8)
scales = st.sampled_from([1e-3, 1.0, 100.0])


def matrices(seed, spectrum, scale, dtype):
    """A float64 matrix of every shape; its largest singular value is ``scale``, but for rounding."""
    rng = np.random.default_rng(seed)
    found = {}
    for path, kernel in KERNELS.items():
        u, v = (np.linalg.qr(rng.normal(size=(size, kernel.max_rank)))[0] for size in kernel.shape)
        sigmas = np.sort([1.0, *spectrum[: kernel.max_rank - 1]])[::-1]
        found[path] = np.asarray(jnp.asarray(scale * (u * sigmas) @ v.T, dtype)).astype(np.float64)
    return found


def as_params(found, dtype="float32"):
    return {path: {"kernel": jnp.asarray(matrix, dtype)} for path, matrix in found.items()}


def singular_values(matrix):
    return np.linalg.svd(matrix, compute_uv=False)


def stable_rank(matrix):
    sigmas = singular_values(matrix)
    return np.sum(sigmas**2) / sigmas[0] ** 2


@given(seeds, spectra, scales, st.sampled_from(DTYPES))
def test_spectra_are_those_of_float64(seed, spectrum, scale, dtype):
    found = matrices(seed, spectrum, scale, dtype)
    params = as_params(found, dtype)
    exact, lanczos = cf.stable_ranks(params, KERNELS), cf.stable_ranks(params, KERNELS, method="lanczos")
    warm, vectors = cf.warm_stable_ranks(params, KERNELS, cf.initial_vectors(KERNELS))
    again, _ = cf.warm_stable_ranks(params, KERNELS, vectors)
    sigmas, ranks = cf.singular_values(params, KERNELS), cf.accumulative_ranks(params, KERNELS, p=0.8)
    for path, matrix in found.items():
        expected, true = stable_rank(matrix), singular_values(matrix)
        assert 1 - 1e-5 <= exact[path] <= np.linalg.matrix_rank(matrix) * (1 + 1e-5)
        np.testing.assert_allclose(exact[path], expected, rtol=1e-4)
        np.testing.assert_allclose(lanczos[path], expected, rtol=1e-3)
        assert expected * (1 - 1e-4) <= min(warm[path], again[path])  # never too low
        assert max(warm[path], again[path]) <= expected * 1.02
        np.testing.assert_allclose(sigmas[path], true, rtol=1e-3, atol=2 * GRAM * true[0])
        held = np.cumsum(true)[int(ranks[path]) - 1] / np.sum(true)
        assert held >= 0.8 - 2e-3 and 1 <= ranks[path] <= KERNELS[path].max_rank


@given(seeds, spectra, scales)
def test_spectra_know_neither_rotations_nor_scales_nor_sides(seed, spectrum, scale):
    rng = np.random.default_rng(seed)
    found = matrices(seed, spectrum, 1.0, "float32")
    turned = {}
    for path, matrix in found.items():
        left, right = (np.linalg.qr(rng.normal(size=(size, size)))[0] for size in matrix.shape)
        turned[path] = scale * (left @ matrix @ right)
    # The shapes of two pairs of kernels are each other's transposes.
    swapped = found | {"l0": found["l1"].T, "l1": found["l0"].T, "l3": found["l4"].T, "l4": found["l3"].T}
    partner = dict(l0="l1", l1="l0", l3="l4", l4="l3")
    before, after = (cf.stable_ranks(as_params(x), KERNELS) for x in (found, turned))
    across = cf.stable_ranks(as_params(swapped), KERNELS)
    values, turned_values = (cf.singular_values(as_params(x), KERNELS) for x in (found, turned))
    for path in KERNELS:
        np.testing.assert_allclose(after[path], before[path], rtol=1e-4)
        np.testing.assert_allclose(across[path], before[partner.get(path, path)], rtol=1e-5)
        np.testing.assert_allclose(
            turned_values[path], scale * values[path], rtol=1e-3, atol=2 * GRAM * scale
        )


PLANS = [
    cf.FactorizationPlan.from_ranks(
        KERNELS, {path: max(1, round(share * kernel.max_rank)) for path, kernel in KERNELS.items()}
    )
    for share in (0.0, 0.5, 1.0)
]


@given(seeds, spectra, scales, st.sampled_from(DTYPES), st.sampled_from(PLANS))
def test_factors_are_the_best_of_their_rank_and_balanced(seed, spectrum, scale, dtype, plan):
    found = matrices(seed, spectrum, scale, dtype)
    low = cf.factorize_params(as_params(found, dtype), plan)
    merged = cf.merge_params(low, plan)
    again = cf.merge_params(cf.factorize_params(merged, plan), plan)
    eps = float(jnp.finfo(dtype).eps)
    for path, rank in plan.ranks.items():
        matrix, norm = found[path], np.linalg.norm(found[path])
        u, v = (np.asarray(low[path][side]["kernel"]).astype(np.float64) for side in "uv")
        assert (u.shape, v.shape) == ((matrix.shape[0], rank), (rank, matrix.shape[1]))
        products = [np.asarray(x[path]["kernel"]).astype(np.float64) for x in (merged, again)]
        # Eckart and Young: no matrix of the rank is nearer, but for what float32 mixes.
        best = np.linalg.norm(singular_values(matrix)[rank:])
        assert np.linalg.norm(products[0] - matrix) <= best + (4 * eps + GRAM) * norm
        assert np.linalg.norm(products[1] - products[0]) <= (8 * eps + GRAM) * norm
        # Both factors carry the roots of the singular values, as far as float32 can tell these.
        roots = np.sqrt(singular_values(matrix)[:rank])
        is_told = roots**2 > 1e-2 * roots[0] ** 2
        for columns in (u, v.T):
            norms = np.linalg.norm(columns, axis=0)
            np.testing.assert_allclose(norms[is_told], roots[is_told], rtol=0.01 + 8 * eps)


ranks_of_layers = st.lists(st.floats(1, 12), min_size=len(SHAPES), max_size=len(SHAPES))


@given(ranks_of_layers, ranks_of_layers, st.sampled_from([1, 2, 8]), st.sampled_from([0.0, 0.5, 1.0]))
def test_plans_of_any_stable_ranks(now, initial, round_to, floor):
    plan = cf.make_plan(
        KERNELS,
        dict(zip(KERNELS, now, strict=True)),
        dict(zip(KERNELS, initial, strict=True)),
        rules=[cf.Rule("*")],
        round_to=round_to,
        min_rank_ratio=floor,
    )
    assert sorted([*plan.ranks, *plan.kept]) == sorted(KERNELS)
    for path, rank in plan.ranks.items():
        (m, n), full = SHAPES[int(path[1:])], KERNELS[path].max_rank
        assert max(1, floor * full) <= rank <= full and rank * (m + n) < m * n
        assert rank % round_to == 0 or rank == full
    assert (plan.num_params < plan.num_params_full) == bool(plan.ranks)
    assert cf.FactorizationPlan.from_json(plan.to_json()) == plan


@given(seeds, spectra, st.sampled_from([0.75, 0.85, 0.95]), st.sampled_from([1, 2]))
def test_plans_keep_their_budgets(seed, spectrum, share, round_to):
    params = as_params(matrices(seed, spectrum, 1.0, "float32"))
    ranks, values = cf.stable_ranks(params, KERNELS), cf.singular_values(params, KERNELS)
    plan = cf.make_plan(
        KERNELS,
        ranks,
        singular_values=values,
        budget=cf.Parameters(share),
        round_to=round_to,
        rules=[cf.Rule("*")],
    )
    assert plan.num_params / plan.num_params_full <= share
    assert plan.budget is not None and plan.budget.used <= share
    assert sorted([*plan.ranks, *plan.kept]) == sorted(KERNELS)


CRITERIA = [cf.RelativePlateau(), cf.ReferencePlateau.cifar(), cf.ReferencePlateau.deit(), cf.AtEpoch(3)]
histories = st.lists(
    st.tuples(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(1e-30, 1e30)), min_size=1, max_size=25
)


@given(histories, st.sampled_from(CRITERIA), st.integers(0, 24))
def test_a_tracker_says_of_any_history_the_same_after_a_restart(history, criterion, cut):
    tracker, other = cf.RankTracker(criterion), cf.RankTracker(criterion)
    seen: dict[str, int] = {}
    for index, (a, b, c) in enumerate(history):
        if index == cut:
            other = cf.RankTracker.from_state(criterion, json.loads(json.dumps(other.to_state())))
        measured = {"a": a, "stack": np.array([b, c])}
        assert tracker.update(measured) == other.update(measured) == tracker.converged
        # What was once stable stays so, from the same measurement on.
        assert seen.items() <= tracker.converged_at.items()
        seen = dict(tracker.converged_at)
        assert (tracker.switch_epoch is None) == (not tracker.converged)
    assert tracker.to_state() == other.to_state()
    assert all(0 <= at < len(history) for at in seen.values())
