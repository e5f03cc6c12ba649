"""Methods side by side: the same configuration under each, several seeds, every run a process of train.py.

    python benchmarks/methods.py --config configs/quickstart.py --methods full_rank cuttlefish --seeds 3
    python benchmarks/methods.py --config configs/fashion_mnist.py --seeds 3 [--out runs/methods]
        [--json FILE] [-- --config.epochs=20 ...]

Methods are those of train.py, and two full-rank networks with fewer channels, between which lies the number
of parameters that cuttlefish came to with the same seed: ``narrow`` has at most so many, ``narrow_next`` one
more channel. Pufferfish and si_fd get as many, or a few more: their ratio is the smallest that gives them so
many. With ``--published`` the ratios are the configuration's own.

Runs that are finished in --out are not run again. What follows ``--`` goes to every run.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import report

import cuttlefish_jax as cf
from cuttlefish_jax.models import create_model

ROOT = Path(__file__).parents[1]
NARROW = ("narrow", "narrow_next")
METHODS = ("full_rank", "cuttlefish", "pufferfish", "si_fd", *NARROW)


def run(options: argparse.Namespace, method: str, seed: int, target: dict[str, Any] | None) -> dict[str, Any]:
    """The summary of one run; ``target`` is that of the network whose size it shall have."""
    workdir = Path(options.out).absolute() / f"{method}-{seed}"
    name = "full_rank" if method in NARROW else method
    settings = [f"--config={options.config}", *options.settings]
    settings += [f"--config.method={name}", f"--config.seed={seed}"]
    if target is not None and not (workdir / "summary.json").exists():
        settings += matched(options, method, target)
    elif target is not None:  # a finished run is asked for with the settings that it had
        config = json.loads((workdir / "config.json").read_text())
        settings += (
            [f"--config.model.width={config['model']['width']}"]
            if method in NARROW
            else [f"--config.{method}.rank_ratio={config[method]['rank_ratio']}"]
        )
    subprocess.run(
        [sys.executable, "train.py", *settings, f"--workdir={workdir}"],
        cwd=ROOT,
        check=True,
        stdout=sys.stderr,
    )
    return json.loads((workdir / "summary.json").read_text())


def matched(options: argparse.Namespace, method: str, target: dict[str, Any]) -> list[str]:
    """The setting that gives a method as many parameters as ``target`` has, or a few more."""
    config = load_config(options)
    width = config.model.width or 64
    if method in NARROW:
        sizes = {w: num_params(config, target, w) for w in range(1, width + 1)}
        fits = max([w for w, size in sizes.items() if size <= target["params_final"]], default=1)
        return [f"--config.model.width={fits + (method == 'narrow_next')}"]
    kernels = find_kernels(config, target, width)
    rules = [cf.Rule(pattern, keep=True) for pattern in config[method].keep]

    def size(percent: float) -> int:
        return cf.make_plan(kernels, rank_rule=cf.RankRatio(percent / 1000), rules=rules).num_params

    fits = smallest(range(10, 1000), size, target["params_final"])
    return [f"--config.{method}.rank_ratio={fits / 1000}"]


def smallest(values: range, size: Callable[[int], int], target: int) -> int:
    """The smallest of ``values`` whose ``size`` is at least ``target``, or the largest one of all."""
    return next((value for value in values if size(value) >= target), values[-1])


def find_kernels(config: Any, target: dict[str, Any], width: int) -> cf.Kernels:
    import jax

    options = {key: config.model[key] for key in ("stage_sizes", "stem") if config.model[key]}
    classes = {"cifar100": 100}.get(target["dataset"], 10)
    model = create_model(config.model.name, num_classes=classes, width=width, **options)
    size, channels = config.data.image_size, config.data.channels
    return cf.find_kernels(model, jax.ShapeDtypeStruct((1, size, size, channels), "float32"), train=False)


def num_params(config: Any, target: dict[str, Any], width: int) -> int:
    return find_kernels(config, target, width).num_params


def load_config(options: argparse.Namespace) -> Any:
    """The configuration of the runs, as train.py will have it."""
    file, _, argument = options.config.partition(":")
    spec = importlib.util.spec_from_file_location("config", ROOT / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(*[argument] if argument else [])
    for setting in options.settings:
        key, _, value = setting.removeprefix("--config.").partition("=")
        old = config
        for part in key.split("."):
            old = old[part]
        config.update_from_flattened_dict({key: value if isinstance(old, str) else ast.literal_eval(value)})
    return config


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains with every method and seed; the rows of the table."""
    matched_methods = {*NARROW, *(() if options.published else ("pufferfish", "si_fd"))}
    seeds = range(options.seeds)
    with ThreadPoolExecutor(options.jobs) as pool:
        # Alternating, so that a slow hour falls on all of them. What has to be as large as cuttlefish's
        # networks comes after these.
        free = [
            (method, seed) for seed in seeds for method in options.methods if method not in matched_methods
        ]
        runs = {key: pool.submit(run, options, *key, None) for key in free}
        bound = [(method, seed) for seed in seeds for method in options.methods if method in matched_methods]
        runs |= {
            key: pool.submit(lambda m, s: run(options, m, s, runs["cuttlefish", s].result()), *key)
            for key in bound
        }
        summaries = {key: done.result() for key, done in runs.items()}
    reference = summaries[options.methods[0], 0]
    return [row(method, [summaries[method, seed] for seed in seeds], reference) for method in options.methods]


def row(method: str, runs: list[dict[str, Any]], reference: dict[str, Any]) -> dict[str, Any]:
    """One line of the table; ratios are to the full-rank network of ``reference``."""
    accuracies = [100 * summary["test_score"] for summary in runs]
    mean = {
        key: statistics.mean(summary[key] for summary in runs)
        for key in ("params_final", "flops_final", "train_seconds", "rank_seconds", "epochs")
    }
    switches = [summary["switch_epoch"] for summary in runs]
    return {
        "method": method,
        f"test {runs[0]['metric']} %": f"{statistics.mean(accuracies):.2f}",
        "lowest-highest": f"{min(accuracies):.2f}-{max(accuracies):.2f}",
        "params": round(mean["params_final"]),
        "params x fewer": f"{reference['params_full'] / mean['params_final']:.2f}",
        "FLOPs x fewer": f"{reference['flops_full'] / mean['flops_final']:.2f}",
        "switch epochs": "-" if None in switches else " ".join(map(str, switches)),
        "train s": f"{mean['train_seconds']:.1f}",
        "s/epoch": f"{mean['train_seconds'] / mean['epochs']:.2f}",
        "measuring ranks %": f"{100 * mean['rank_seconds'] / mean['train_seconds']:.2f}",
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/fashion_mnist.py")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--published", action="store_true", help="the configuration's ratios, not matched")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, on as many cores")
    parser.add_argument("--out", default="runs/methods")
    parser.add_argument("--json", help="write the table to this file too")
    parser.add_argument("settings", nargs="*", help="for train.py, after --")
    arguments = parser.parse_args()
    report(compare(arguments), arguments.json)
