"""Kernel profiles: what is made of hand-made times, and documents that are no profiles."""

import dataclasses
import json
import math

import flax.linen as nn
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cuttlefish_jax as cf
from cuttlefish_jax.profiling.kernel_profile import KernelTiming


def timing(path, stack, full, factorized, **options):
    fields = dict(layer="Dense", shape=(32, 16), rank=4, input_shape=(8, 32), input_dtype="float32", calls=1)
    times = dict(full_seconds=full, factorized_seconds=factorized)
    return KernelTiming(path=path, stack=stack, **{**fields, **times, **options})


TIMINGS = (
    timing("stem", "stem", 0.002, 0.004),
    timing("block1/fc", "block", 0.012, 0.004, calls=3),
    timing("block2/fc", "block", 0.009, 0.003, input_dtype="bfloat16"),
    timing("block2/out", "block", 0.007, 0.007, layer="Conv", shape=(3, 3, 4, 8), input_shape=(2, 6, 6, 4)),
)
PROFILE = cf.KernelProfile(timings=TIMINGS, ratio=0.25, device="abacus")
DOCUMENT = json.loads(PROFILE.to_json())


def test_a_mapping_of_kernels_that_knows_stacks():
    assert list(PROFILE) == ["stem", "block1/fc", "block2/fc", "block2/out"]
    assert len(PROFILE) == 4
    assert dict(PROFILE) == pytest.approx(
        {"stem": 0.5, "block1/fc": 3.0, "block2/fc": 3.0, "block2/out": 1.0}
    )
    assert PROFILE.stacks == pytest.approx({"stem": 0.5, "block": 2.0})
    assert PROFILE["block"] == pytest.approx(2.0)
    assert PROFILE.stack_of("block2/out") == "block"
    assert PROFILE.seconds("block1/fc") == (0.012, 0.004)
    assert PROFILE.seconds("block") == pytest.approx((0.028, 0.014))
    assert "block" in PROFILE
    assert "block1" not in PROFILE
    assert hash(PROFILE) == hash(dataclasses.replace(PROFILE))
    for ask in (PROFILE.__getitem__, PROFILE.seconds, PROFILE.stack_of):
        with pytest.raises(KeyError, match="block1"):
            ask("block1")


@pytest.mark.parametrize(
    ("rank", "seconds", "speedup"), [(1, 0.004, 3.0), (4, 0.004, 3.0), (6, 0.006, 2.0), (16, 0.016, 0.75)]
)
def test_predictions(rank, seconds, speedup):
    assert PROFILE.predicted_seconds("block1/fc", rank) == pytest.approx(seconds)
    assert PROFILE.predicted_speedup("block1/fc", rank) == pytest.approx(speedup)


def test_predictions_are_for_kernels_and_ranks():
    with pytest.raises(KeyError, match="block"):
        PROFILE.predicted_speedup("block", 4)
    with pytest.raises(ValueError, match=r"^rank 0 for 'stem' is below 1$"):
        PROFILE.predicted_speedup("stem", 0)


def test_report():
    assert (
        PROFILE.report()
        == """\
layer       stack  kernel   input                 rank  full ms  factorized ms  speed-up
----------  -----  -------  --------------------  ----  -------  -------------  --------
stem        stem   32x16    8x32 float32             4    2.000          4.000     0.50x
block1/fc   block  32x16    3 times 8x32 float32     4   12.000          4.000     3.00x
block2/fc   block  32x16    8x32 bfloat16            4    9.000          3.000     3.00x
block2/out  block  3x3x4x8  2x6x6x4 float32          4    7.000          7.000     1.00x

stack  layers  full ms  factorized ms  speed-up
-----  ------  -------  -------------  --------
stem        1    2.000          4.000     0.50x
block       3   28.000         14.000     2.00x

forward and backward in one training step, at 0.25 of the full rank, on abacus"""
    )


def test_report_of_a_model_that_is_one_layer():
    profile = cf.KernelProfile(timings=(timing("", "", 2.0, 1.0),), ratio=0.5, device="abacus")
    assert profile[""] == 2.0
    assert profile.report().count("(root)") == 3


def test_check():
    kernels = cf.find_kernels(nn.Sequential([nn.Dense(16)]), jnp.ones((1, 32)))
    own = timing("layers_0", "layers_0", 2.0, 1.0)
    for mine, message in [
        (own, None),
        (dataclasses.replace(own, shape=(9, 9)), "kernel 'layers_0' has shape (9, 9), this one's (32, 16)"),
        (dataclasses.replace(own, path="layers_1"), "this one has no kernel 'layers_1'"),
    ]:  # fmt: skip
        profile = cf.KernelProfile(timings=(mine,), ratio=0.5, device="abacus")
        if message is None:
            profile.check(kernels)
            continue
        with pytest.raises(ValueError, match=r"^the profile is of another model: ") as caught:
            profile.check(kernels)
        assert str(caught.value).endswith(message)


# --- JSON ---------------------------------------------------------------------------------------------------


def refusal(text):
    """What from_json says of a text that is no profile: one line, never another type of exception."""
    with pytest.raises(ValueError, match=r"^not a kernel profile: ") as caught:
        cf.KernelProfile.from_json(text)
    assert type(caught.value) is ValueError
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def edited(path, value):
    """DOCUMENT with ``value`` at ``path``; ``path`` is its keys and indices."""
    document = json.loads(json.dumps(DOCUMENT))
    node = document
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return json.dumps(document)


names = st.text(max_size=6)
sizes = st.lists(st.integers(1, 99), max_size=4).map(tuple)
seconds = st.floats(1e-9, 1e3)


def test_round_trip():
    read = cf.KernelProfile.from_json(PROFILE.to_json())
    assert read == PROFILE
    assert hash(read) == hash(PROFILE)
    assert (read.report(), read.to_json()) == (PROFILE.report(), PROFILE.to_json())


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(names, names, names, sizes, sizes, seconds, seconds), max_size=4), st.floats(0.01, 1)
)
def test_round_trip_of_any_names_and_numbers(layers, ratio):
    paths = {f"{number}/{path}": fields for number, (path, *fields) in enumerate(layers)}
    timings = tuple(
        timing(path, stack, full, factorized, layer=layer, shape=shape, input_shape=x)
        for path, (stack, layer, shape, x, full, factorized) in paths.items()
        if stack not in paths
    )
    profile = cf.KernelProfile(timings=timings, ratio=ratio, device="abacus")
    assert cf.KernelProfile.from_json(profile.to_json()) == profile
    assert profile.report()


@pytest.mark.parametrize("key", sorted(DOCUMENT))
@pytest.mark.parametrize("value", [None, -1, [[[]]], {"x": {}}, True])
def test_wrong_types_and_missing_keys(key, value):
    refusal(edited((key,), value))
    missing = {other: DOCUMENT[other] for other in DOCUMENT if other != key}
    assert f"there is no {key!r}" in refusal(json.dumps(missing))


@pytest.mark.parametrize("key", sorted(DOCUMENT["kernels"][0]))
@pytest.mark.parametrize("value", [None, [True], [None], [1.5], {}, False])
def test_wrong_types_and_missing_keys_in_a_kernel(key, value):
    assert f"{key!r} is " in refusal(edited(("kernels", 0, key), value))
    missing = {other: DOCUMENT["kernels"][0][other] for other in DOCUMENT["kernels"][0] if other != key}
    assert f"there is no {key!r}" in refusal(edited(("kernels", 0), missing))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), 2, "its format 2 is not 1"),
        (("ratio",), 0, "ratio 0.0 is not in (0, 1]"),
        (("ratio",), 1.5, "ratio 1.5 is not in (0, 1]"),
        (("ratio",), 10**400, "'ratio' is 1000"),
        (("kernels", 0), None, "there is no 'path'"),
        (("kernels", 1, "path"), "stem", "two of its kernels have one path"),
        (("kernels", 1, "path"), "block", "'block' is a kernel, and a stack with other kernels"),
        (("kernels", 1, "stack"), "stem", "'stem' is a kernel, and a stack with other kernels"),
        (("kernels", 0, "stack"), "block2/fc", "'block2/fc' is a kernel, and a stack with other kernels"),
        (("kernels", 0, "rank"), 0, "'stem' has a rank or a number of calls below 1"),
        (("kernels", 0, "calls"), -3, "'stem' has a rank or a number of calls below 1"),
        (("kernels", 0, "rank"), 4.0, "'rank' is 4.0, expected int"),
        (("kernels", 0, "shape"), "32x16", "'shape' is '32x16', expected list"),
        (("kernels", 0, "full_seconds"), 0, "'stem' took 0.0 s, expected more than 0 and less than a day"),
        (("kernels", 0, "full_seconds"), -1.0, "'stem' took -1.0 s"),
        (("kernels", 0, "factorized_seconds"), 1e9, "'stem' took 1000000000.0 s"),
        (("kernels", 0, "factorized_seconds"), 10**400, "'factorized_seconds' is 1000"),
        (("kernels", 0, "factorized_seconds"), "1", "'factorized_seconds' is '1', expected float"),
    ],
)
def test_documents_that_contradict_themselves(path, value, message):
    assert message in refusal(edited(path, value))


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_no_number(constant):
    text = json.dumps(DOCUMENT).replace("0.25", constant)
    assert f"it is not JSON: {constant} is not a number" in refusal(text)


def test_a_name_of_two_lines_leaves_the_message_one_line():
    document = json.loads(edited(("kernels", 0, "path"), "a\n\u2028b"))
    document["kernels"][0]["full_seconds"] = 0
    assert "b' took 0.0 s" in refusal(json.dumps(document))
    refusal(edited(("kernels", 0, "input_dtype"), ["a\nb"]))


def test_duplicate_keys_are_refused():
    twice = json.dumps(DOCUMENT).replace('"ratio": 0.25', '"ratio": 0.25, "ratio": 0.5')
    assert twice != json.dumps(DOCUMENT)
    assert "the same key twice" in refusal(twice)


@pytest.mark.parametrize("depth", [100, *range(900, 1000, 3), 5_000, 10_000])
def test_deep_nesting(depth):
    for path in (("format",), ("ratio",), ("kernels", 0, "shape"), ("kernels", 0, "stack")):
        for opened, closed in ("[]", ('{"a":', "}")):
            text = edited(path, "HERE").replace('"HERE"', opened * depth + "1" + closed * depth)
            refusal(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.sampled_from(["path", "a"]), values),
    max_leaves=8,
)
PLACES = [(key,) for key in DOCUMENT] + [("kernels", 1, key) for key in DOCUMENT["kernels"][1]]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PLACES), json_values), min_size=1, max_size=3))
def test_whatever_stands_in_a_document_it_is_a_profile_or_refused(edits):
    document = json.loads(json.dumps(DOCUMENT))
    for path, value in edits:
        try:
            node = document
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = value
        except (TypeError, KeyError, IndexError):
            continue  # an earlier edit has replaced this part
    try:
        profile = cf.KernelProfile.from_json(json.dumps(document))
    except ValueError:
        refusal(json.dumps(document))
    else:
        assert cf.KernelProfile.from_json(profile.to_json()) == profile
        assert profile.report()
        assert all(speedup > 0 and not math.isnan(speedup) for speedup in profile.values())


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30) | st.binary(max_size=30) | json_values.map(json.dumps))
def test_other_texts_are_refused(text):
    refusal(text)
