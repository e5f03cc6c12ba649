"""Many matrices in one program."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cuttlefish_jax.matrices import map_matrices

DECOMPOSE = """
import jax
import cuttlefish_jax as cf
from cuttlefish_jax.kernels import Kernel

shapes = {f"l{i}": (200, 64 + 8 * (i // 3)) for i in range(30)}
axes = dict(layer="Dense", reduction_axes=(0,), output_axes=(1,))
kernels = cf.Kernels(tuple(Kernel(path=path, shape=shape, **axes) for path, shape in shapes.items()))
params = {p: {"kernel": jax.random.normal(jax.random.key(0), shape)} for p, shape in shapes.items()}
plan = cf.FactorizationPlan.from_ranks(kernels, dict.fromkeys(kernels, 8))
for _ in range(10):
    jax.block_until_ready(cf.factorize_params(params, plan))
    jax.block_until_ready(cf.stable_ranks(params, kernels, method="exact"))
"""


def test_every_matrix_gets_its_own_result_in_its_own_shape():
    rng = np.random.default_rng(0)
    shapes = [(3, 2), (2, 3, 2), (4, 5), (3, 2), (2, 1, 4, 5)]
    matrices = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    results = jax.jit(lambda ms: map_matrices(lambda m: {"row": m.sum(0), "trace": jnp.trace(m)}, ms))(
        matrices
    )
    for matrix, result in zip(matrices, results, strict=True):
        np.testing.assert_allclose(result["row"], matrix.sum(-2), rtol=1e-5)
        np.testing.assert_allclose(result["trace"], np.trace(matrix, axis1=-2, axis2=-1), rtol=1e-5)


def test_what_is_not_finite_stays_with_its_matrix():
    matrices = [jnp.full((2, 2), jnp.inf), jnp.full((3, 3), jnp.nan), jnp.ones((4, 4))]
    assert [float(x) for x in map_matrices(jnp.max, matrices)][::2] == [np.inf, 1]


@pytest.mark.large
def test_one_program_does_not_wait_for_itself():
    """Ten batches of decompositions side by side would stop jaxlib 0.10 for ever on two cores."""
    subprocess.run([sys.executable, "-c", DECOMPOSE], check=True, timeout=300)
