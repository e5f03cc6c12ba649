"""The commands in this process: what they print and write, and what they refuse."""

import functools
import importlib
import re
import tomllib
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

import cuttlefish_jax as cf
from cuttlefish_jax import serving
from cuttlefish_jax.command.main import run

MODEL = ("--model", "resnet18", "--option", "width=8", "--option", "stage_sizes=(1,1)", "--input", "8,8,1")


@pytest.fixture
def full_file(network, tmp_path):
    file = tmp_path / "full.safetensors"
    serving.save_safetensors(file, network[2])
    return file


@pytest.fixture
def low_file(network, tmp_path):
    _, _, variables, plan = network
    file = tmp_path / "low.safetensors"
    params = cf.factorize_params(variables["params"], plan)
    serving.save_safetensors(file, {**variables, "params": params}, plan)
    return file


def evaluated(model, variables, x):
    return jax.jit(functools.partial(model.apply, train=False))(variables, x)


def energy_rank(kernel, params):
    """In float64: how many singular values hold 90 % of the squared norm."""
    for key in kernel.path.split("/"):
        params = params[key]
    squares = np.linalg.svd(params["kernel"].astype(np.float64).reshape(kernel.m, kernel.n))[1] ** 2
    return 1 + np.sum(np.cumsum(squares) < 0.9 * squares.sum())


def test_inspect_measures_and_says_what_a_plan_would_save(network, full_file, full_run, cuttlefish):
    _, model, variables, _ = network
    kernels = cf.find_kernels(model, np.zeros((1, 8, 8, 1), np.float32), train=False)
    ranks = cf.stable_ranks(variables["params"], kernels)
    status, out, _ = cuttlefish("inspect", full_file, "--rank-ratio", 0.25)
    assert status == 0
    assert "kernels are read off the checkpoint" in out and "FLOPs of the kernels" not in out
    assert f"{kernels.num_params:,} -> " in out
    status, exact, _ = cuttlefish("inspect", full_file, "--rank-ratio", 0.25, *MODEL)
    assert status == 0 and "FLOPs of the kernels" in exact and "read off" not in exact
    for line in exact.splitlines():
        if (path := line.split(" ")[0]) in kernels:
            row = line.split()
            assert float(row[4]) == pytest.approx(float(ranks[path]), abs=0.051)
            assert int(row[5]) == energy_rank(kernels[path], variables["params"])
    _, run, _ = cuttlefish("inspect", full_run, "--rank-ratio", 0.25)
    assert run.splitlines()[2:] == exact.splitlines()[2:]


def test_inspect_of_factors_is_of_their_products(low_file, low_run, network, cuttlefish):
    for source in (low_file, low_run):
        status, out, _ = cuttlefish("inspect", source)
        assert status == 0 and "factorized; the spectra are those of the products" in out
        assert f"{network[3].num_params_full:,} -> {network[3].num_params:,}" in out


def test_the_default_rule_is_against_the_initialisation_of_the_run(full_run, full_file, cuttlefish):
    # In the run all stable ranks began at 2, in a random matrix they are higher.
    begun_low, random = (cuttlefish("inspect", source, *MODEL)[1] for source in (full_run, full_file))
    assert begun_low != random


def test_a_picture_has_a_panel_for_each_layer(full_file, tmp_path, cuttlefish):
    picture = tmp_path / "spectra.png"
    assert cuttlefish("inspect", full_file, "--picture", picture)[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    status, _, err = cuttlefish("inspect", full_file, "--picture", picture)
    assert status == 2 and "exists" in err
    assert cuttlefish("inspect", full_file, "--picture", picture, "--force")[0] == 0


def test_factorize_writes_factors_and_their_plan(full_file, network, tmp_path, cuttlefish):
    out = tmp_path / "out.safetensors"
    options = ("--rank-ratio", 0.5, "--keep", "stage2/*", "--factorize", "classifier=3", "--round-to", 2)
    status, printed, _ = cuttlefish("factorize", full_file, "--out", out, *MODEL, *options)
    assert status == 0 and f"written to {out}" in printed
    loaded, plan = serving.load_safetensors(out)
    assert plan.ranks == {"stage1/block1/conv1": 4, "stage1/block1/conv2": 4, "classifier": 3}
    expected = cf.factorize_params(network[2]["params"], plan)
    chex.assert_trees_all_equal(loaded["params"], jax.device_get(expected))
    chex.assert_trees_all_equal(loaded["batch_stats"], network[2]["batch_stats"])
    status, _, err = cuttlefish("factorize", out, "--out", tmp_path / "again.safetensors")
    assert status == 2 and "is factorized already" in err


@pytest.mark.parametrize("budget", ["parameters:0.3", "flops:0.4"])
def test_a_budget_is_kept(budget, full_file, tmp_path, cuttlefish):
    out = tmp_path / "out.safetensors"
    status, printed, _ = cuttlefish("factorize", full_file, "--out", out, *MODEL, "--budget", budget)
    assert status == 0 and "budget: 0." in printed
    plan = serving.load_safetensors(out)[1]
    kernels = plan.kernels.values()
    left = {
        "parameters:0.3": plan.num_params / plan.num_params_full,
        "flops:0.4": sum(k.flops(plan.ranks.get(k.path)) for k in kernels) / sum(k.flops() for k in kernels),
    }
    assert 0.8 * float(budget[-3:]) < left[budget] <= float(budget[-3:])


def test_a_plan_without_the_network_serves_the_network(full_file, network, tmp_path, cuttlefish):
    _, model, variables, _ = network
    out = tmp_path / "out.safetensors"
    assert cuttlefish("factorize", full_file, "--out", out, "--rank-ratio", 0.5)[0] == 0
    status, printed, _ = cuttlefish("inspect", out)
    assert status == 0 and "FLOPs" not in printed and "read off" not in printed
    low, plan = serving.load_safetensors(out)
    expected = {**variables, "params": cf.merge_params(low["params"], plan)}
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
    np.testing.assert_allclose(
        evaluated(cf.factorize(model, plan), low, x),
        evaluated(model, expected, x),
        rtol=1e-4,
        atol=1e-5,
    )


def test_merge_gives_the_tree_of_the_unmodified_network(low_run, network, tmp_path, cuttlefish):
    _, model, variables, plan = network
    out = tmp_path / "merged.safetensors"
    assert cuttlefish("merge", low_run, "--out", out)[0] == 0
    merged, none = serving.load_safetensors(out)
    assert none is None
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, variables)
    low = cf.factorize_params(variables["params"], plan)
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
    expected = evaluated(cf.factorize(model, plan), {**variables, "params": low}, x)
    np.testing.assert_allclose(evaluated(model, merged, x), expected, rtol=1e-4, atol=1e-5)


def test_export_takes_a_run_or_a_file_and_its_network(low_run, low_file, network, tmp_path, cuttlefish):
    _, model, variables, plan = network
    x = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype(np.float32)
    low = {**variables, "params": cf.factorize_params(variables["params"], plan)}
    expected = evaluated(cf.factorize(model, plan), low, x)
    settings = low_run / "config.json"
    for number, arguments in enumerate([(low_run,), (low_file, "--config", settings), (low_file, *MODEL)]):
        out = tmp_path / f"{number}.stablehlo"
        status, printed, _ = cuttlefish("export", *arguments, "--out", out)
        assert status == 0 and "float32[batch, 8, 8, 1]" in printed
        program = jax.export.deserialize(bytearray(out.read_bytes()))
        np.testing.assert_allclose(program.call(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("inspect FULL --rank-ratio 2", r"RankRatio: ratio 2.0 is not in \(0, 1\]"),
        ("inspect FULL --rule energi", "'energi' is none of scaled_stable_rank"),
        ("inspect FULL --rule energy --rank-ratio 0.5", "not allowed with argument"),
        ("inspect FULL --budget half", "'half' is not a budget such as"),
        ("inspect FULL --budget flops:0.5", "FLOPs are known of a network alone"),
        ("inspect FULL --budget time:0.5", "times have to be measured"),
        ("factorize FULL --out new.safetensors --budget parameters:0.0001", "0.0001"),
        ("inspect FULL --keep stag/*", r"rule 'stag/\*' matches no layer; near it: stage"),
        ("inspect FULL --factorize stem_conv=x", "'x' is not a rank"),
        ("inspect FULL --factorize stem_conv=90", "exceeds min"),
        ("inspect FULL --option width=8", "go with --model"),
        ("inspect FULL --model resnet18", "needs --input"),
        ("inspect FULL --model resnet18 --input 8,8", "--input 8,8 is neither"),
        ("inspect FULL --model resnet81 --input 8,8,1", "no model 'resnet81'; did you mean resnet18"),
        ("inspect FULL --model resnet18 --input 8,8,1 --option width", "width is not KEY=VALUE"),
        (
            "inspect FULL --model resnet18 --input 8,8,1",
            r"is not of this network: batch_stats/.* is .* there and .* in the network",
        ),
        ("inspect FULL --config missing.json", "there is no file missing.json"),
        ("inspect FULL --config FULL", "is not the config.json of a run"),
        ("inspect FULL --plan missing.json", "cannot read missing.json"),
        ("inspect missing", "there is no checkpoint missing"),
        ("factorize FULL --out low.bin", "has to end in .safetensors"),
        ("factorize FULL --out nowhere/low.safetensors", "there is no folder nowhere"),
        ("factorize FULL --out FULL", "exists: give another name, or --force"),
        ("factorize FULL --out new.safetensors --keep *", "no layer is factorized, and nothing written"),
        ("merge FULL --out new.safetensors", "is not factorized"),
        ("export FULL --out new", "does not say what network it is of"),
        ("export LOW --out new --platforms gpus --config CONFIG", "is none of cpu, cuda, rocm, tpu"),
        ("export", "the following arguments are required"),
        ("explode", "invalid choice"),
    ],
)
def test_errors_are_one_line(
    arguments, message, full_file, low_file, full_run, cuttlefish, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    places = {"FULL": full_file.name, "LOW": low_file.name, "CONFIG": full_run / "config.json"}
    status, _, err = cuttlefish(*(places.get(word, word) for word in arguments.split()))
    assert status == 2
    assert err.startswith("error: ")
    assert re.search(message, err), err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_arrays_of_unknown_names_are_refused(tmp_path, cuttlefish):
    serving.save_safetensors(tmp_path / "other.safetensors", {"fc": {"matrix": np.ones((2, 3))}})
    status, _, err = cuttlefish("inspect", tmp_path / "other.safetensors")
    assert status == 2 and "has no array called kernel, as Flax names them" in err and "fc/matrix" in err


def test_the_installed_command_is_this_one():
    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    module, _, function = settings["project"]["scripts"]["cuttlefish"].partition(":")
    assert getattr(importlib.import_module(module), function) is run
