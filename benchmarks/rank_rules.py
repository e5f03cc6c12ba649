"""Rank rules side by side at equal parameters, and truncation by SVD against activation-whitened SVD.

    python benchmarks/rank_rules.py [--seeds 3] [--networks deit_tiny resnet18 resmlp_s12] [--jobs 2]
        [--budgets 0.125 0.25] [--out runs/rank_rules] [--json FILE]

The full-rank part of a seed is trained once, on scikit-learn's digits, as in benchmarks/switch.py; all rows
continue from there, with the same batches and carried state. A budget is a share of the parameters of the
kernels that may be factorized (not the first layer, the last one, shortcuts). To meet it, the scaled stable
and the effective ranks are multiplied by one common factor, and of the accumulative rank, the energy and the
ratio the share is lowered; ``water-filling`` is ``make_plan``'s budget. All of these kernels are factorized,
at ranks at which they get smaller.

``whitened`` truncates in the metric of the inputs (``cf.calibrate``), measured on ten training
batches: ``scaled stable, whitened`` and ``water-filling, whitened`` have the ranks of the row of that name
without it, ``whitened water-filling`` those of a water-filling over the whitened singular values.

Test losses are given right after the switch (batch-norm statistics re-estimated on ten batches, before and
after training goes on from there), after one epoch, and at the end. ``low-high`` are the least and the
largest of the seeds. The notes have the differences of whitened and plain rows, seed by seed. Runs that are
finished in --out are not run again.

All plans of a seed run in one program: factors are padded with zeros to the largest rank of any plan. The
gradient of a zero column is a product with a zero row, and the other way round: they stay zeros.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import queue
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import report
from switch import NETWORKS, configured, copied

import cuttlefish_jax as cf
from cuttlefish_jax.files import replace_file
from cuttlefish_jax.kernels import subtree
from cuttlefish_jax.plan.measured import Measured
from cuttlefish_jax.training.calibration import Calibrator
from cuttlefish_jax.training.epoch import evaluate, train_epoch
from cuttlefish_jax.training.experiment import Experiment
from cuttlefish_jax.training.recalibration import recalibrate

BATCHES = 10
# Transformers and MLPs as long as the ResNet: there are many rows.
SHORTER = {"epochs": 24, "switch.epoch": 10, "evaluation.every_epochs": 24}
# Row -> whose ranks, and whether truncated in the metric of the inputs.
ROWS = {
    "scaled stable": ("scaled stable", False),
    "scaled stable, whitened": ("scaled stable", True),
    "water-filling": ("water-filling", False),
    "water-filling, whitened": ("water-filling", True),
    "whitened water-filling": ("whitened water-filling", True),
    "effective": ("effective", False),
    "ratio": ("ratio", False),
    "energy": ("energy", False),
    "accumulative": ("accumulative", False),
}
PAIRS = [
    ("scaled stable, whitened", "scaled stable"),
    ("water-filling, whitened", "water-filling"),
    ("whitened water-filling", "water-filling"),
]
WHEN = ("at switch", "after an epoch", "at the end")


def most(kernel: cf.Kernel) -> int:
    """The largest rank at which the factors are smaller than the kernel."""
    return max(1, min(kernel.max_rank, (kernel.m * kernel.n - 1) // (kernel.m + kernel.n)))


@dataclasses.dataclass(frozen=True)
class Smaller(cf.RankRule):
    """The largest rank at which a layer gets smaller: what a budget lowers."""

    def rank(self, measured: Measured) -> int:
        """See :meth:`cf.RankRule.rank`."""
        return most(measured.kernel)


def fitted(ranks_of: Callable[[float], dict[str, int]], cost: Callable[[Any], int], target: float) -> dict:
    """The ranks of the largest ``t`` in (0, 1] whose cost is within the target, by bisection."""
    low, high = 1e-9, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(ranks_of(middle)) <= target else (low, middle)
    return ranks_of(low)


class Measurements:
    """What the rules see of a full-rank network, and the ranks that they give within a share."""

    def __init__(self, kernels: cf.Kernels, ranks_t: Any, ranks_0: Any, sigmas: Any, whitened: Any):
        self.kernels, self.ranks_t, self.ranks_0 = kernels, ranks_t, ranks_0
        self.sigmas, self.whitened = sigmas, whitened

    def cost(self, ranks: Mapping[str, int]) -> int:
        """Parameters of the factors."""
        return sum(self.kernels[path].num_params(rank) for path, rank in ranks.items())

    def ranks(self, rule: str, share: float, paths: tuple[str, ...]) -> dict[str, int]:
        """The ranks of a rule, brought to at most this share of the parameters of the kernels ``paths``."""
        kernels = {path: self.kernels[path] for path in paths}
        full = sum(kernel.num_params() for kernel in kernels.values())
        if rule.endswith("water-filling"):
            rest = self.kernels.num_params - full
            plan = cf.make_plan(
                self.kernels,
                rank_rule=Smaller(),
                rules=[
                    cf.Rule(path) if path in kernels else cf.Rule(path, keep=True) for path in self.kernels
                ],
                singular_values=self.sigmas if rule == "water-filling" else self.whitened,
                budget=cf.Parameters((rest + share * full) / self.kernels.num_params),
            )
            return dict(plan.ranks)
        measured = {
            path: Measured(
                kernel=kernel,
                stable_rank=np.asarray(self.ranks_t[path], np.float64),
                initial_stable_rank=np.asarray(self.ranks_0[path], np.float64),
                singular_values=np.asarray(self.sigmas[path], np.float64),
            )
            for path, kernel in kernels.items()
        }

        def at(t: float) -> dict[str, int]:
            found = {}
            for path, one in measured.items():
                if rule in ("scaled stable", "effective"):
                    whole = (cf.ScaledStableRank() if rule == "scaled stable" else cf.EffectiveRank()).rank(
                        one
                    )
                    rank = round(10 * t * whole)  # a factor of up to 10
                else:
                    of_share = {
                        "accumulative": cf.AccumulativeRank,
                        "energy": cf.EnergyRank,
                        "ratio": cf.RankRatio,
                    }
                    rank = of_share[rule](t).rank(one)
                found[path] = int(np.clip(rank, 1, most(kernels[path])))
            return found

        return fitted(at, self.cost, share * full)


class Continuations:
    """One training, up to its switch, and its continuations at the ranks of every rule."""

    def __init__(self, network: str, seed: int, budgets: list[float]):
        self.config = config = configured(network, seed)
        config.update_from_flattened_dict(SHORTER)
        self.experiment = experiment = Experiment.from_config(config)
        self.paths = experiment.candidates
        full = experiment.phase()
        state = experiment.create_state(full)
        kernels, measure = experiment.kernels, lambda params: cf.stable_ranks(params, experiment.kernels)
        ranks_0 = jax.device_get(measure(state.params))
        for epoch in range(config.switch.epoch):
            state, _ = train_epoch(full.train_step, state, experiment.train, epoch)
        self.full = copied(state)
        self.calibration = Calibrator(experiment.task, experiment.model, kernels).measure(
            self.full, experiment.train, epoch=config.switch.epoch, batches=BATCHES
        )
        self.measurements = Measurements(
            kernels,
            jax.device_get(measure(self.full.params)),
            ranks_0,
            jax.device_get(cf.singular_values(self.full.params, kernels)),
            jax.device_get(cf.singular_values(self.full.params, kernels, calibration=self.calibration)),
        )
        rules = dict.fromkeys(rule for rule, _ in ROWS.values())
        self.ranks = {
            (budget, rule): self.measurements.ranks(rule, budget, self.paths)
            for budget in budgets
            for rule in rules
        }
        largest = {path: max(ranks[path] for ranks in self.ranks.values()) for path in self.paths}
        self.plan = cf.FactorizationPlan.from_ranks(kernels, largest)
        self.low = experiment.phase(
            self.plan, switch_step=config.switch.epoch * experiment.train.steps_per_epoch
        )
        self.factors = jax.device_get(cf.factorize_params(self.full.params, self.plan))
        plan, tx, apply_fn = self.plan, self.low.tx, self.low.model.apply

        @jax.jit
        def switched(state: Any, params: Any) -> Any:
            opt_state = cf.carry_opt_state(state.opt_state, state.params, params, tx, plan)
            return state.replace(
                params=params, opt_state=opt_state, tx=tx, apply_fn=apply_fn, rank_vectors={}
            )

        self._switched = switched

    def without(self) -> dict[str, Any]:
        """The full-rank network going on."""
        full = self.experiment.phase()
        return self._goes_on(full, copied(self.full))

    def _params(self, ranks: Mapping[str, int], whitened: bool) -> Any:
        """Factors at these ranks, padded with zeros."""
        params = jax.tree.map(lambda x: x, self.factors)  # the dicts are copies
        own = params  # of these very ranks, which whitened factors depend on
        if whitened:
            plan = cf.FactorizationPlan.from_ranks(self.plan.kernels, ranks)
            own = jax.device_get(cf.factorize_params(self.full.params, plan, calibration=self.calibration))
        for path, rank in ranks.items():
            kernel, padded = self.plan.kernels[path], self.plan.ranks[path]
            layer, found = subtree(params, path), subtree(own, path)
            sizes = kernel.factors(rank if whitened else padded), kernel.factors(padded)
            for index, (side, name) in enumerate((("u", kernel.param), ("v", "kernel"))):
                matrix = np.asarray(sizes[0][index].to_matrix(found[side][name]))
                of_rank = matrix[:, :rank] if side == "u" else matrix[:rank]
                whole = np.zeros((kernel.m, padded) if side == "u" else (padded, kernel.n), np.float32)
                whole[: of_rank.shape[0], : of_rank.shape[1]] = of_rank
                layer[side][name] = sizes[1][index].from_matrix(jnp.asarray(whole))
        return jax.tree.map(jnp.asarray, params)

    def continued(self, budget: float, row: str) -> dict[str, Any]:
        """How training goes on at the ranks of a row."""
        rule, whitened = ROWS[row]
        ranks = self.ranks[budget, rule]
        state = copied(self._switched(self.full, self._params(ranks, whitened)))
        state = recalibrate(
            self.experiment.task,
            state,
            self.experiment.train,
            epoch=self.config.switch.epoch,
            batches=BATCHES,
        )
        whole = sum(self.experiment.kernels[path].num_params() for path in self.paths)
        found = {"share": self.measurements.cost(ranks) / whole, "ranks": ranks}
        return found | self._goes_on(self.low, copied(state))

    def _goes_on(self, phase: Any, state: Any) -> dict[str, Any]:
        test = self.experiment.evaluation["test"]
        first, last = self.config.switch.epoch, self.config.epochs
        tests = [evaluate(phase.eval_step, state.eval_variables, test, ("accuracy",))]
        for epoch in range(first, last):
            state, _ = train_epoch(phase.train_step, state, self.experiment.train, epoch)
            if epoch in (first, last - 1):
                tests.append(evaluate(phase.eval_step, state.eval_variables, test, ("accuracy",)))
        return {"tests": tests}


def run_one(network: str, seed: int, file: Path, budgets: list[float]) -> None:
    """All rows of one seed; the file is written anew after each."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        continuations = Continuations(network, seed, budgets)
        found: dict[str, Any] = {"network": network, "seed": seed, "rows": []}
        todo: list[tuple[float | None, str]] = [(None, "full-rank")]
        todo += [(budget, row) for budget in budgets for row in ROWS]
        for budget, row in todo:
            one = continuations.without() if budget is None else continuations.continued(budget, row)
            found["rows"].append({"budget": budget, "row": row, **one})
            found["seconds"] = time.perf_counter() - start
            found["done"] = (budget, row) == todo[-1]
            replace_file(file, (json.dumps(found) + "\n").encode())


def summarize(network: str, budget: float | None, row: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of the table."""
    line: dict[str, Any] = {"network": network, "budget": budget, "row": row, "seeds": len(runs)}
    for index, when in enumerate(WHEN):
        line[f"loss {when}"] = statistics.mean(one["tests"][index]["loss"] for one in runs)
    losses = [one["tests"][-1]["loss"] for one in runs]
    line["low-high"] = f"{min(losses):.3f} {max(losses):.3f}"
    for index, when in enumerate(WHEN):
        line[f"% {when}"] = round(100 * statistics.mean(one["tests"][index]["accuracy"] for one in runs), 2)
    if budget is not None:
        line["share"] = statistics.mean(one["share"] for one in runs)
    return line


def compared(network: str, budget: float, found: Mapping[Any, dict[int, Any]]) -> list[str]:
    """Whitened against plain rows, by the loss of each seed."""
    lines = []
    for row, plain in PAIRS:
        a, b = (found.get((network, budget, name), {}) for name in (row, plain))
        seeds = sorted(a.keys() & b.keys())
        parts = []
        for index, when in enumerate(WHEN):
            changes = [
                100 * (a[seed]["tests"][index]["loss"] / b[seed]["tests"][index]["loss"] - 1)
                for seed in seeds
            ]
            if changes:
                of_seeds = ", ".join(f"{change:+.0f}" for change in changes)
                parts.append(f"{when} {statistics.mean(changes):+.1f} % ({of_seeds})")
        if parts:
            lines.append(f"{network} at {budget}, loss of {row} against {plain}: {'; '.join(parts)}")
    return lines


def show(arguments: argparse.Namespace) -> None:
    """Writes the table of what there is so far."""
    found: dict[Any, dict[int, Any]] = {}
    for network in arguments.networks:
        for seed in range(arguments.seeds):
            file = Path(arguments.out) / f"{network}-{seed}.json"
            for one in json.loads(file.read_text())["rows"] if file.exists() else ():
                found.setdefault((network, one["budget"], one["row"]), {})[seed] = one
    notes = [
        note
        for network in arguments.networks
        for budget in arguments.budgets
        for note in compared(network, budget, found)
    ]
    if found:
        report(
            [
                summarize(network, budget, row, list(runs.values()))
                for (network, budget, row), runs in found.items()
            ],
            arguments.json,
            notes=notes,
        )


def run_all(arguments: argparse.Namespace) -> None:
    """Every network and seed in a process of its own, each on one core."""
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    cores: queue.Queue[int] = queue.Queue()
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    for job in range(arguments.jobs):
        cores.put(usable[job % len(usable)] if usable else -1)

    def run(network: str, seed: int) -> None:
        file = out / f"{network}-{seed}.json"
        if file.exists() and json.loads(file.read_text()).get("done"):
            return
        core = cores.get()
        words = [sys.executable, __file__, "--one", str(file), "--networks", network, "--seeds", str(seed)]
        words += ["--core", str(core), "--budgets", *map(str, arguments.budgets)]
        failed = subprocess.run(words, stdout=sys.stderr).returncode
        cores.put(core)
        print(f"{file.name}: {'failed' if failed else 'done'}", file=sys.stderr, flush=True)
        with contextlib.redirect_stdout(sys.stderr):
            show(arguments)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        # Seed after seed: what is cut off leaves some of every network.
        for seed in range(arguments.seeds):
            for network in arguments.networks:
                pool.submit(run, network, seed)
    show(arguments)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.125, 0.25])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, each on one core")
    parser.add_argument("--out", default="runs/rank_rules", help="where the results of every seed go")
    parser.add_argument("--json", help="write the table to this file too")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, default=-1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        if options.core >= 0:
            os.sched_setaffinity(0, {options.core})
        run_one(options.networks[0], options.seeds, Path(options.one), options.budgets)
    else:
        run_all(options)
