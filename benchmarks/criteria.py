"""Switching at the right time: what each criterion would have done in recorded runs, and what came of it.

    python benchmarks/criteria.py --trajectories tests/data/trajectories
    python benchmarks/criteria.py --record [--networks resnet18 ...] [--seeds 3] [--jobs 2]
    python benchmarks/criteria.py --train --jobs 5 [--json FILE] [--picture FILE]
    python benchmarks/criteria.py --train --networks bert_base --weights FOLDER [--data_dir FOLDER]

The first replays every criterion on stable ranks that were recorded in full-rank training. One that gives no
verdict by the deadline of the configuration switches there, as train.py would. ``reference`` is the detector
of the paper's implementation with the preset for that kind of network; ``mean layer's plateau`` waits for the
layers on average, and ``marginal benefit`` weighs what a switch would save against what waiting would.

``--record`` first trains every network full-rank to the end, once for each seed, and leaves the stable ranks
in --trajectories. ``--train`` trains again too, and switches where the criteria say and, for comparison, at
fixed shares of the run: what the right time would have been. Networks are small ones on scikit-learn's
digits, and BERT on sentences of SST-2, from weights and a tokenizer in --weights, which no package of the
project has. Ranks are those of the scaled stable rank, so they depend on the epoch. "FLOPs" are those of
training, with full-rank training as 100 %; times are of median epochs, without compiling. Runs that are
finished in --out are not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from common import report
from criteria_prototypes import MarginalBenefit, MeanPlateau
from criteria_runs import NETWORKS, Places, train

import cuttlefish_jax as cf
from cuttlefish_jax.training.experiment import Experiment
from cuttlefish_jax.training.method import deadline, plan_from_config

SHARES = (0.1, 0.3, 0.7)
Key = tuple[str, int, "int | None"]  # network, seed, epoch of the switch


CRITERIA = ("relative plateau", "mean layer's plateau", "marginal benefit", "reference")


def criterion(name: str, network: str, kernels: cf.Kernels, epochs: int) -> cf.Criterion:
    """One of CRITERIA, for a run of so many epochs."""
    made: dict[str, cf.Criterion] = {
        "relative plateau": cf.RelativePlateau(),
        "mean layer's plateau": MeanPlateau(),
        "marginal benefit": MarginalBenefit.of(kernels, epochs=epochs),
        "reference": NETWORKS[network].reference,
    }
    return made[name]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a criterion does in one recorded run.

    Attributes:
      epoch: of the switch.
      is_verdict: whether it is the criterion's own, and not the deadline.
      smaller: by how much the network is, in parameters, at the scaled stable ranks of that epoch.
      drift: largest relative change of a stable rank from there to the end.
    """

    epoch: int
    is_verdict: bool
    smaller: float
    drift: float


def choose(rule: cf.Criterion, history: Mapping[str, list[float]], config: Any, kernels: Any) -> Choice:
    """Replays a criterion on ``{path: stable ranks}``, the initialisation first."""
    tracker = cf.RankTracker(rule)
    last = deadline(config) or config.epochs
    for values in list(zip(*history.values(), strict=True))[: last + 1]:
        if tracker.update(dict(zip(history, values, strict=True))):
            break
    verdict = tracker.switch_epoch
    epoch = last if verdict is None else min(verdict, last)
    at = {i: {path: ranks[i] for path, ranks in history.items()} for i in (0, epoch, -1)}
    return Choice(
        epoch=epoch,
        is_verdict=verdict == epoch,
        smaller=kernels.num_params / plan_from_config(config, kernels, at[epoch], at[0]).num_params,
        drift=max(abs(at[-1][path] / at[epoch][path] - 1) for path in history),
    )


class Comparison:
    """All that is known so far of the runs, and the table and the picture of it."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.places = Places(
            out=Path(options.out).absolute(),
            trajectories=Path(options.trajectories or f"{options.out}/trajectories").absolute(),
            weights=options.weights,
            data_dir=options.data_dir,
        )
        self.kernels: dict[str, cf.Kernels] = {}
        self.choices: dict[tuple[str, str], dict[int, Choice]] = {}
        self.runs: dict[Key, dict[str, Any]] = {}
        self.failed: list[str] = []

    def config(self, network: str) -> Any:
        """Of a run that waits for its ranks, and so has a deadline."""
        config = self.places.config(network, 0, 0)
        config.switch.criterion = "relative_plateau"
        return config

    def replay(self, network: str, seed: int) -> None:
        """Asks every criterion about one recorded run."""
        history = json.loads(self.places.trajectory(network, seed).read_text())["history"]
        config = self.config(network)
        if network not in self.kernels:
            self.kernels[network] = Experiment.from_config(config).kernels
        kernels = self.kernels[network]
        for name in CRITERIA:
            choice = choose(criterion(name, network, kernels, config.epochs), history, config, kernels)
            self.choices.setdefault((network, name), {})[seed] = choice

    def replay_all(self) -> None:
        """Asks about all recorded runs that there are."""
        for network in self.options.networks:
            for seed in range(self.options.seeds):
                if self.places.trajectory(network, seed).exists():
                    self.replay(network, seed)

    def fixed(self, network: str) -> dict[str, int]:
        """Epochs of switches at fixed shares of the run, by their names in the table."""
        epochs = self.config(network).epochs
        return {f"at {share:.0%}": round(share * epochs) for share in SHARES}

    def train_all(self) -> None:
        """Trains and replays; what is known is written after every run, should this be cut off."""
        stop, options = time.monotonic() + 60 * self.options.minutes, self.options
        pending: dict[Key, tuple[int, int]] = {}  # the most telling ones first
        for seed in range(options.seeds):
            for network in options.networks:
                pending[network, seed, None] = (seed, 0)
                for epoch in self.fixed(network).values() if options.train else ():
                    pending[network, seed, epoch] = (seed, 2)
        with workers(options.jobs) as pool:
            running: dict[Future[dict[str, Any]], Key] = {}
            while running or (pending and time.monotonic() < stop):
                while pending and len(running) < options.jobs and time.monotonic() < stop:
                    key = min(pending, key=pending.__getitem__)
                    del pending[key]
                    running[pool.submit(train, self.places, *key)] = key
                done = next(as_completed(running))
                network, seed, epoch = key = running.pop(done)
                if error := done.exception():  # the others can do without
                    self.failed.append(f"{key}: {error}")
                    continue
                self.runs[key] = done.result()
                if epoch is None:
                    self.replay(network, seed)
                    chosen: set[Key] = {
                        (network, seed, self.choices[network, name][seed].epoch) for name in CRITERIA
                    }
                    if options.train:
                        pending |= dict.fromkeys(chosen - {*running.values(), *self.runs}, (seed, 1))
                with contextlib.redirect_stdout(None):
                    self.report()

    def report(self) -> None:
        """The table."""
        rows = [row for network in self.options.networks for row in self.rows(network)]
        if rows:
            report(rows, self.options.json, notes=NOTES)

    def rows(self, network: str) -> list[dict[str, Any]]:
        """The lines of one network."""
        rows = []
        for name in CRITERIA:
            if found := self.choices.get((network, name)):
                shown = [f"{c.epoch}{'' if c.is_verdict else '!'}" for c in found.values()]
                rows.append(
                    {"network": network, "switch": name, "epochs": " ".join(shown)}
                    | {
                        "later drift %": 100 * max(c.drift for c in found.values()),
                        "params x fewer": statistics.mean(c.smaller for c in found.values()),
                    }
                    | self._outcome(network, {seed: c.epoch for seed, c in found.items()})
                )
        ways: dict[str, int | None] = {"never": None, **(self.fixed(network) if self.options.train else {})}
        for name, epoch in ways.items():
            seeds = {seed: epoch for n, seed, e in self.runs if (n, e) == (network, epoch)}
            if seeds:
                shown = "" if epoch is None else str(epoch)
                rows.append(
                    {"network": network, "switch": name, "epochs": shown} | self._outcome(network, seeds)
                )
        return rows

    def _outcome(self, network: str, epoch_of: Mapping[int, int | None]) -> dict[str, Any]:
        """What came of the runs of these seeds that are finished."""
        runs = {s: self.runs[network, s, e] for s, e in epoch_of.items() if (network, s, e) in self.runs}
        if not runs:
            return {}
        losses = [run["test_loss"] for run in runs.values()]
        cost = [_training_flops(run) for run in runs.values()]
        return {
            "seeds": len(runs),
            "test loss": statistics.mean(losses),
            "least-most": f"{min(losses):.3f}-{max(losses):.3f}",
            "test accuracy %": 100 * statistics.mean(run["test_accuracy"] for run in runs.values()),
            "params x fewer": statistics.mean(r["params_full"] / r["params_final"] for r in runs.values()),
            "FLOPs %": 100 * statistics.mean(cost),
            "train s": statistics.mean(run["seconds_of_epochs"] for run in runs.values()),
        }

    def picture(self, file: str) -> None:
        """Test loss and time over the epoch of the switch: all runs, and the means of the criteria's."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        networks = [n for n in self.options.networks if any(key[0] == n for key in self.runs)]
        size = (3.6 * len(networks), 5.5)
        figure, axes = plt.subplots(
            2, len(networks), figsize=size, sharex="col", squeeze=False, layout="constrained"
        )
        for column, network in zip(axes.T, networks, strict=True):
            rows = {row["switch"]: row for row in self.rows(network) if "test loss" in row}
            runs = [(e, run) for (n, _, e), run in self.runs.items() if n == network and e is not None]
            keys = {"test loss": "test_loss", "train s": "seconds_of_epochs"}
            for axis, (shown, key) in zip(column, keys.items(), strict=True):
                axis.plot([e for e, _ in runs], [run[key] for _, run in runs], ".", color="silver")
                fixed = [row for row in rows.values() if row["switch"].startswith("at ")]
                axis.plot([int(row["epochs"]) for row in fixed], [row[shown] for row in fixed], color="gray")
                if "never" in rows:
                    axis.axhline(rows["never"][shown], color="black", linestyle=":", label="full-rank")
                for i, name in enumerate(CRITERIA):
                    if name in rows:
                        mean = statistics.mean(c.epoch for c in self.choices[network, name].values())
                        axis.plot(mean, rows[name][shown], "Dso^"[i], color=f"C{i}", label=name)
                axis.set(ylabel=shown, xlim=(0, self.config(network).epochs))
                axis.margins(y=0.1)
                axis.set_ylim(bottom=0)
            column[0].set_title(network)
            column[1].set_xlabel("epoch of the switch")
        shown = [axis.get_legend_handles_labels() for axis in axes[0]]
        handles = {label: handle for pair in shown for handle, label in zip(*pair, strict=True)}
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles))
        figure.savefig(file)


def _training_flops(run: Mapping[str, Any]) -> float:
    """Of a run, as a share of full-rank training's; forward and backward passes cost alike."""
    epochs = run["epochs"]
    full = epochs if run["switch_epoch"] is None else run["switch_epoch"]
    return (full + (epochs - full) * run["flops_final"] / run["flops_full"]) / epochs


def workers(number: int) -> ProcessPoolExecutor:
    """Processes, each on a core of its own if there are as many."""
    context = multiprocessing.get_context("spawn")
    cores = context.SimpleQueue()
    for core in sorted(os.sched_getaffinity(0))[:number]:
        cores.put(core)
    return ProcessPoolExecutor(number, mp_context=context, initializer=_take_core, initargs=(cores,))


def _take_core(cores: Any) -> None:
    if not cores.empty():
        os.sched_setaffinity(0, {cores.get()})


NOTES = (
    "epochs: of the switch, for each seed; ! is the deadline, without a verdict",
    "later drift: the largest change of a stable rank from there to the end of full-rank training",
)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS)[:-1], choices=list(NETWORKS))
    parser.add_argument("--record", action="store_true", help="train full-rank")
    parser.add_argument("--train", action="store_true", help="train full-rank and with switches")
    parser.add_argument(
        "--trajectories", help="folder of the recorded ranks; trajectories/ in --out if not given"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on a core of its own")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run later than that")
    parser.add_argument("--weights", default="", help="a folder with pre-trained weights of the BERT family")
    parser.add_argument("--data_dir", default="", help="where the prepared GLUE is")
    parser.add_argument("--out", default="runs/criteria")
    parser.add_argument("--json", help="write the table to this file too")
    parser.add_argument("--picture", help="draw test loss and time over the epoch of the switch")
    arguments = parser.parse_args()
    if "bert_base" in arguments.networks and not arguments.weights:
        parser.error("bert_base needs --weights FOLDER")
    comparison = Comparison(arguments)
    if arguments.record or arguments.train:
        comparison.train_all()
    else:
        comparison.replay_all()
    comparison.report()
    if arguments.picture and comparison.runs:
        comparison.picture(arguments.picture)
    if comparison.failed:
        raise SystemExit("\n".join(["these runs failed:", *comparison.failed]))
