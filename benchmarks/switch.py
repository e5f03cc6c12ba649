"""The steps around the switch: does training notice it? The optimizer's state, the learning rate, batch norm.

    python benchmarks/switch.py [--seeds 5] [--networks resnet18 deit_tiny resmlp_s12] [--jobs 2]
        [--full] [--out runs/switch] [--picture FILE] [--json FILE]

The full-rank part of a seed is trained once, on scikit-learn's digits; all ways continue from there with the
same batches, at the ranks of the Cuttlefish rule, or, with --full, at full rank, where nothing is cut off and
what is left is what the switch does to training. ``no switch`` is the full-rank network going on. ``carried``
has plain, balanced factors, the optimizer's state in factor space, and the schedule going on.
``reset`` has a new optimizer at the same learning rate. ``x 1/3``, ``x 2``, ``restart`` and ``re-warm-up``
are the published rates, with carried state. ``projected``, what ``train.py`` does, is
``cf.precondition_factors``, ``whitened`` with factors that spare the layers' outputs; ``ScaledGD`` is the
same with ``once=False``, as published, at the learning rate and at half of it, which is half of it for all
parameters. Of networks that are trained with Adam, ``projected`` and ``projected / 2`` have
``normalized=True``, and ``before Adam`` preconditions the gradients instead of Adam's updates.

The bump after n steps is the mean loss of these steps on the training batches, in per cent above that of the
same steps without a switch; given are the mean over the seeds, the lowest and the highest. The test loss is
given right after the switch (with the running statistics of the full-rank network, and as ``anew`` with
those estimated on ten batches), after one epoch, and, of the ways that are trained so long, at the end of the
run. Runs that are finished in --out are not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import queue
import statistics
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import report
from learning_rates import NETWORKS as SETTINGS

import cuttlefish_jax as cf
from cuttlefish_jax.files import replace_file
from cuttlefish_jax.training.calibration import Calibrator
from cuttlefish_jax.training.epoch import evaluate
from cuttlefish_jax.training.experiment import Experiment
from cuttlefish_jax.training.method import plan_from_config
from cuttlefish_jax.training.recalibration import recalibrate
from cuttlefish_jax.training.recipe import make_optimizer
from cuttlefish_jax.training.schedule import after_switch
from cuttlefish_jax.training.step import make_eval_step, make_train_step

NETWORKS = ("resnet18", "deit_tiny", "resmlp_s12")
# Trained to the end of the run; the others for the steps around the switch alone.
TO_THE_END = (
    *("no switch", "carried", "reset", "x 1/3"),
    *("projected", "projected / 2", "projected, whitened", "ScaledGD / 2"),
)
# Batches that batch statistics are estimated on anew, and that show what layers are given.
BEFORE, AROUND, CALIBRATION_BATCHES = 100, 200, 10
# What the switch does to the learning rate: config.switch.learning_rate and .learning_rate_factor.
RATES = {
    "continue": ("continue", 1.0),
    "x 1/2": ("continue", 0.5),
    "x 1/3": ("continue", 1 / 3),
    "x 2": ("continue", 2.0),
    "restart": ("restart", 1.0),
    "re-warm-up": ("rewarmup", 1.0),
}
# Way -> how the factors are trained, how the learning rate goes on.
WAYS = {
    "carried": ("plain", "continue"),
    "reset": ("plain", "continue"),
    "x 1/3": ("plain", "x 1/3"),
    "x 2": ("plain", "x 2"),
    "restart": ("plain", "restart"),
    "re-warm-up": ("plain", "re-warm-up"),
    "projected": ("projected", "continue"),
    "projected / 2": ("projected", "x 1/2"),
    "projected, whitened": ("projected", "continue"),
}
SGD_WAYS = WAYS | {"ScaledGD": ("scaled", "continue"), "ScaledGD / 2": ("scaled", "x 1/2")}
ADAM_WAYS = WAYS | {"before Adam": ("before", "continue")}


def configured(network: str, seed: int) -> Any:
    make, settings = SETTINGS[network]
    config = make()
    settings = settings | {"plan.rank_rule": "scaled_stable_rank", "plan.keep": ()}
    config.update_from_flattened_dict(settings | {"model.name": network, "seed": seed})
    return config


@jax.jit
def copied(state: Any) -> Any:
    """The state in buffers of its own, for steps that take those of their argument."""

    def copy(leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(jnp.copy(jax.random.key_data(leaf)))
        return jnp.copy(leaf)

    return jax.tree.map(copy, state)


class Continuations:
    """One training, up to its switch, and the ways on from there."""

    def __init__(self, network: str, seed: int, *, full: bool):
        self.config = config = configured(network, seed)
        self.experiment = Experiment.from_config(config)
        self.steps = self.experiment.train.steps_per_epoch
        self.switch_step = config.switch.epoch * self.steps
        self.ways = SGD_WAYS if config.optimizer.name == "sgd" else ADAM_WAYS
        phase = self.experiment.phase()
        state = self.experiment.create_state(phase)
        ranks_0 = self._ranks(state)
        self.before, self.tests_before = [], {}
        for epoch in range(config.switch.epoch):
            state, losses = self.trained(phase.train_step, state, epoch)
            self.before += losses
        self.full, self.phase = state, phase
        plan = plan_from_config(config, self.experiment.kernels, self._ranks(state), ranks_0)
        if full:
            ranks = {path: self.experiment.kernels[path].max_rank for path in plan.ranks}
            plan = cf.FactorizationPlan.from_ranks(self.experiment.kernels, ranks)
        self.plan, self.low = plan, cf.factorize(self.experiment.model, plan)
        self.eval_low = make_eval_step(self.low.apply, self.experiment.task, num_splits=2)

    def _ranks(self, state: Any) -> Any:
        ranks = jax.device_get(cf.stable_ranks(state.params, self.experiment.kernels))
        return {path: rank.tolist() for path, rank in ranks.items()}

    def trained(self, step: Any, state: Any, epoch: int) -> tuple[Any, list[float]]:
        """The state after an epoch, and the losses of its steps."""
        losses = []
        for batch in self.experiment.train.epoch(epoch):
            state, metrics = step(state, self.experiment.train.resident, batch)
            losses.append(metrics["loss"])
        return state, [float(loss) for loss in losses]

    def without(self) -> dict[str, Any]:
        """The full-rank network going on."""
        return self._goes_on("no switch", self.phase.train_step, self.phase.eval_step, copied(self.full))

    def _goes_on(self, name: str, step: Any, eval_step: Any, state: Any) -> dict[str, Any]:
        found: dict[str, Any] = {"losses": [], "tests": [self._test(eval_step, state)]}
        first, last = self.config.switch.epoch, self.config.epochs
        around = first + -(-AROUND // self.steps)
        for epoch in range(first, last if name in TO_THE_END else around):
            state, losses = self.trained(step, state, epoch)
            found["losses"] += losses
            if epoch in (first, last - 1):
                found["tests"].append(self._test(eval_step, state))
        return found

    def _test(self, eval_step: Any, state: Any) -> dict[str, float]:
        return evaluate(eval_step, state.eval_variables, self.experiment.evaluation["test"], ("accuracy",))

    @functools.cache  # noqa: B019 (one object a process)
    def _step(self, kind: str) -> tuple[Any, Any]:
        """One compiled step for all learning rates: the count of the schedule says which of them it is."""
        length = dict(epochs=self.config.epochs, steps_per_epoch=self.steps)
        table = []
        for rule, factor in RATES.values():
            switch = self.config.switch.copy_and_resolve_references()
            switch.learning_rate, switch.learning_rate_factor = rule, factor
            schedule = after_switch(
                self.experiment.schedule, self.switch_step, self.config.schedule, switch, **length
            )
            table.append(jax.vmap(schedule)(jnp.arange(self._total)))
        rates = jnp.concatenate(table)
        optimizer = self.config.optimizer.copy_and_resolve_references()
        optimizer.precondition = kind in ("projected", "scaled")
        tx = make_optimizer(optimizer, lambda count: rates[count], plan=self.plan)
        if kind == "before":
            tx = optax.chain(cf.precondition_factors(self.plan, once=False), tx)
        if kind == "scaled":
            tx = _as_published(optimizer, lambda count: rates[count], self.plan)
        return tx, make_train_step(self.experiment.task, ema=0.0)

    @property
    def _total(self) -> int:
        return self.config.epochs * self.steps

    @functools.cached_property
    def _calibration(self) -> dict[str, jax.Array]:
        calibrator = Calibrator(self.experiment.task, self.experiment.model, self.experiment.kernels)
        epoch = self.config.switch.epoch
        return calibrator.measure(self.full, self.experiment.train, epoch=epoch, batches=CALIBRATION_BATCHES)

    def way(self, name: str) -> dict[str, Any]:
        """How training goes on: losses of its steps, results on the test data."""
        kind, rate = self.ways[name]
        tx, step = self._step(kind)
        state = cf.switch(
            copied(self.full),
            self.plan,
            tx,
            apply_fn=self.low.apply,
            calibration=self._calibration if "whitened" in name else None,
        )
        if name == "reset":
            state = state.replace(opt_state=tx.init(state.params))
        count = list(RATES).index(rate) * self._total + self.switch_step

        def with_rate(part: Any) -> Any:
            is_schedule = isinstance(part, optax.ScaleByScheduleState)
            return part._replace(count=jnp.asarray(count, jnp.int32)) if is_schedule else part

        is_schedule = lambda part: isinstance(part, optax.ScaleByScheduleState)  # noqa: E731
        state = copied(state.replace(opt_state=jax.tree.map(with_rate, state.opt_state, is_leaf=is_schedule)))
        anew = recalibrate(
            self.experiment.task,
            state,
            self.experiment.train,
            epoch=self.config.switch.epoch,
            batches=CALIBRATION_BATCHES if name == "carried" else 0,
        )
        tested = self._test(self.eval_low, anew)
        return self._goes_on(name, step, self.eval_low, state) | {"recalibrated": tested}


def _as_published(config: Any, schedule: Any, plan: Any) -> optax.GradientTransformation:
    """The recipe's SGD with ScaledGD in the place of the projected step."""
    plain = config.copy_and_resolve_references()
    plain.precondition, plain.frobenius_decay = False, config.frobenius_decay or config.weight_decay
    with_momentum = make_optimizer(plain, optax.constant_schedule(-1.0), plan=plan)  # minus the direction
    rate = optax.scale_by_learning_rate(schedule)
    return optax.chain(with_momentum, cf.precondition_factors(plan, once=False), rate)


def run_one(network: str, seed: int, file: Path, *, full: bool) -> None:
    """All ways of one seed; the file is written anew after each."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        continuations = Continuations(network, seed, full=full)
        plan = continuations.plan
        found: dict[str, Any] = {
            "network": network,
            "seed": seed,
            "params": [plan.num_params_full, plan.num_params],
            "before": continuations.before[-BEFORE:],
            "ways": {"no switch": continuations.without()},
        }
        for name in continuations.ways:
            found["ways"][name] = continuations.way(name)
            found["seconds"] = time.perf_counter() - start
            found["done"] = name == list(continuations.ways)[-1]
            replace_file(file, (json.dumps(found) + "\n").encode())


def bump(found: dict[str, Any], way: str, steps: int) -> float:
    """Per cent above the loss of the same steps without a switch."""
    after, without = (np.mean(found["ways"][name]["losses"][:steps]) for name in (way, "no switch"))
    return 100 * (after / without - 1)


def row(runs: list[dict[str, Any]], way: str) -> dict[str, Any]:
    """One line of the table."""
    runs = [found for found in runs if way in found["ways"]]
    ways = [found["ways"][way] for found in runs]
    line: dict[str, Any] = {"network": runs[0]["network"], "way": way, "seeds": len(runs)}
    for steps in (20, 100, AROUND):
        bumps = [bump(found, way, steps) for found in runs]
        line[f"bump {steps} %"] = f"{statistics.mean(bumps):+.1f}"
        line["low-high" if steps == 20 else f"low-high {steps}"] = f"{min(bumps):+.0f} {max(bumps):+.0f}"
    for index, when in enumerate(("test loss at switch", "after an epoch", "at the end")):
        if all(len(one["tests"]) > index for one in ways):
            line[when] = statistics.mean(one["tests"][index]["loss"] for one in ways)
            accuracy = statistics.mean(one["tests"][index]["accuracy"] for one in ways)
            line["accuracy %"] = f"{100 * accuracy:.2f}" if index == 2 else None
    if way == "carried":
        line["anew"] = statistics.mean(one["recalibrated"]["loss"] for one in ways)
    return line


def draw(results: dict[str, list[dict[str, Any]]], file: str, ways: list[str]) -> None:
    """Mean losses of the seeds around the switch, one picture for each network, smoothed over 10 steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(results), 3.6), layout="constrained")
    all_axes = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (network, runs) in zip(all_axes, results.items(), strict=True):
        for way in ("no switch", *ways):
            curves = [
                found["before"] + found["ways"][way]["losses"][:AROUND]
                for found in runs
                if way in found["ways"]
            ]
            if not curves:
                continue
            mean = np.mean(curves, axis=0)
            before = len(mean) - AROUND
            # Never over the switch: what comes before it must not look better or worse than it is.
            halves = [np.convolve(half, np.ones(10) / 10, "valid") for half in (mean[:before], mean[before:])]
            steps = [np.arange(len(half)) + 4.5 for half in halves]
            style = {"color": "black"} if way == "no switch" else {}
            (line,) = axes.plot(steps[1], halves[1], label=way, linewidth=1.2, **style)
            if way == "no switch":
                axes.plot(steps[0] - before, halves[0], color=line.get_color(), linewidth=1.2)
        axes.axvline(0, color="grey", linewidth=0.8, linestyle=":")
        axes.set(title=f"{network}, {len(runs)} seeds", xlabel="steps after the switch", yscale="log")
    all_axes[0].set_ylabel("training loss")
    all_axes[-1].legend(fontsize="small")
    figure.savefig(file, dpi=120)


def run_all(arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Every network and seed in a process of its own, each on one core; what there is of their results."""
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    cores: queue.Queue[int] = queue.Queue()
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    for job in range(arguments.jobs):
        cores.put(usable[job % len(usable)] if usable else -1)

    def run(network: str, seed: int) -> None:
        file = out / f"{network}-{seed}{'-full' * arguments.full}.json"
        if file.exists() and json.loads(file.read_text()).get("done"):
            return
        core = cores.get()
        words = [sys.executable, __file__, "--one", str(file), "--networks", network, "--seeds", str(seed)]
        words += ["--core", str(core)] + ["--full"] * arguments.full
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
    return show(arguments)


def show(arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Writes the table and the picture of what there is so far."""
    results: dict[str, list[dict[str, Any]]] = {}
    for network in arguments.networks:
        for seed in range(arguments.seeds):
            file = Path(arguments.out) / f"{network}-{seed}{'-full' * arguments.full}.json"
            if file.exists():
                results.setdefault(network, []).append(json.loads(file.read_text()))
    rows = []
    for runs in results.values():
        ways = dict.fromkeys(way for found in runs for way in found["ways"])
        rows += [row(runs, way) for way in ways]
    notes = [
        f"{network}: {runs[0]['params'][0] / runs[0]['params'][1]:.2f}x fewer parameters, "
        f"{statistics.mean(found['seconds'] for found in runs):.0f} s a seed"
        for network, runs in results.items()
    ]
    if rows:
        report(rows, arguments.json, notes=notes)
    if arguments.picture and results:
        draw(results, arguments.picture, ["carried", "reset", "x 1/3", "restart", "projected"])
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, each on one core")
    parser.add_argument("--full", action="store_true", help="factorized at full rank")
    parser.add_argument("--out", default="runs/switch", help="where the results of every seed go")
    parser.add_argument("--picture", help="draw the losses around the switch into this file")
    parser.add_argument("--json", help="write the table to this file too")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, default=-1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        if options.core >= 0:
            os.sched_setaffinity(0, {options.core})
        run_one(options.networks[0], options.seeds, Path(options.one), full=options.full)
    else:
        run_all(options)
