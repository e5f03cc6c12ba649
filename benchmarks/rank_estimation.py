"""Stable ranks, five ways, side by side: time, passes over the weights, and error against float64.

- ``svdvals``: ``scipy.linalg.svdvals`` of every kernel on the host, what the published implementation does;
- ``exact`` and ``lanczos``: the two methods of ``cuttlefish_jax.stable_ranks``;
- ``cold`` and ``warm``: ``cuttlefish_jax.warm_stable_ranks``, from ``initial_vectors`` and from the vectors
  of the weights before a change of 3 % in a random direction;
- ``one pass``: a jitted sum of squares of every kernel, the least that touching the weights costs.

They take turns in every repeat, after a call that compiles, and the medians are reported. Weights are
Gaussian, as at initialisation, or trained-like: singular values falling as 1/i with random singular vectors.
With ``--train``, a configuration is trained for some epochs, and the warm start is followed through them:
error, passes and time after each. A second table has the errors of ``lanczos`` and ``cold`` over many random
matrices::

    python benchmarks/rank_estimation.py [--repeats 5] [--only resnet18] [--skip svdvals lanczos]
        [--train quickstart --epochs 12] [--run runs/NAME] [--json FILE]

About ten minutes on two CPU cores, most of them in svdvals. With ``--run``, also the weights in the last
checkpoint of a full-rank run of train.py.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.sparse.linalg
from common import report
from flax import traverse_util

from cuttlefish_jax.kernels import Kernel, subtree
from cuttlefish_jax.lobpcg import leading_eigenvalues
from cuttlefish_jax.spectra import initial_vectors, stable_ranks, warm_stable_ranks
from cuttlefish_jax.training.checkpoint import Checkpointer
from cuttlefish_jax.training.config import default_config
from cuttlefish_jax.training.epoch import train_epoch
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


METHODS = ("svdvals", "exact", "lanczos", "cold", "warm")
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


def changed(params: dict[str, np.ndarray], share: float = 0.03) -> dict[str, np.ndarray]:
    """The same kernels with a change of so large a share of their norm in a random direction."""
    rng = np.random.default_rng(1)
    noise = {path: rng.standard_normal(array.shape, dtype=np.float32) for path, array in params.items()}
    size = {path: share * np.linalg.norm(params[path]) / np.linalg.norm(noise[path]) for path in params}
    return {path: array + size[path] * noise[path] for path, array in params.items()}


def reference(params: dict[str, np.ndarray], kernels: dict[str, Kernel]) -> dict[str, np.ndarray]:
    """Stable ranks in float64; the largest eigenvalue by ARPACK, to all digits."""

    def stable_rank(matrix: np.ndarray) -> float:
        gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
        if len(gram) < 3:  # too small for ARPACK
            return float(np.trace(gram) / np.linalg.eigvalsh(gram)[-1])
        start = np.random.default_rng(0).standard_normal(len(gram))
        found: Any = scipy.sparse.linalg.eigsh(gram, k=1, v0=start, return_eigenvectors=False)
        return float(np.trace(gram) / found[0])

    ranks = {}
    for path, kernel in kernels.items():
        matrices = np.asarray(kernel.to_matrix(jnp.asarray(params[path]))).reshape(-1, kernel.m, kernel.n)
        ranks[path] = np.array([stable_rank(matrix.astype(np.float64)) for matrix in matrices])
    return ranks


def max_error(ranks: dict[str, Any], truth: dict[str, np.ndarray]) -> float:
    """Largest relative error, in percent."""
    return 100 * max(float(np.max(np.abs(np.ravel(ranks[p]) / truth[p] - 1))) for p in truth)


@functools.partial(jax.jit, static_argnums=1)
def count_passes(arrays: dict[str, jax.Array], kernels: tuple[Kernel, ...], vectors: dict[str, Any]) -> Any:
    """How often the warm start reads the weights: the mean over the kernels' entries."""
    paths = [kernel.path for kernel in kernels]
    *_, rounds = leading_eigenvalues([arrays[p] for p in paths], kernels, [vectors[p] for p in paths])
    passes = sum(arrays[p].size * jnp.max(3 + 2 * n) for p, n in zip(paths, rounds, strict=True))
    return passes / sum(arrays[p].size for p in paths)


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


def nested(arrays: dict[str, Any]) -> dict[str, Any]:
    """A params tree of kernels alone."""
    flat = {tuple(path.split("/")): {"kernel": jnp.asarray(array)} for path, array in arrays.items()}
    return traverse_util.unflatten_dict(flat)


@jax.jit
def one_pass(params: Any) -> Any:
    return jax.tree.map(lambda x: jnp.sum(jnp.square(x)), params)


def medians(methods: dict[str, Callable], repeats: int) -> tuple[dict[str, float], dict[str, float], dict]:
    """Median seconds of methods that take turns, seconds of their first calls, and what they return."""
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    results = {}
    for _ in range(repeats + 1):
        for method, run in methods.items():
            start = time.perf_counter()
            results[method] = jax.block_until_ready(run())
            seconds[method].append(time.perf_counter() - start)
    first = {method: values.pop(0) for method, values in seconds.items()}
    return {method: statistics.median(values) for method, values in seconds.items()}, first, results


def measure(
    network: str,
    weights: str,
    kernels: dict[str, Kernel],
    host: dict[str, np.ndarray],
    repeats: int,
    skip: Sequence[str],
) -> list[dict[str, Any]]:
    """One row for each method."""
    print(f"{network}, {weights} weights ...", file=sys.stderr, flush=True)
    params, cold = nested(host), initial_vectors(kernels)
    _, warm = warm_stable_ranks(nested(changed(host)), kernels, cold)
    methods: dict[str, Callable] = {
        "svdvals": lambda: on_host(host, kernels),
        "exact": functools.partial(stable_ranks, params, kernels, method="exact"),
        "lanczos": functools.partial(stable_ranks, params, kernels, method="lanczos"),
        "cold": lambda: warm_stable_ranks(params, kernels, cold)[0],
        "warm": lambda: warm_stable_ranks(params, kernels, warm)[0],
        "one pass": functools.partial(one_pass, params),
    }
    methods = {method: run for method, run in methods.items() if method not in skip}
    seconds, first, results = medians(methods, repeats)
    truth = reference(host, kernels)
    arrays = {path: jnp.asarray(array) for path, array in host.items()}
    rows = []
    for method in methods:
        row: dict[str, Any] = {"network": network, "weights": weights, "method": method}
        row |= {"ms": 1e3 * seconds[method], "x one pass": seconds[method] / seconds["one pass"]}
        if method in ("cold", "warm"):
            vectors = cold if method == "cold" else warm
            row["passes"] = float(count_passes(arrays, tuple(kernels.values()), vectors))
        if method != "one pass":
            row["max error %"] = max_error(results[method], truth)
        if method not in ("svdvals", "warm"):  # nothing to compile, or the same program as cold
            row["first call ms"] = 1e3 * first[method]
        rows.append(row)
    return rows


def follow(name: str, epochs: int, repeats: int) -> list[dict[str, Any]]:
    """One row for each epoch of a full-rank training: the warm start along the weights as they change."""
    config = importlib.import_module(f"configs.{name}").get_config()
    experiment = Experiment.from_config(config)
    phase, kernels = experiment.phase(), dict(experiment.kernels)
    state, vectors, rows = experiment.create_state(phase), initial_vectors(kernels), []
    for epoch in range(epochs + 1):
        params = state.params
        arrays = {path: subtree(params, path)[kernel.param] for path, kernel in kernels.items()}
        methods = {
            "warm": functools.partial(warm_stable_ranks, params, kernels, vectors),
            "one pass": functools.partial(one_pass, arrays),
        }
        seconds, _, results = medians(methods, repeats)
        ranks, after = results["warm"]
        host = {path: np.asarray(array) for path, array in arrays.items()}
        row: dict[str, Any] = {"network": name, "weights": f"after {epoch} epochs"}
        row |= {"method": "warm" if epoch else "cold", "ms": 1e3 * seconds["warm"]}
        row["x one pass"] = seconds["warm"] / seconds["one pass"]
        row["passes"] = float(count_passes(arrays, tuple(kernels.values()), vectors))
        rows.append(row | {"max error %": max_error(ranks, reference(host, kernels))})
        print(rows[-1], file=sys.stderr, flush=True)
        vectors = after
        if epoch < epochs:
            state, _ = train_epoch(phase.train_step, state, experiment.train, epoch)
    return rows


def tail(method: str, shape: tuple[int, int], draws: int) -> str:
    """Errors of a method over many Gaussian matrices: how often its start is an unlucky one."""
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
    exact = stable_ranks(params, kernels)["layer"]
    if method == "lanczos":
        ranks = stable_ranks(params, kernels, method="lanczos")["layer"]
    else:
        ranks = warm_stable_ranks(params, kernels, initial_vectors(kernels))[0]["layer"]
    errors = np.asarray(ranks, np.float64) / np.asarray(exact, np.float64) - 1
    over, median, worst = np.mean(errors > 0.01), np.median(errors), np.max(errors)
    return (
        f"{method}, {shape[0]} x {shape[1]}: {100 * over:.1f} % of {draws} draws off by more than 1 %; "
        f"median error {100 * median:.2g} %, largest {100 * worst:.2g} %"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each method (default 5)")
    parser.add_argument("--only", choices=NETWORKS, help="one of the networks")
    parser.add_argument("--skip", nargs="*", default=(), choices=METHODS, help="methods to leave out")
    parser.add_argument("--train", metavar="CONFIG", help="follow the training of configs/CONFIG.py")
    parser.add_argument("--epochs", type=int, default=12, help="for so many epochs (default 12)")
    parser.add_argument("--draws", type=int, default=1000, help="random matrices of the second table")
    parser.add_argument("--run", type=pathlib.Path, help="the workdir of a full-rank run")
    parser.add_argument("--json", metavar="FILE", help="write the table there, too")
    options = parser.parse_args()
    table, notes = [], []
    for name in [options.only] if options.only else NETWORKS:
        made = {kernel.path: kernel for kernel in NETWORKS[name]()}
        for kind in ("Gaussian", "trained-like"):
            host_params = make_params(list(made.values()), kind)
            table += measure(name, kind, made, host_params, options.repeats, options.skip)
            with contextlib.redirect_stdout(sys.stderr):
                report(table, options.json)  # what there is so far
    if options.run:
        table += measure(options.run.name, "trained", *trained(options.run), options.repeats, options.skip)
    if options.train:
        table += follow(options.train, options.epochs, options.repeats)
    if options.draws:
        notes.append("Gaussian matrices, over many draws:")
        for gaussian, draws in (((128, 128), options.draws), ((768, 2304), options.draws // 10)):
            notes += [
                tail(method, gaussian, draws) for method in ("lanczos", "cold") if method not in options.skip
            ]
    report(table, options.json, notes=notes)
