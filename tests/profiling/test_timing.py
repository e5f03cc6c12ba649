"""Profiling: what is timed, how often, and what is made of it. No test looks at how long it took."""

import collections
import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linen_modules import Branch
from linen_zoo import CASES, prepared

import cuttlefish_jax as cf
from cuttlefish_jax.layer_types import LAYER_TYPES
from cuttlefish_jax.models import create_model
from cuttlefish_jax.profiling import timing
from cuttlefish_jax.profiling.timing import as_function, forward_and_backward, layer_calls

IMAGES = jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.float32)


def calls_of(model, *inputs, **kwargs):
    return layer_calls(model, cf.find_kernels(model, *inputs, **kwargs), inputs, kwargs)


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.fixture
def measured(monkeypatch):
    """Instead of measuring, notes what would be, and says how long it takes by its FLOPs: 1 s for each."""
    seen = []

    class Prepared(tuple):
        """No runs, and nothing to compile."""

    def prepare(call, rank, device):
        prepared = Prepared()
        prepared.asked = call, rank, device
        return prepared

    def measure(prepared, repeats):
        call, rank, device = prepared.asked
        seen.append((call, rank, device, repeats))
        kernel = call.find()[""]
        batch = call.input.shape[0]
        return float(batch * kernel.flops()), float(batch * kernel.flops(rank))

    monkeypatch.setattr(timing, "_prepare", prepare)
    monkeypatch.setattr(timing, "_measure", measure)
    monkeypatch.setattr("cuttlefish_jax.profiling.kernel_profile._DAY", float("inf"))
    return seen


# --- What is seen of a model --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_layers_of_a_model_have_its_flops(name):
    model, inputs, _, kernels = prepared(name)
    calls = layer_calls(model, kernels, inputs, CASES[name].kwargs)
    assert [*dict.fromkeys(call.path for call in calls)] == list(kernels)
    flops = collections.Counter()
    for call in calls:
        apply, params = call.as_function(call.layer)
        flops[call.path] += call.count * cf.count_flops(apply, params, call.input)
    # Counted in another way: from the positions of a kernel, for one example.
    assert flops == {path: len(inputs[0]) * kernel.flops() for path, kernel in kernels.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_layer_by_itself_has_the_kernel_of_one_copy(name):
    model, inputs, _, kernels = prepared(name)
    for call in layer_calls(model, kernels, inputs, CASES[name].kwargs):
        (alone,) = call.find().values()
        kernel = kernels[call.path]
        assert (alone.path, alone.layer) == ("", kernel.layer)
        # Of the stack, only the layer's own batch axes are left.
        batch = LAYER_TYPES[type(call.layer)].axes(call.layer).batch
        assert alone.stack_axes == batch
        assert (alone.m, alone.n) == (kernel.m, kernel.n)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("attention", {"query": [((2, 5, 8), 1)], "key": [((2, 5, 8), 1)], "value": [((2, 5, 8), 1)],
                       "out": [((2, 5, 2, 4), 1)]}),
        ("setup_shared", {"encode_layer": [((2, 5), 1)], "shared": [((2, 6), 1)] * 2, "out": [((2, 6), 1)]}),
        ("scan", {"stem": [((2, 4, 5), 1)], "blocks/Block_0/up": [((2, 4, 6), 3)],
                  "blocks/Block_0/down": [((2, 4, 8), 3)], "head": [((2, 4, 6), 1)]}),
        ("vmap", {"members/up": [((2, 4, 6), 2)], "members/down": [((2, 4, 8), 2)]}),
        ("over_batch", {"mapped/up": [((4, 6), 2)], "mapped/down": [((4, 8), 2)]}),
        ("rnn", {"SimpleCell_0/i": [((2, 3), 5)], "SimpleCell_0/h": [((2, 4), 5)]}),
        ("trained", {"conv": [((2, 6, 6, 3), 1)], "conv_1": [((2, 6, 6, 4), 1)], "head": [((2, 6), 1)]}),
    ],
)  # fmt: skip
def test_inputs_and_counts(name, expected):
    model, inputs, _, kernels = prepared(name)
    seen = collections.defaultdict(list)
    for call in layer_calls(model, kernels, inputs, CASES[name].kwargs):
        seen[call.path].append((call.input.shape, call.count))
    assert seen == expected


def test_an_input_has_the_dtype_in_which_it_arrives():
    model = nn.Sequential([nn.Dense(4, dtype=jnp.bfloat16), nn.Dense(4)])
    assert [str(call.input.dtype) for call in calls_of(model, shape(2, 3))] == ["float32", "bfloat16"]


def test_nothing_is_computed_to_see_the_layers():
    model = nn.Sequential([nn.Dense(10**6), nn.Dense(10**6)])
    calls = calls_of(model, shape(10**6, 10**6))
    assert [call.input.shape for call in calls] == [(10**6, 10**6)] * 2
    assert calls[0] == calls[1]


def test_a_layer_in_the_cheaper_branch_counts_as_one_call():
    counts = collections.Counter()
    for call in calls_of(Branch(), shape(2, 6)):
        counts[call.path] += call.count
    assert counts["small"] >= 1
    assert counts["large_1"] >= 1


# --- What is timed ------------------------------------------------------------------------------------------


def test_a_timed_layer_computes_its_output_and_all_gradients():
    apply, params = as_function(nn.Dense(3), shape(5, 4))
    rng = np.random.default_rng(0)
    w, b, x, c = (rng.standard_normal(s).astype(np.float32) for s in ((4, 3), (3,), (5, 4), (5, 3)))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == {"kernel": (4, 3), "bias": (3,)}
    y, (grads, grad_x) = jax.jit(forward_and_backward(apply))({"kernel": w, "bias": b}, x, c)
    w, b, x, c = (a.astype(np.float64) for a in (w, b, x, c))
    np.testing.assert_allclose(y, x @ w + b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads["kernel"], x.T @ c, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads["bias"], c.sum(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grad_x, c @ w.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Dense(6), shape(2, 4, 8)),
        (nn.DenseGeneral((2, 4)), shape(2, 5, 6)),
        (nn.Conv(6, (3, 3), padding="VALID"), shape(2, 9, 9, 4)),
    ],
)
def test_forward_and_backward_are_three_times_the_flops(layer, x):
    kernel = cf.find_kernels(layer, x)[""]
    plan = cf.FactorizationPlan.from_ranks(cf.find_kernels(layer, x), {"": 2})
    for model, rank in ((layer, None), (cf.factorize(layer, plan), 2)):
        apply, params = as_function(model, x)
        step, output = forward_and_backward(apply), jax.eval_shape(apply, params, x)
        compiled = jax.jit(step).lower(params, x, output).compile()
        assert cf.count_flops(apply, params, x) == 2 * kernel.flops(rank)
        assert cf.count_flops(step, params, x, output) >= 3 * 2 * kernel.flops(rank)
        # XLA leaves none of it out, either: a convolution's products with padding are not in its count.
        assert compiled.cost_analysis()["flops"] >= 0.9 * 3 * 2 * kernel.flops(rank)


def test_integers_have_no_gradient():
    x = shape(2, 4, dtype=jnp.int32)
    apply, params = as_function(nn.Dense(3), x)
    _, gradients = jax.eval_shape(forward_and_backward(apply), params, x, shape(2, 3))
    assert jax.tree.map(lambda leaf: leaf.shape, gradients) == ({"kernel": (4, 3), "bias": (3,)},)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_run_keeps_to_its_device_and_dtype(dtype):
    device, x = jax.local_devices()[3], shape(2, 4, dtype=dtype)
    run = timing._Run(*as_function(nn.Dense(3, dtype=dtype), x), x, device)
    run.compile()
    with run.arguments():
        assert run.seconds(3) > 0  # the output is the next call's cotangent: it has to be of its kind
        leaves = jax.tree.leaves(run._arrays)
        assert len(leaves) == 4
        assert all(leaf.devices() == {device} for leaf in leaves)
        output, _ = run._step(*run._arrays)
        assert output.devices() == {device}
        assert output.dtype == dtype
        # Neither zero nor large: overflow and denormal numbers have times of their own.
        assert all(0 < jnp.abs(leaf.astype(jnp.float32)).max() < 1 for leaf in leaves)
    assert not run._arrays


class FakeRun:
    """Takes the times that it is given, and notes what is asked of it."""

    def __init__(self, name, asked, times):
        self.name, self.asked, self.times = name, asked, iter(times)

    @contextlib.contextmanager
    def arguments(self):
        self.asked.append((self.name, "arguments"))
        yield
        self.asked.append((self.name, "done"))

    def seconds(self, calls):
        self.asked.append((self.name, calls))
        return next(self.times)


def test_timings_alternate_and_their_median_counts():
    asked = []
    full, low = FakeRun("full", asked, [99, 0.004, 8, 2, 3]), FakeRun("low", asked, [99, 0.002, 1, 5, 1.5])
    assert timing._measure((full, low), 3) == (3, 1.5)
    # One call to warm up, one to see how many in a row make a timing long enough.
    assert asked == [
        ("full", "arguments"), ("full", 1), ("low", "arguments"), ("low", 1), ("full", 1), ("low", 1),
        *[("full", 3), ("low", 3)] * 3,
        ("low", "done"), ("full", "done"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "calls", "repeats"),
    [(1e-6, 100, 40), (1e-3, 5, 40), (0.01, 1, 25), (0.04, 1, 6), (0.2, 1, 5), (30.0, 1, 5)],
)
def test_long_calls_are_timed_less_often(seconds, calls, repeats):
    asked = []
    runs = [FakeRun(name, asked, [seconds] * 99) for name in ("full", "low")]
    assert timing._measure(runs, 40) == (seconds, seconds)
    assert asked[6:-2] == [("full", calls), ("low", calls)] * repeats
    asked.clear()
    timing._measure([FakeRun(name, asked, [seconds] * 99) for name in ("full", "low")], 2)
    assert asked[6:-2] == [("full", calls), ("low", calls)] * 2


def test_the_two_runs_of_a_layer():
    (call,) = calls_of(nn.Dense(6), shape(4, 8))
    shapes = [
        jax.tree.map(lambda leaf: leaf.shape, run._shapes)
        for run in timing._prepare(call, 2, jax.local_devices()[0])
    ]
    assert shapes == [
        ({"kernel": (8, 6), "bias": (6,)}, (4, 8), (4, 6)),
        ({"u": {"kernel": (8, 2)}, "v": {"kernel": (2, 6), "bias": (6,)}}, (4, 8), (4, 6)),
    ]


# --- The measurements of a model ----------------------------------------------------------------------------


def test_each_distinct_layer_of_a_resnet_is_measured_once(measured):
    model = create_model("resnet18", num_classes=10, width=8)
    said = []
    profile = cf.profile_kernels(
        model, IMAGES, train=False, repeats=7, progress=lambda *args: said.append(args)
    )
    assert len(profile) == 21
    assert [call.path for call, *_ in measured] == [
        "stem_conv", "stage1/block1/conv1",
        *(f"stage{i}/block1/{name}" for i in (2, 3, 4) for name in ("conv1", "conv2", "shortcut_conv")),
        "classifier",
    ]  # fmt: skip
    assert {(device, repeats) for _, _, device, repeats in measured} == {(jax.local_devices()[0], 7)}
    assert [number for number, _, _ in said] == list(range(13))
    assert {total for _, total, _ in said} == {12}
    assert said[0][2] == "compiling"
    assert said[3][2] == "stage2/block1/conv1: Conv 3x3x8x16 on 4x8x8x8 float32"
    assert profile["stage2/block1/conv2"] == profile["stage2/block2/conv1"]
    # The profile's seconds are the fixture's: the FLOPs of the whole batch.
    kernels = cf.find_kernels(model, IMAGES, train=False)
    for path, kernel in kernels.items():
        rank = max(1, kernel.max_rank // 4)
        assert profile.seconds(path) == (4 * kernel.flops(), 4 * kernel.flops(rank))
    assert profile.ratio == 0.25
    assert profile.device == jax.local_devices()[0].device_kind
    profile.check(kernels)


# What nn.vmap maps over the batch has inputs without a batch axis, by which the fixture multiplies; tables
# that are only looked up have no FLOPs.
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("over_batch", "tokens_embedded")])
def test_the_time_of_a_kernel_is_that_of_all_its_calls(measured, name):
    model, inputs, _, kernels = prepared(name)
    case = CASES[name]
    options = dict(include_embeddings=bool(case.lookups), **case.kwargs)
    profile = cf.profile_kernels(model, *inputs, ratio=0.5, **options)
    assert list(profile) == list(kernels)
    for path, kernel in kernels.items():
        rank = max(1, kernel.max_rank // 2)
        flops = len(inputs[0]) * kernel.flops(), len(inputs[0]) * kernel.flops(rank)
        assert profile.seconds(path) == flops


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ({"kernel_init": nn.initializers.normal(0.1), "bias_init": nn.initializers.ones_init()}, 1),
        ({"name": "another"}, 1),
        ({"features": 4}, 2),
        ({"kernel_size": (1, 1)}, 2),
        ({"kernel_dilation": 2}, 2),
        ({"use_bias": False}, 2),
        ({"dtype": jnp.bfloat16}, 2),
        ({"param_dtype": jnp.bfloat16}, 2),
        ({"precision": "highest"}, 2),
        ({"padding": "CIRCULAR"}, 2),
    ],
)
def test_only_equal_layers_share_a_measurement(measured, options, number):
    conv = functools.partial(nn.Conv, features=8, kernel_size=(3, 3))
    profile = cf.profile_kernels(nn.Sequential([conv(), conv(), conv(**options)]), shape(2, 6, 6, 8))
    assert (len(profile), len(measured)) == (3, number)


def test_only_equal_inputs_share_a_measurement(measured):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = functools.partial(nn.Dense, 4, dtype=jnp.float32)
            inputs = x, x + 1, x.astype(jnp.bfloat16), x[:1]
            return [dense(name=f"layer{i}")(y) for i, y in enumerate(inputs)]

    profile = cf.profile_kernels(Model(), shape(2, 4))
    assert [call.path for call, *_ in measured] == ["layer0", "layer2", "layer3"]
    assert [timing.input_dtype for timing in profile.timings] == ["float32", "float32", "bfloat16", "float32"]


def test_chosen_paths_only(measured):
    model = nn.Sequential([nn.Dense(8), nn.Dense(9), nn.Dense(9)])
    profile = cf.profile_kernels(model, shape(2, 8), paths=["layers_2", "layers_0"])
    assert list(profile) == ["layers_0", "layers_2"]
    assert [call.path for call, *_ in measured] == ["layers_0", "layers_2"]
    # A stack is found among all layers, and has the time of those that were profiled.
    assert profile.stack_of("layers_2") == "layers_2"


@pytest.mark.parametrize(("ratio", "rank"), [(1, 6), (0.5, 3), (0.49, 2), (1e-9, 1)])
def test_rank(measured, ratio, rank):
    profile = cf.profile_kernels(nn.Dense(6), shape(2, 8), ratio=ratio)
    assert [rank for _, rank, *_ in measured] == [rank]
    assert profile.timings[0].rank == rank


def test_a_real_measurement():
    model = nn.Sequential([nn.Conv(8, (3, 3)), nn.relu, nn.Conv(8, (3, 3)), nn.Conv(8, (3, 3))])
    said = []
    profile = cf.profile_kernels(
        model,
        jnp.ones((2, 6, 6, 3)),
        repeats=2,
        device=jax.local_devices()[1],
        progress=lambda *args: said.append(args),
    )
    assert [number for number, _, _ in said] == [0, 1, 2]
    assert list(profile) == ["layers_0", "layers_2", "layers_3"]
    assert all(0 < second < 10 for path in profile for second in profile.seconds(path))
    assert profile.seconds("layers_2") == profile.seconds("layers_3")
    assert cf.KernelProfile.from_json(profile.to_json()) == profile


# --- Bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0, -0.5, 1.01, float("nan"), float("inf")])
def test_a_ratio_out_of_bounds(ratio):
    with pytest.raises(ValueError, match=r"^ratio .* is not in \(0, 1\]$"):
        cf.profile_kernels(nn.Dense(6), shape(2, 8), ratio=ratio)


def test_no_repeats():
    with pytest.raises(ValueError, match=r"^repeats 0 is below 1$"):
        cf.profile_kernels(nn.Dense(6), shape(2, 8), repeats=0)


def test_a_model_without_kernels():
    with pytest.raises(
        ValueError, match=r"^the model has no kernel that can be factorized: there is nothing to"
    ):
        cf.profile_kernels(nn.LayerNorm(), shape(2, 8))


def test_a_path_that_is_no_kernel():
    with pytest.raises(ValueError, match=r"^path 'layer_1' matches no layer; near it: layers_1, layers_0$"):
        cf.profile_kernels(nn.Sequential([nn.Dense(6), nn.Dense(6)]), shape(2, 8), paths=["layer_1"])


@pytest.mark.parametrize("model", [3, functools.partial(print), jnp.dot])
def test_not_a_module(model):
    with pytest.raises(TypeError, match=r"needs a Flax module, got \w+$"):
        cf.profile_kernels(model, shape(2, 8))
    for function in (layer_calls, as_function):
        with pytest.raises(TypeError, match=r"^profile_kernels needs a Flax module, got \w+$"):
            function(model, *[shape(2, 8)] * (3 if function is layer_calls else 1))
