"""The low-rank phase that is compiled while full-rank training goes on changes time, and no number."""

import gc
import json
import math
import time

import jax
import pytest

import cuttlefish_jax as cf
from cuttlefish_jax.training import loop
from cuttlefish_jax.training.experiment import Experiment
from cuttlefish_jax.training.step import abstract
from cuttlefish_jax.training.switching import Switcher, nearly_equal

pytestmark = pytest.mark.slow
TIMES = {"seconds", "examples_per_second", "rank_seconds"}


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def numbers(workdir):
    return [
        {key: value for key, value in line.items() if key not in TIMES}
        for name in ("metrics.jsonl", "ranks.jsonl")
        for line in read_lines(workdir / name)
    ]


@pytest.mark.parametrize(
    "whitened",
    [
        {},
        {"plan.calibration_batches": 1, "plan.budget": "flops:0.8"},
        pytest.param({"plan.calibration_batches": 2}, marks=pytest.mark.large),
    ],
)
def test_programs_compiled_ahead_change_no_number(tiny_config, tmp_path, whitened):
    # The same ranks whenever.
    fixed = {"plan.rank_rule": "rank_ratio", "optimizer.ema": 0.9, "switch.rank_tolerance": 0.9, **whitened}
    ahead = loop.run(tiny_config(**fixed), tmp_path / "ahead")
    there = loop.run(tiny_config(**fixed, **{"switch.compile_ahead": False}), tmp_path / "there")
    assert numbers(tmp_path / "ahead") == numbers(tmp_path / "there")
    assert ahead["compile_seconds_background"] > 0 == there["compile_seconds_background"]
    assert ahead["switch_seconds"] <= ahead["switch_stall_seconds"]
    assert there["switch_stall_seconds"] > there["switch_seconds"]


def test_ranks_that_were_not_foreseen_are_compiled_for_there(tiny_config, tmp_path):
    exact = loop.run(tiny_config(**{"switch.rank_tolerance": 0.0}), tmp_path / "exact")
    alone = loop.run(tiny_config(**{"switch.compile_ahead": False}), tmp_path / "alone")
    assert exact["ranks"] == alone["ranks"]
    assert numbers(tmp_path / "exact") == numbers(tmp_path / "alone")


def test_a_run_stopped_between_foresight_and_switch_makes_the_same_plan(tiny_config, tmp_path, monkeypatch):
    config = tiny_config(**{"switch.rank_tolerance": 0.9})
    summary = loop.run(config, tmp_path / "unbroken")
    initial, foreseen, last = read_lines(tmp_path / "unbroken" / "ranks.jsonl")
    kernels = Experiment.from_config(config).kernels
    # The first ranks that were foreseen stand: those after no epoch at all.
    expected = {path: min(kernels[path].max_rank, summary["ranks"][path]) for path in summary["ranks"]}
    by_rule = {
        path: math.ceil(kernels[path].max_rank * foreseen[path] / initial[path]) for path in summary["ranks"]
    }
    assert summary["ranks"] == expected == by_rule
    assert any(foreseen[path] != last[path] for path in by_rule)

    def stopped(self, epoch):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_switch", stopped)
        with pytest.raises(KeyboardInterrupt):
            loop.run(config, tmp_path / "broken")
    again = loop.run(config, tmp_path / "broken")
    assert again["ranks"] == summary["ranks"]
    assert numbers(tmp_path / "broken") == numbers(tmp_path / "unbroken")


def test_errors_while_compiling_ahead_show_at_the_switch(tiny_config, tmp_path, monkeypatch):
    def fails(self, *args):
        raise RuntimeError("no such program")

    monkeypatch.setattr(Switcher, "_compile", fails)
    with pytest.raises(RuntimeError, match="no such program"):
        loop.run(tiny_config(**{"plan.rank_rule": "rank_ratio"}), tmp_path)


def test_the_full_rank_state_is_freed_and_a_step_works_in_place(tiny_config):
    config = tiny_config(**{"optimizer.ema": 0.9})
    experiment = Experiment.from_config(config)
    full = experiment.phase()
    state = experiment.create_state(full)
    batch = next(experiment.train.epoch(0))
    step = full.train_step.compile_for(abstract(state), experiment.train.resident, batch)
    plan = cf.FactorizationPlan.from_ranks(experiment.kernels, {"stage2/block1/conv2": 4})
    switcher = Switcher(experiment)
    # Another plan was foreseen, and compiled for nothing.
    other = cf.FactorizationPlan.from_ranks(experiment.kernels, {"stage2/block1/conv2": 3})
    switcher.compile_ahead(other, 2, full, state)
    low, was_ahead = switcher.get(plan, 2, full, state)
    assert not was_ahead
    while not (seconds := switcher.background_seconds()):
        time.sleep(0.1)
    assert seconds > 0 == switcher.background_seconds()

    def live():
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    def size(state):
        return sum(array.nbytes for array in jax.tree.leaves(state))

    # Donated: of what a step returns nothing but the metrics is in new memory.
    memory = step.memory_analysis()
    assert memory.alias_size_in_bytes >= size(state)
    others, full_size = live() - size(state), size(state)
    state = jax.block_until_ready(low.convert(state, None))
    assert size(state) < full_size
    assert live() - others <= size(state) + 1024
    state, _ = low.phase.train_step(state, experiment.train.resident, batch)
    assert low.phase.compile_seconds == 0


@pytest.mark.parametrize(
    "foreseen, ranks, tolerance, stands",
    [
        ({"a": 40, "b": 8}, {"a": 40, "b": 8}, 0.0, True),
        ({"a": 42, "b": 8}, {"a": 40, "b": 8}, 0.05, True),
        ({"a": 38, "b": 8}, {"a": 40, "b": 8}, 0.05, True),
        ({"a": 43, "b": 8}, {"a": 40, "b": 8}, 0.05, False),
        ({"a": 40, "b": 9}, {"a": 40, "b": 8}, 0.05, True),
        ({"a": 40, "b": 10}, {"a": 40, "b": 8}, 0.05, False),
        ({"a": 41, "b": 8}, {"a": 40, "b": 8}, 0.0, False),
        ({"a": 40}, {"a": 40, "b": 8}, 0.9, False),
    ],
)
def test_when_a_foreseen_plan_stands(foreseen, ranks, tolerance, stands):
    kernels = {
        path: cf.Kernel(path=path, layer="Dense", shape=(64, 64), reduction_axes=(0,), output_axes=(1,))
        for path in "ab"
    }
    plans = [cf.FactorizationPlan.from_ranks(kernels, r) for r in (foreseen, ranks)]
    assert nearly_equal(*plans, tolerance) is stands
