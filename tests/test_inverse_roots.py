"""Inverse square roots by products against the eigenvalues of float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cuttlefish_jax.inverse_roots import inverse_roots


def gram(size, condition, *, scale=1.0, seed=0):
    """Symmetric, with eigenvalues that fall evenly, on a logarithmic scale."""
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]
    return scale * (basis * np.geomspace(1, 1 / condition, size)) @ basis.T


def expected(matrix, damping):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * (values + damping * values.mean()) ** -0.5) @ vectors.T


@pytest.mark.parametrize("damping", [1e-1, 1e-3])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_roots_of_many_sizes_in_one_call(damping, scale):
    grams = [gram(size, 1e4, scale=scale, seed=size) for size in (1, 2, 3, 5, 12, 13, 40, 64, 70)]
    found = jax.jit(lambda grams: inverse_roots(grams, damping=damping))(
        [jnp.asarray(matrix, jnp.float32) for matrix in grams]
    )
    for matrix, root in zip(grams, found, strict=True):
        wanted = expected(matrix, damping)
        assert root.shape == matrix.shape and root.dtype == jnp.float32
        assert np.linalg.norm(root - wanted) <= 2e-3 * np.linalg.norm(wanted)


@pytest.mark.parametrize("size", [4, 30])
def test_without_damping_it_is_as_exact_as_float64_can_be(size):
    matrix = gram(size, 1e5)
    with jax.enable_x64(True):
        (root,) = inverse_roots([jnp.asarray(matrix)], damping=0.0)
    wanted = expected(matrix, 0.0)
    np.testing.assert_allclose(root, wanted, atol=1e-8 * np.linalg.norm(wanted))


def test_stacks_of_any_shape_are_matrix_by_matrix_what_they_are_alone():
    stack = np.stack([gram(6, 100, seed=seed, scale=10.0**seed) for seed in range(6)]).reshape(2, 3, 6, 6)
    both = inverse_roots([jnp.asarray(stack, jnp.float32), jnp.eye(5)], damping=1e-2)
    assert both[0].shape == (2, 3, 6, 6) and both[1].shape == (5, 5)
    for index in np.ndindex(2, 3):
        wanted = expected(stack[index], 1e-2)
        np.testing.assert_allclose(both[0][index], wanted, atol=1e-4 * np.linalg.norm(wanted))
    np.testing.assert_allclose(both[1], np.eye(5) / np.sqrt(1.01), atol=1e-5)


@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_matrices_without_full_rank_have_finite_roots(damping):
    ones, zeros = jnp.ones((7, 7)), jnp.zeros((7, 7))
    of_ones, of_zeros = inverse_roots([ones, zeros], damping=damping)
    assert np.isfinite(of_ones).all() and np.isfinite(of_zeros).all()
    if damping:
        wanted = expected(np.ones((7, 7)), damping)
        assert np.linalg.norm(of_ones - wanted) <= 5e-3 * np.linalg.norm(wanted)
