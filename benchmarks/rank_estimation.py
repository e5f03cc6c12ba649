"""Stable ranks, four ways, side by side: time, and error against a float64 SVD.

- ``svdvals``: ``scipy.linalg.svdvals`` of every kernel on the host, what the published implementation does;
- ``exact`` and ``lanczos``: the two methods of ``cuttlefish_jax.stable_ranks``;
- ``one pass``: a jitted sum of squares of every kernel, the least that touching the weights costs.

The four take turns in every repeat, after a call that compiles, and the medians are reported. A second table
has the errors of ``lanczos`` over many random matrices::

    python benchmarks/rank_estimation.py [--repeats 3] [--only resnet18] [--run runs/NAME] [--json FILE]

About ten minutes on two CPU cores, most of them in svdvals. Weights are Gaussian, as at initialisation, or
trained-like: singular values falling as 1/i with random singular vectors. With ``--run``, also those in the
last checkpoint of a full-rank run of train.py.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from common import report
from flax import traverse_util

from cuttlefish_jax.kernels import Kernel, subtree
from cuttlefish_jax.spectra import stable_ranks
from cuttlefish_jax.training.checkpoint import Checkpointer
from cuttlefish_jax.training.config import default_config
from cuttlefish_jax.training.experiment import Experiment


def conv(path: str, inputs: int, outputs: int, window: int = 3) -> Kernel:
    shape = (window, window, inputs, outputs)
    return Kernel(path=path, layer="Conv", shape=shape, reduction_axes=(0, 1, 2), output_axes=(3,))


def dense(path: str, inputs: int, outputs: int) -> Kernel:
    return Kernel(path=path, layer="Dense", shape=(inputs, outputs), reduction_axes=(0,), output_axes=(1,))


def resnet18() -> list[Kernel]:
    """All kernels of the CIFAR ResNet-18: the sixteen 3x3 convolutions, stem, shortcuts, classifier."""
    kernels = [conv("stem", 3, 64), dense("head", 512, 10)]
    before = 64
    for stage, width in enumerate((64, 128, 256, 512), 1):
        kernels += [conv(f"stage{stage}_conv{i}", before if i == 1 else width, width) for i in range(1, 5)]
        if before != width:
            kernels.append(conv(f"stage{stage}_shortcut", before, width, window=1))
        before = width
    return kernels


def deit_base() -> list[Kernel]:
    """The kernels of the twelve blocks of DeiT-base."""
    shapes = {"qkv": (768, 2304), "proj": (768, 768), "fc1": (768, 3072), "fc2": (3072, 768)}
    return [dense(f"block{i}_{name}", *shape) for i in range(12) for name, shape in shapes.items()]


def width_4096() -> list[Kernel]:
    """One attention and one feed-forward kernel of a 7B language model."""
    return [dense("attention", 4096, 4096), dense("feed_forward", 4096, 11008)]


NETWORKS = {"resnet18": resnet18, "deit_base": deit_base, "width_4096": width_4096}


def make_params(kernels: list[Kernel], weights: str) -> dict[str, np.ndarray]:
    """Random kernels as float32 host arrays, ``path -> array of kernel.shape``."""
    rng = np.random.default_rng(0)
    params = {}
    for kernel in kernels:
        matrix = rng.standard_normal((kernel.m, kernel.n), dtype=np.float32)
        if weights == "trained-like":
            # Two factors with nearly orthonormal columns; exact orthogonality would only cost time.
            rank = kernel.max_rank
            left = rng.standard_normal((kernel.m, rank), dtype=np.float32) / np.sqrt(kernel.m)
            right = rng.standard_normal((rank, kernel.n), dtype=np.float32) / np.sqrt(kernel.n)
            matrix = (left / np.arange(1, rank + 1, dtype=np.float32)) @ right
        params[kernel.path] = matrix.astype(np.float32).reshape(kernel.shape)
    return params


def reference(params: dict[str, np.ndarray], kernels: dict[str, Kernel]) -> dict[str, float]:
    """Stable ranks in float64."""
    ranks = {}
    for path, kernel in kernels.items():
        matrix = params[path].reshape(kernel.m, kernel.n).astype(np.float64)
        gram = matrix @ matrix.T if kernel.m <= kernel.n else matrix.T @ matrix
        largest = scipy.linalg.eigh(gram, eigvals_only=True, subset_by_index=[len(gram) - 1] * 2)[0]
        ranks[path] = float(np.trace(gram) / largest)
    return ranks


def on_host(params: dict[str, np.ndarray], kernels: dict[str, Kernel]) -> dict[str, float]:
    ranks = {}
    for path, kernel in kernels.items():
        sigmas = np.asarray(scipy.linalg.svdvals(params[path].reshape(kernel.m, kernel.n)))
        ranks[path] = float(np.sum(sigmas**2) / sigmas[0] ** 2)
    return ranks


def trained(workdir: pathlib.Path) -> tuple[dict[str, Kernel], dict[str, np.ndarray]]:
    """The kernels in the last checkpoint of a full-rank run."""
    config = default_config()
    config.update(json.loads((workdir / "config.json").read_text()))
    experiment = Experiment.from_config(config)
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        restored = checkpointer.restore()
        if restored is None:
            raise SystemExit(f"{workdir} has no checkpoint")
        params = restored.into(experiment.abstract_state(experiment.phase())).params
    kernels = dict(experiment.kernels)
    return kernels, {path: np.asarray(subtree(params, path)["kernel"]) for path in kernels}


def measure(
    network: str, weights: str, kernels: dict[str, Kernel], host: dict[str, np.ndarray], repeats: int
) -> list[dict[str, Any]]:
    """One row for each method."""
    print(f"{network}, {weights} weights ...", file=sys.stderr, flush=True)
    nested = {tuple(path.split("/")): {"kernel": jnp.asarray(kernel)} for path, kernel in host.items()}
    params = traverse_util.unflatten_dict(nested)
    truth = reference(host, kernels)
    methods: dict[str, Callable] = {
        "svdvals": lambda: on_host(host, kernels),
        "exact": functools.partial(stable_ranks, params, kernels, method="exact"),
        "lanczos": functools.partial(stable_ranks, params, kernels, method="lanczos"),
        "one pass": functools.partial(jax.jit(lambda tree: jax.tree.map(jnp.vdot, tree, tree)), params),
    }
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    results = {}
    for repeat in range(repeats + 1):
        for method, run in methods.items():
            if repeat == 0 and method == "svdvals":  # nothing to compile
                continue
            start = time.perf_counter()
            results[method] = jax.block_until_ready(run())
            seconds[method].append(time.perf_counter() - start)
    first = {method: seconds[method].pop(0) for method in methods if method != "svdvals"}
    rows = []
    for method in methods:
        median = statistics.median(seconds[method])
        row: dict[str, Any] = {"network": network, "weights": weights, "method": method, "ms": 1e3 * median}
        row["x svdvals"] = statistics.median(seconds["svdvals"]) / median
        if method != "one pass":
            errors = [abs(float(results[method][path]) / truth[path] - 1) for path in kernels]
            row["max error %"] = 100 * max(errors)
        if method in first:
            row["first call ms"] = 1e3 * first[method]  # compiles
        rows.append(row)
    return rows


def lanczos_tail(shape: tuple[int, int], draws: int) -> str:
    """Errors of ``lanczos`` over many Gaussian matrices: how often its start vector is an unlucky one."""
    stack = np.random.default_rng(0).standard_normal((draws, *shape), dtype=np.float32)
    kernel = Kernel(
        path="layer",
        layer="Dense",
        shape=stack.shape,
        reduction_axes=(1,),
        output_axes=(2,),
        stack_axes=(0,),
    )
    params, kernels = {"layer": {"kernel": jnp.asarray(stack)}}, {"layer": kernel}
    ranks = {method: stable_ranks(params, kernels, method=method)["layer"] for method in ("exact", "lanczos")}
    errors = np.asarray(ranks["lanczos"], np.float64) / np.asarray(ranks["exact"], np.float64) - 1
    over, median, worst = np.mean(errors > 0.01), np.median(errors), np.max(errors)
    return (
        f"{shape[0]} x {shape[1]}: {100 * over:.1f} % of {draws} draws off by more than 1 %; "
        f"median error {100 * median:.2g} %, largest {100 * worst:.2g} %"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each method (default 3)")
    parser.add_argument("--only", choices=NETWORKS, help="one of the networks")
    parser.add_argument("--run", type=pathlib.Path, help="the workdir of a full-rank run")
    parser.add_argument("--json", metavar="FILE", help="write the table there, too")
    options = parser.parse_args()
    table = []
    for name in [options.only] if options.only else NETWORKS:
        made = {kernel.path: kernel for kernel in NETWORKS[name]()}
        for kind in ("Gaussian", "trained-like"):
            table += measure(name, kind, made, make_params(list(made.values()), kind), options.repeats)
    if options.run:
        table += measure(options.run.name, "trained", *trained(options.run), options.repeats)
    tails = [lanczos_tail(shape, draws) for shape, draws in (((128, 128), 1000), ((768, 2304), 100))]
    report(table, options.json, notes=["Lanczos on Gaussian matrices, over many draws:", *tails])
