"""The invariants for every layer x dtype x context, of both front ends.

Full rank is checked under pmap on eight devices, half rank under jit: each cell runs under both.
"""

import chex
import jax
import linen_table
import nnx_table
import numpy as np
import pytest
from layer_table import CONTEXTS, DTYPES, INPUTS, RANK, Table, distance

from cuttlefish_jax.kernels import subtree

FRONT_ENDS = {"linen": linen_table, "nnx": nnx_table}
PATHS = {"attention": {"query", "key", "value", "out"}, "general_batch": {"general"}}  # of a layer's kernels
GROUPS = {"general_batch": 2, "einsum_batch": 5}  # matrices in one copy
COMPUTED = [
    (front_end, context, dtype)
    for front_end, module in FRONT_ENDS.items()
    for context in CONTEXTS
    if context not in module.IMPOSSIBLE
    for dtype in DTYPES
]


@pytest.fixture(scope="module", params=COMPUTED, ids="-".join)
def table(request):
    """All that is compared, of one context and dtype: pytest runs the tests of each one after the other."""
    front_end, context, dtype = request.param
    return Table(FRONT_ENDS[front_end], context, dtype)


each_layer = pytest.mark.parametrize("name", INPUTS)


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def test_all_layers_are_there():
    for module in FRONT_ENDS.values():
        assert module.LAYERS.keys() == INPUTS.keys()
        assert all(module.IMPOSSIBLE.values())


@each_layer
def test_its_kernels_are_found(table, name):
    kernels = table.kernels_of(name)
    assert kernels.keys() == PATHS.get(name, {""})
    for kernel in kernels.values():
        assert kernel.max_rank == 2 * RANK
        assert np.prod(kernel.stack_shape) == table.context.copies * GROUPS.get(name, 1)


@each_layer
def test_full_rank_keeps_the_function(table, name):
    assert table.kept[name].dtype == table.dtype
    assert distance(table.kept[name], table.expected(name)) < table.tolerance


@each_layer
def test_a_truncated_plan_is_the_layer_with_the_best_kernels_of_that_rank(table, name):
    best = table.best(name)
    assert table.truncated[name].dtype == table.dtype
    assert distance(table.truncated[name], table.expected(name, best)) < table.tolerance
    assert distance(table.truncated[name], table.expected(name)) > 4 * table.tolerance  # it is cut off
    for path, kernel in table.kernels_of(name).items():
        factors = subtree(table.layer(table.factors, name), path)
        u, v = (
            np.asarray(half.to_matrix(factors[key][half.param]), np.float64)
            for key, half in zip("uv", kernel.factors(RANK), strict=True)
        )
        assert distance(u @ v, kernel.to_matrix(subtree(best, path)[kernel.param])) < table.tolerance


@each_layer
def test_merging_gives_the_original_back(table, name):
    merged, params = table.layer(table.merged, name), table.layer(table.params, name)
    assert shapes(merged) == shapes(params)
    assert distance(table.expected(name, merged), table.expected(name)) < table.tolerance
    for path, kernel in table.kernels_of(name).items():
        layer, original = dict(subtree(merged, path)), dict(subtree(params, path))
        assert distance(layer.pop(kernel.param), original.pop(kernel.param)) < table.tolerance
        chex.assert_trees_all_equal(layer, original)


@each_layer
def test_the_factorized_model_has_the_tree_of_factorize_params(table, name):
    assert shapes(table.layer(table.made, name)) == shapes(table.layer(table.factors, name))
