"""Plans as JSON: the round trip, and documents that are no plans."""

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linen_zoo import CASES, prepared

import cuttlefish_jax as cf
from cuttlefish_jax.kernels import Kernel, Kernels

KERNELS = Kernels(
    (
        Kernel(path="conv", layer="Conv", shape=(3, 3, 4, 6), reduction_axes=(0, 1, 2), output_axes=(3,)),
        Kernel(
            path="blocks/fc", layer="Dense", shape=(5, 8, 2), reduction_axes=(1,), output_axes=(2,),
            stack_axes=(0,), stack_indices=(-3,), positions=7,
        ),
    ),
    skipped_entries=(("embed", "Embed is not a type that can be factorized"),),
    num_params=500,
)  # fmt: skip
PLAN = cf.FactorizationPlan.from_ranks(KERNELS, {"conv": 3})
DOCUMENT = json.loads(PLAN.to_json())


def refusal(text):
    """What from_json says of a text that is no plan: one line, never another type of exception."""
    with pytest.raises(ValueError, match=r"^not a factorization plan: ") as caught:
        cf.FactorizationPlan.from_json(text)
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


# --- Round trip ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra_batch_norm", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_round_trip(name, extra_batch_norm):
    kernels = prepared(name)[-1]
    ranks = {path: kernel.max_rank for path, kernel in list(kernels.items())[::2]}
    plan = cf.FactorizationPlan.from_ranks(kernels, ranks, extra_batch_norm=extra_batch_norm)
    read = cf.FactorizationPlan.from_json(plan.to_json())
    assert read == plan
    assert hash(read) == hash(plan)
    assert read.report() == plan.report()
    assert read.to_json() == plan.to_json()


def test_that_an_embedding_is_first_survives():
    kernels = dataclasses.replace(KERNELS, embedding_first=True)
    plan = cf.FactorizationPlan.from_ranks(kernels, {"conv": 3})
    assert plan != PLAN
    read = cf.FactorizationPlan.from_json(plan.to_json())
    assert read == plan and hash(read) == hash(plan) and read.kernels.embedding_first


def test_documents_of_version_0_1_0_do_not_say_whether_an_embedding_is_first():
    document = {key: value for key, value in DOCUMENT.items() if key != "embedding_first"}
    assert cf.FactorizationPlan.from_json(json.dumps(document)) == PLAN


names = st.text(max_size=6)


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(names, st.tuples(st.integers(1, 9), st.integers(1, 9), st.booleans()), max_size=5),
    st.dictionaries(names, names, max_size=2),
    st.data(),
)
def test_round_trip_of_any_names_and_reasons(layers, skipped, data):
    kernels = Kernels(
        tuple(
            Kernel(path=path, layer="Dense", shape=(m, n), reduction_axes=(0,), output_axes=(1,))
            for path, (m, n, _) in layers.items()
        ),
        tuple(skipped.items()),
        data.draw(st.integers(0)),
    )
    ranks = tuple((path, min(m, n)) for path, (m, n, chosen) in layers.items() if chosen)
    kept = tuple((path, data.draw(names)) for path, (_, _, chosen) in layers.items() if not chosen)
    plan = cf.FactorizationPlan(kernels=kernels, rank_entries=ranks, kept_entries=kept)
    assert cf.FactorizationPlan.from_json(plan.to_json()) == plan


def test_the_document_says_what_people_look_for():
    assert DOCUMENT["format"] == 1
    assert DOCUMENT["ranks"] == {"conv": 3}
    assert DOCUMENT["kept"] == {"blocks/fc": "no rank given"}
    assert DOCUMENT["skipped"] == {"embed": "Embed is not a type that can be factorized"}
    assert DOCUMENT["num_params_full"] == 500
    assert DOCUMENT["num_params"] == 500 - 36 * 6 + 3 * (36 + 6)
    assert [kernel["path"] for kernel in DOCUMENT["kernels"]] == ["conv", "blocks/fc"]


# --- Documents that are no plans ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["", " ", "{", "nul", "{'format': 1}", '{"format": 1,}', "\x00", "1" * 5000, b"\xff\xfe\xff", None, 7,
     "[" * 100_000, '{"a":' * 100_000, json.dumps(DOCUMENT)[:-1], json.dumps(DOCUMENT) + "}"],
)  # fmt: skip
def test_what_is_not_json(text):
    assert "it is not JSON" in refusal(text)


@pytest.mark.parametrize("text", ["null", "[]", "{}", "3", '"plan"', "[[1]]", "true"])
def test_what_is_json_and_no_plan(text):
    assert "there is no 'format'" in refusal(text)


@pytest.mark.parametrize("constant", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("path", [("format",), ("num_params",), ("ranks", "conv"), ("kernels", 0, "layer")])
def test_nan_and_infinity_are_not_json(path, constant):
    assert "is not a number" in refusal(edited(path, constant))


OPTIONAL = {"num_params", "embedding_first", "decided", "budget"}


@pytest.mark.parametrize("key", sorted(DOCUMENT.keys() - OPTIONAL))
@pytest.mark.parametrize("value", [None, "x", 1.5, -1, [[[]]], {"x": {}}, True])
def test_wrong_types_and_missing_keys(key, value):
    if type(value) is type(DOCUMENT[key]) and key in ("num_params_full", "extra_batch_norm"):
        return  # a value of the right type
    refusal(edited((key,), value))
    missing = {other: DOCUMENT[other] for other in DOCUMENT if other != key}
    assert f"there is no {key!r}" in refusal(json.dumps(missing))


def test_what_decided_and_the_budget_survive():
    use = cf.BudgetUse(budget=cf.FLOPs(0.1 + 0.2), asked=0.7, used=1 / 3)
    plan = dataclasses.replace(PLAN, decided_entries=(("conv", "rule 'conv'"),), budget=use)
    read = cf.FactorizationPlan.from_json(plan.to_json())
    assert read == plan and read.budget == use and read.decided == {"conv": "rule 'conv'"}
    assert plan != PLAN and PLAN.budget is None and PLAN.decided == {}
    # Documents of version 0.1.0 have neither.
    older = {key: value for key, value in DOCUMENT.items() if key not in ("decided", "budget")}
    assert cf.FactorizationPlan.from_json(json.dumps(older)) == PLAN


USE = {"budget": "flops:0.3", "asked": 0.7, "used": 0.2}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("decided", None, "'decided' is None, expected dict"),
        ("decided", {"conv": 3}, "'decided' has a reason that is no text"),
        ("decided", {"blocks/fc": "x"}, "'blocks/fc' has a reason for its rank, and no rank"),
        ("budget", "flops:0.3", "'budget' is 'flops:0.3', expected dict"),
        ("budget", {}, "there is no 'budget'"),
        ("budget", USE | {"budget": "money:0.3"}, "'money:0.3' is not a budget such as 'parameters:0.5', "),
        ("budget", USE | {"budget": "flops:3"}, "'flops:3' is not a budget such as "),
        ("budget", USE | {"asked": "0.7"}, "'asked' is '0.7', expected float"),
        ("budget", USE | {"used": -1}, "-1.0 is no share of a budget"),
    ],
)
def test_decisions_and_budgets_that_are_none(key, value, message):
    assert message in refusal(edited((key,), value))


@pytest.mark.parametrize("value", [None, "x", 1, 0, 1.5, [], {}])
def test_an_embedding_is_first_or_not(value):
    assert "'embedding_first' is " in refusal(edited(("embedding_first",), value))


@pytest.mark.parametrize("key", ["path", "layer", "shape", "reduction_axes", "output_axes", "stack_axes"])
@pytest.mark.parametrize("value", [None, 1.5, -1, [1.0], [True], [None], {}, False])
def test_wrong_types_and_missing_keys_in_a_kernel(key, value):
    assert f"{key!r} is " in refusal(edited(("kernels", 0, key), value))
    missing = {other: DOCUMENT["kernels"][0][other] for other in DOCUMENT["kernels"][0] if other != key}
    assert f"there is no {key!r}" in refusal(edited(("kernels", 0), missing))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), 2, "its format 2 is not 1"),
        (("kernels", 0), None, "there is no 'path'"),
        (("kernels", 1, "path"), "conv", "two of its kernels have one path"),
        (("kernels", 1, "path"), "other", "'other' is neither factorized nor kept"),
        (("kernels", 0, "positions"), 0, "'conv' has a size or positions below 1"),
        (("kernels", 0, "shape"), [3, 3, 0, 6], "'conv' has a size or positions below 1"),
        (("kernels", 0, "shape"), [3, 3, -4, 6], "'conv' has a size or positions below 1"),
        (("kernels", 0, "shape"), [], "the axes of 'conv' are not those of its shape ()"),
        (("kernels", 0, "shape"), [3, 3, 4], "the axes of 'conv' are not those of its shape"),
        (("kernels", 0, "reduction_axes"), [0, 1, -2], "the axes of 'conv' are not those of its shape"),
        (("kernels", 0, "reduction_axes"), [0, 1, 1], "the axes of 'conv' are not those of its shape"),
        (("kernels", 0, "reduction_axes"), [0, 1, 2, 3], "the axes of 'conv' are not those of its shape"),
        (("kernels", 0, "output_axes"), [], "the axes of 'conv' are not those of its shape"),
        (("kernels", 0, "output_axes"), [10**30], "the axes of 'conv' are not those of its shape"),
        *(
            (("kernels", 0), DOCUMENT["kernels"][0] | axes, "the axes of 'conv' are not those of its shape")
            for axes in (
                {"reduction_axes": [], "output_axes": [0, 1, 2, 3]},
                {"reduction_axes": [0, 1, 2, 3], "output_axes": []},
            )
        ),
        (("kernels", 1, "stack_indices"), [], "the stack indices of 'blocks/fc' do not give its stack axes"),
        (("kernels", 1, "stack_indices"), [1], "the stack indices of 'blocks/fc' do not give its stack axes"),
        (("kernels", 1, "stack_indices"), [-4], "the stack indices of 'blocks/fc' do not give its stack"),
        (("kernels", 1, "stack_indices"), [9**99], "the stack indices of 'blocks/fc' do not give its stack"),
        (("kernels", 1, "stack_indices"), [0, 0], "the stack indices of 'blocks/fc' do not give its stack"),
        (("kernels", 0, "stack_indices"), [0], "the stack indices of 'conv' do not give its stack axes"),
        (("ranks", "conv"), 7, "rank 7 for 'conv' exceeds min(m, n) = 6"),
        (("ranks", "conv"), 0, "rank 0 for 'conv' is below 1"),
        (("ranks", "conv"), -(10**100), "is below 1"),
        (("ranks", "conv"), 3.0, "rank 3.0 for 'conv' is not an integer"),
        (("ranks", "conv"), True, "rank True for 'conv' is not an integer"),
        (("ranks", "conv"), [3], "rank [3] for 'conv' is not an integer"),
        (("ranks", "blocks/fc"), 1, "'blocks/fc' is both factorized and kept"),
        (("ranks", "embed"), 1, "'embed' matches no layer"),
        (("ranks", "conv\r\nv"), 1, "matches no layer"),
        (("ranks",), {}, "'conv' is neither factorized nor kept"),
        (("kept", "blocks/fc"), None, "'kept' has a reason that is no text"),
        (("kept", "conv"), "why not", "'conv' is both factorized and kept"),
        (("kept", "nobody"), "why not", "'nobody' matches no layer"),
        (("skipped", "embed"), ["no"], "'skipped' has a reason that is no text"),
        (("num_params_full",), 5.0, "'num_params_full' is 5.0, expected int"),
    ],
)  # fmt: skip
def test_documents_that_contradict_themselves(path, value, message):
    assert message in refusal(edited(path, value))


def test_a_name_of_two_lines_leaves_the_message_one_line():
    kernel = Kernel(path="a\nb", layer="Dense", shape=(2, 2), reduction_axes=(0,), output_axes=(1,))
    document = json.loads(cf.FactorizationPlan.from_ranks(Kernels((kernel,)), {"a\nb": 1}).to_json())
    assert "path 'ab' matches no layer; near it: a b" in refusal(json.dumps(document | {"kept": {"ab": ""}}))


def test_duplicate_keys_are_refused():
    twice = json.dumps(DOCUMENT).replace('{"conv": 3}', '{"conv": 3, "conv": 2}')
    assert twice != json.dumps(DOCUMENT)
    assert "the same key twice" in refusal(twice)


@pytest.mark.parametrize("size", [2**40, 10**100, 10**4000])
def test_huge_shapes_are_numbers_and_nothing_more(size):
    text = edited(("kernels", 0, "shape"), [1, 1, size, size])
    assert cf.FactorizationPlan.from_json(text).kernels["conv"].m == size
    document = json.loads(text) | {"ranks": {"conv": 2 * size}}
    assert "exceeds min(m, n)" in refusal(json.dumps(document))


@pytest.mark.parametrize("depth", [100, *range(900, 1000, 3), 5_000, 9_990, 10_000])
def test_deep_nesting(depth):
    for path in (("format",), ("ranks", "conv"), ("kept", "blocks/fc"), ("kernels", 0, "shape")):
        for opened, closed in ("[]", ('{"a":', "}")):
            text = edited(path, "HERE").replace('"HERE"', opened * depth + "1" + closed * depth)
            refusal(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda values: (
        st.lists(values, max_size=4) | st.dictionaries(st.sampled_from(["conv", "a", "path"]), values)
    ),
    max_leaves=8,
)
PLACES = [
    *((key,) for key in DOCUMENT if key != "num_params"),
    *(("kernels", i, key) for i in (0, 1) for key in DOCUMENT["kernels"][i]),
    ("kernels", 0),
    ("ranks", "conv"),
    ("ranks", "blocks/fc"),
    ("kept", "blocks/fc"),
    ("kept", "a"),
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PLACES), json_values), min_size=1, max_size=3))
def test_whatever_stands_in_a_document_it_is_a_plan_or_refused(edits):
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
        plan = cf.FactorizationPlan.from_json(json.dumps(document))
    except ValueError:
        refusal(json.dumps(document))
    else:
        assert cf.FactorizationPlan.from_json(plan.to_json()) == plan
        assert plan.report()


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30) | st.binary(max_size=30) | json_values.map(json.dumps))
def test_other_texts_are_refused(text):
    refusal(text)
