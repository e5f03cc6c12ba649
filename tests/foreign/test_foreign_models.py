"""The transform on networks that other people wrote and published; each is skipped where it is not installed.

    pip install -e '.[foreign]'

has those that install beside any jax that this package supports, benchmarks/foreign_models.py says how to get
the others. Their warnings are theirs.
"""

import functools
import sys
import zlib
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import cuttlefish_jax as cf
from cuttlefish_jax.layer_types import LAYER_TYPES

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from coverage import measure
from foreign_models import MODELS

pytestmark = pytest.mark.filterwarnings("ignore")
BY_NAME = {model.name: model for model in MODELS}
# Compiling these takes long.
LARGE = {"ResNet-18", "ResNeXt-50", "MLP-Mixer", "GPT-3", "diffusion U-Net"}

# Shares of the parameters and of the forward FLOPs in kernels, and the reasons why other layers are skipped.
COVERED = {
    "ResNet-18": (0.98, 0.99, set()),
    "ResNeXt-50": (0.94, 0.98, {"grouped convolution (32 groups)"}),
    "ViT": (0.93, 0.89, {"an embedding: find_kernels(..., include_embeddings=True) finds it"}),
    "MLP-Mixer": (0.90, 0.99, {"an embedding: find_kernels(..., include_embeddings=True) finds it"}),
    "GPT-3": (0.96, 0.96, {"an embedding: find_kernels(..., include_embeddings=True) finds it"}),
    "diffusion U-Net": (0.98, 0.99, set()),
    "Mamba-2 130M": (
        0.81,
        0.67,
        {"grouped convolution (80 groups)", "its embedding is read outside of its calls"},
    ),
    "GAT": (0.92, 0.99, {"not a kernel, but a parameter of GATConv"}),
    "Qwen3 0.6B": (
        0.54,
        0.54,
        {"not a kernel, but a parameter of Einsum", "not a kernel, but a parameter of Embedder"},
    ),
    "Qwen3 0.6B, its Einsum registered": (0.90, 0.90, {"not a kernel, but a parameter of Embedder"}),
}


@pytest.fixture(autouse=True)
def registered(request):
    """The layers that a network's users have to register, for the time of a test; or it is skipped."""
    foreign = BY_NAME[request.node.callspec.params["name"]]
    if foreign.version is None:
        pytest.skip(f"{foreign.package} is not installed")
    try:
        nnx.eval_shape(lambda: foreign.build(True, nnx.Rngs(0)) and None)
        layer_types = foreign.layer_types()
    except ModuleNotFoundError as error:
        pytest.skip(f"{foreign.package} lacks {error.name}")
    for layer_class, layer_type in layer_types.items():
        cf.register_layer(layer_class, layer_type)
    yield
    for layer_class in layer_types:
        del LAYER_TYPES[layer_class]


def random_values(keys, leaf):
    """What an initialiser might give: to compile all of a model's takes longer than to run it."""
    name, rng = keys[-1].key, np.random.default_rng(zlib.crc32(jax.tree_util.keystr(keys).encode()))
    if len(leaf.shape) < 2:
        return jnp.full(leaf.shape, float(name in ("scale", "var")), leaf.dtype)
    return jnp.asarray(rng.standard_normal(leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1])), leaf.dtype)


@functools.cache
def prepared(name):
    """The model, its kernels, its state as params and the rest, and ``forward(model, params, rest)``."""
    foreign = BY_NAME[name]
    model, inputs = foreign.build(True, nnx.Rngs(0)), foreign.inputs(True)
    kernels = cf.find_kernels(model, *inputs)
    if foreign.front_end == "NNX":
        _, params, rest = nnx.split(model, nnx.Param, ...)

        def forward(model, params, rest):
            graphdef = nnx.graphdef(model)
            return jax.tree.leaves(nnx.merge(graphdef, params, rest)(*inputs))[0]
    else:
        shapes = jax.eval_shape(lambda *x: model.init(jax.random.key(0), *x), *inputs)
        variables = jax.tree_util.tree_map_with_path(random_values, shapes)
        params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}

        def forward(model, params, rest):
            return jax.tree.leaves(model.apply({**rest, "params": params}, *inputs))[0]

    return model, kernels, params, rest, forward


def at_ratio(kernels, ratio):
    """A plan of every kernel."""
    ranks = {path: max(1, int(ratio * kernel.max_rank)) for path, kernel in kernels.items()}
    return cf.FactorizationPlan.from_ranks(kernels, ranks)


NAMES = [pytest.param(name, marks=pytest.mark.large if name in LARGE else ()) for name in COVERED]


@functools.cache
def results(name):
    """All that the tests compare, from one compiled function."""
    model, kernels, params, rest, forward = prepared(name)
    full, half = at_ratio(kernels, 1.0), at_ratio(kernels, 0.5)
    full_model, half_model = (
        nnx.eval_shape(lambda plan=plan: cf.factorize(model, plan))
        if isinstance(model, nnx.Module)
        else cf.factorize(model, plan)
        for plan in (full, half)
    )

    def run(params, rest):
        low = cf.factorize_params(params, full)
        start = cf.factorize_params(params, half)
        tx = optax.sgd(1e-3)

        def loss(low):
            return jnp.mean(jnp.square(forward(half_model, low, rest).astype(jnp.float32)))

        before, gradients = jax.value_and_grad(loss)(start)
        scaled = jax.tree.map(lambda g: g / optax.global_norm(gradients), gradients)
        trained = optax.apply_updates(start, tx.update(scaled, tx.init(start))[0])
        return {
            "outputs": (forward(full_model, low, rest), forward(model, params, rest)),
            "merged": cf.merge_params(low, full),
            "losses": (before, loss(trained)),
            "gradients": gradients,
        }

    compiled = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
    return jax.device_get(compiled(params, rest))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_covered_and_why_the_rest_is_not(name):
    kernels = prepared(name)[1]
    found = measure(BY_NAME[name], small=True)
    parameters, flops, reasons = COVERED[name]
    assert parameters <= found.parameters <= 1 and flops <= found.flops <= 1
    assert set(found.skipped.values()) == reasons
    assert found.kernels == len(kernels) and found.skipped == kernels.skipped


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_of_full_rank_leaves_the_output_unchanged(name):
    actual, expected = (np.asarray(output, np.float64) for output in results(name)["outputs"])
    assert np.max(np.abs(actual - expected)) < 1e-4 * np.max(np.abs(expected))


@pytest.mark.parametrize("name", NAMES)
def test_a_truncated_plan_trains(name):
    before, after = results(name)["losses"]
    assert np.isfinite(before) and after < before
    _, kernels, params, _, _ = prepared(name)
    plan, gradients = at_ratio(kernels, 0.5), results(name)["gradients"]
    sizes = jax.tree.map(np.size, jax.eval_shape(lambda p: cf.factorize_params(p, plan), params))
    assert sum(jax.tree.leaves(sizes)) == plan.num_params
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("name", NAMES)
def test_merging_gives_the_original_back(name):
    params, merged = prepared(name)[2], results(name)["merged"]
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, params)
    chex.assert_trees_all_close(merged, params, rtol=1e-4, atol=1e-5)
