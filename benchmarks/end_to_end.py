"""Time to the full-rank network's accuracy: ordinary training against Cuttlefish, from the start to the end.

    python benchmarks/end_to_end.py [--experiments resnet18 vit] [--seeds 3] [--json FILE]
    python benchmarks/end_to_end.py --experiments resnet18_gpu --seeds 1 -- --config.data.data_dir=FOLDER

Trains on Fashion-MNIST with every method and seed, in turn, each run a process of train.py of its own.
``cuttlefish`` has the ranks of the paper's rule, which for a ViT is the larger of scaled stable and
accumulative rank; ``scaled`` has scaled stable ranks alone, and ``budget`` as many parameters as --budget
allows; ``whitened`` is that with ranks and factors that spare the layers' outputs, measured on ten batches.
The accuracy to reach is the mean of the full-rank network's last three test accuracies with the same seed,
and "s to accuracy" the end of the first evaluated epoch that reaches it, or comes within 0.3 points of it.
Time is that of training, of measuring ranks and layers, and of the switch, without compilation, evaluation
and the writing of checkpoints. "stall s" is what the run waited for at the switch, compiling included.

The table is written anew after every run. Runs that are finished in --out are not run again. What follows
``--`` goes to every run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from common import report

ROOT = Path(__file__).parents[1]
NEAR = 0.003  # accuracies that differ by no more are called equal
METHODS = ("full_rank", "cuttlefish", "scaled", "budget", "whitened")
LAST = 3  # evaluated epochs whose mean is the final accuracy

_SMALL = {"model.dtype": "float32", "data.train_examples": 2000, "epochs": 30, "evaluation.every_epochs": 3}
# Without the regularisation and the average of the ImageNet recipe, which are for 300 epochs.
_SHORT = {"data.mixup": 0.0, "data.cutmix": 0.0, "data.repeated_augmentation": 1, "model.drop_path": 0.0}
_SHORT |= {"optimizer.ema": 0.0, "loss.label_smoothing": 0.0}
EXPERIMENTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    # At the size of two CPU cores: the stem of ImageNet leaves 7x7 pixels of 28x28.
    "resnet18": (
        "configs/fashion_mnist.py",
        _SMALL | {"model.width": 32, "model.stem": "imagenet"},
    ),
    "vit": (
        "configs/deit_base.py:fashion_mnist",
        _SMALL
        | _SHORT
        | {"model.width": 192, "model.depth": 4, "model.heads": 3, "model.patch": 7, "batch_size": 64}
        | {"schedule.warmup_epochs": 3.0, "data.image_size": 28, "data.channels": 1, "data.crop_padding": 2},
    ),
    # The whole data set and the whole networks, for an accelerator.
    "resnet18_gpu": (
        "configs/resnet18.py:fashion_mnist",
        {"epochs": 20, "schedule.name": "cosine", "schedule.warmup_epochs": 2.0, "schedule.peak": 0.4},
    ),
    "vit_gpu": (
        "configs/deit_base.py:fashion_mnist",
        _SHORT | {"epochs": 20, "model.depth": 6, "model.heads": 6, "model.width": 384},
    ),
}


def settings(method: str, budget: str) -> dict[str, Any]:
    """What makes a configuration the method."""
    if method == "full_rank":
        return {"method": "full_rank", "profile.enabled": False}
    ranks: dict[str, dict[str, Any]] = {
        "scaled": {"plan.rank_rule": "scaled_stable_rank"},
        "budget": {"plan.budget": budget},
        "whitened": {"plan.budget": budget, "plan.calibration_batches": 10},
    }
    return {"method": "cuttlefish"} | ranks.get(method, {})


def run(options: argparse.Namespace, experiment: str, method: str, seed: int) -> dict[str, Any]:
    """One run of train.py: its summary, and what its epochs took."""
    workdir = Path(options.out).absolute() / f"{experiment}-{method}-{seed}"
    config, own = EXPERIMENTS[experiment]
    wanted = {"evaluation.every_epochs": 1, "checkpoint.every_epochs": 1000, **own, "seed": seed}
    wanted |= settings(method, options.budget)
    flags = [f"--config.{key}={value}" for key, value in wanted.items()]
    subprocess.run(
        [sys.executable, "train.py", f"--config={config}", *flags, *options.settings, f"--workdir={workdir}"],
        cwd=ROOT,
        check=True,
        stdout=sys.stderr,
    )
    epochs = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {"summary": json.loads((workdir / "summary.json").read_text()), "epochs": epochs}


def timeline(done: Mapping[str, Any]) -> list[tuple[float, float]]:
    """``(seconds so far, test accuracy)`` at the end of every epoch that was evaluated."""
    summary, seconds, points = done["summary"], done["summary"]["profile_seconds"], []
    for epoch in done["epochs"]:
        if epoch["epoch"] == summary["switch_epoch"]:
            seconds += summary["switch_seconds"]
        seconds += epoch["seconds"] + epoch["rank_seconds"]
        if epoch["test_accuracy"] is not None:
            points.append((seconds, epoch["test_accuracy"]))
    return points


def final_accuracy(done: Mapping[str, Any]) -> float:
    return statistics.mean(accuracy for _, accuracy in timeline(done)[-LAST:])


def seconds_to(done: Mapping[str, Any], accuracy: float) -> float | None:
    """When a run reached the accuracy, None if it never did."""
    return next((seconds for seconds, reached in timeline(done) if reached >= accuracy), None)


def row(experiment: str, method: str, pairs: Sequence[tuple[Mapping[str, Any], ...]]) -> dict[str, Any]:
    """One line of the table, of ``(run, full-rank run of the same seed)``."""
    runs, fulls = zip(*pairs, strict=True)
    totals = [timeline(done)[-1][0] for done in runs]
    params = statistics.mean(done["summary"]["params_final"] for done in runs)
    line = {
        "experiment": experiment,
        "method": method,
        "seeds": len(runs),
        "test accuracy %": 100 * statistics.mean(map(final_accuracy, runs)),
        "params": round(params),
        "total s": statistics.median(totals),
        "compile s": statistics.median(done["summary"]["compile_seconds"] for done in runs),
    }
    targets = [final_accuracy(full) for full in fulls]
    if method == "full_rank":
        own = [seconds_to(full, target) for full, target in pairs_of(fulls, targets)]
        return line | {"s to accuracy": median(own)}
    within = [
        (seconds_to(full, target - NEAR), seconds_to(done, target - NEAR))
        for done, full, target in zip(runs, fulls, targets, strict=True)
    ]
    exact = [
        (seconds_to(full, target), seconds_to(done, target))
        for done, full, target in zip(runs, fulls, targets, strict=True)
    ]
    speedups = [found for done in runs if (found := epoch_speedup(done)) is not None]
    gains = [100 * (final_accuracy(done) - target) for done, target in zip(runs, targets, strict=True)]
    return line | {
        "points more": statistics.mean(gains),
        "of": ", ".join(f"{gain:+.2f}" for gain in gains),
        "params x fewer": fulls[0]["summary"]["params_full"] / params,
        "x faster": statistics.median(
            timeline(full)[-1][0] / total for full, total in zip(fulls, totals, strict=True)
        ),
        "x faster, low-rank epochs": statistics.median(speedups) if speedups else None,
        "switch epochs": " ".join(str(done["summary"]["switch_epoch"]) for done in runs),
        "s to accuracy": median(own for _, own in exact),
        "x faster to it": faster(exact),
        "x faster to within 0.3": faster(within),
        "measuring layers s": statistics.median(done["summary"]["profile_seconds"] for done in runs),
        "switch s": statistics.median(done["summary"]["switch_seconds"] for done in runs),
        "stall s": statistics.median(done["summary"]["switch_stall_seconds"] or 0.0 for done in runs),
    }


def pairs_of(*columns: Iterable[Any]) -> Iterable[tuple[Any, ...]]:
    return zip(*columns, strict=True)


def median(values: Iterable[float | None]) -> str | float:
    """The median of seeds that all have a value."""
    found = list(values)
    known = [value for value in found if value is not None]
    return statistics.median(known) if len(known) == len(found) else f"{len(known)} of {len(found)} got there"


def faster(pairs: Iterable[tuple[float | None, float | None]]) -> str | float:
    return median(full / own if full and own else None for full, own in pairs)


def epoch_speedup(done: Mapping[str, Any]) -> float | None:
    """Of a low-rank epoch over a full-rank one of the same run, which the same hour of the machine saw."""
    seconds = {name: [e["seconds"] for e in done["epochs"] if e["phase"] == name] for name in _PHASES}
    full, low = seconds.values()
    return statistics.median(full) / statistics.median(low) if full and low else None


_PHASES = ("full_rank", "low_rank")


def table(
    options: argparse.Namespace, done: Mapping[tuple[str, str, int], Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The rows of the runs that are done; a method's seeds count from when its full-rank runs are."""
    rows = []
    for experiment in options.experiments:
        for method in options.methods:
            pairs = [
                (done[experiment, method, seed], done[experiment, "full_rank", seed])
                for seed in range(options.seeds)
                if {(experiment, method, seed), (experiment, "full_rank", seed)} <= done.keys()
            ]
            if pairs:
                rows.append(row(experiment, method, pairs))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiments", nargs="+", default=["resnet18", "vit"], choices=list(EXPERIMENTS))
    parser.add_argument(
        "--methods", nargs="+", default=["full_rank", "cuttlefish", "budget"], choices=METHODS
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", default="parameters:0.25", help="of the method budget")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, on as many cores")
    parser.add_argument("--out", default="runs/end_to_end")
    parser.add_argument("--json", help="write the table to this file too")
    parser.add_argument("settings", nargs="*", help="for train.py, after --")
    options = parser.parse_args()
    # Alternating, so that a slow hour falls on all of them.
    keys = [(e, m, s) for e in options.experiments for s in range(options.seeds) for m in options.methods]
    notes = [f"{name}: {EXPERIMENTS[name]}" for name in options.experiments] + [f"budget {options.budget}"]
    done: dict[tuple[str, str, int], dict[str, Any]] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = {pool.submit(run, options, *key): key for key in keys}
        for finished in as_completed(runs):
            done[runs[finished]] = finished.result()
            if rows := table(options, done):
                report(rows, options.json, notes=[*notes, f"{len(done)} of {len(keys)} runs"])


if __name__ == "__main__":
    main()
