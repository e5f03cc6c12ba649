"""What measuring and factorizing cost as a network grows in width and in depth.

- width: two dense layers, ``w x 4w`` and ``4w x w``, of growing ``w``: milliseconds of one pass over the
  weights, of the stable ranks (``exact``; ``cold`` and ``warm`` start), and of factorizing at a quarter of
  the rank; what the device needs for each beside the weights (``memory``, as a multiple of them);
- depth: a growing number of dense layers of ``64 x 64``: seconds to trace and compile each of these, and then
  to run them;
- models: the same depths as Linen and NNX models: seconds of ``find_kernels``, ``make_plan``, ``factorize``.

Everything takes turns; the medians are reported::

    python benchmarks/scaling.py [--max-width 1024] [--max-depth 1000] [--only width] [--json FILE]

Two minutes on two CPU cores. ``exact`` is left out beyond ``--max-exact``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from common import report
from flax import nnx

import cuttlefish_jax as cf

DEPTHS = (10, 30, 100, 300, 1000)
LAYER = 64


def dense(path: str, inputs: int, outputs: int) -> cf.Kernel:
    return cf.Kernel(path=path, layer="Dense", shape=(inputs, outputs), reduction_axes=(0,), output_axes=(1,))


def make_params(kernels: Mapping[str, cf.Kernel], seed: int = 0) -> dict[str, Any]:
    """Gaussian kernels: the slowest to measure."""
    keys = jax.random.split(jax.random.key(seed), len(kernels))
    return {
        path: {"kernel": jax.random.normal(key, kernel.shape) / np.sqrt(kernel.m)}
        for key, (path, kernel) in zip(keys, kernels.items(), strict=True)
    }


def seconds_of(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def costs(kernels: cf.Kernels, *, repeats: int, exact: bool) -> dict[str, dict[str, float]]:
    """For each operation seconds to compile and to run, and its memory in multiples of the weights'."""
    params, vectors = make_params(kernels), cf.initial_vectors(kernels)
    plan = cf.FactorizationPlan.from_ranks(kernels, {path: k.max_rank // 4 for path, k in kernels.items()})

    def warm(params: Any, vectors: Any) -> Any:
        return cf.warm_stable_ranks(params, kernels, vectors)

    operations: dict[str, tuple[Callable, tuple[Any, ...]]] = {
        "one pass": (lambda params: jax.tree.map(lambda x: jnp.sum(jnp.square(x)), params), (params,)),
        "warm": (warm, (params, vectors)),
        "factorize": (lambda params: cf.factorize_params(params, plan), (params,)),
    }
    if exact:
        operations["exact"] = (lambda params: cf.stable_ranks(params, kernels), (params,))
    found: dict[str, dict[str, float]] = {}
    runs = {}
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    for name, (operation, arguments) in operations.items():
        start = time.perf_counter()
        program = jax.jit(operation).lower(*arguments).compile()
        found[name] = {"compile": time.perf_counter() - start}
        if analysis := program.memory_analysis():
            found[name]["memory"] = analysis.temp_size_in_bytes / size
        runs[name] = functools.partial(program, *arguments)
        if name == "warm":
            runs["cold"] = runs["warm"]
            # As in training: from the vectors of weights that have since changed a little.
            moved = jax.tree.map(
                lambda x: x + 0.03 * jnp.std(x) * jax.random.normal(jax.random.key(1), x.shape), params
            )
            runs["warm"] = functools.partial(program, moved, program(params, vectors)[1])
            found["cold"] = {}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            times[name].append(seconds_of(run))
    for name, values in times.items():
        found[name]["seconds"] = statistics.median(values[1:])
    return found


def by_width(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for exponent in range(6, 13):
        if (width := 2**exponent) > options.max_width:
            break
        kernels = cf.Kernels((dense("up", width, 4 * width), dense("down", 4 * width, width)))
        found = costs(kernels, repeats=options.repeats, exact=width <= options.max_exact)
        row: dict[str, Any] = {"what": "width", "size": width}
        for name, cost in found.items():
            row[f"{name} ms"] = 1e3 * cost["seconds"]
        row["warm / one pass"] = found["warm"]["seconds"] / found["one pass"]["seconds"]
        for name, cost in found.items():
            if "memory" in cost and name != "one pass":
                row[f"{name} memory"] = cost["memory"]
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    return rows


def by_depth(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for depth in (depth for depth in DEPTHS if depth <= options.max_depth):
        kernels = cf.Kernels(tuple(dense(f"layer{i}", LAYER, LAYER) for i in range(depth)))
        row: dict[str, Any] = {"what": "depth", "size": depth}
        for name, cost in costs(kernels, repeats=options.repeats, exact=True).items():
            row[f"{name} ms"] = 1e3 * cost["seconds"]
            if name != "cold":  # the same program as warm
                row[f"{name} compile s"] = cost["compile"]
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    return rows


class Linen(nn.Module):
    """So many dense layers."""

    depth: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The last layer's output."""
        for _ in range(self.depth):
            x = nn.relu(nn.Dense(LAYER)(x))
        return x


class Nnx(nnx.Module):
    """So many linear layers."""

    def __init__(self, depth: int, *, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(LAYER, LAYER, rngs=rngs) for _ in range(depth)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """The last layer's output."""
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return x


def by_model(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    x = jax.ShapeDtypeStruct((1, LAYER), jnp.float32)
    models = {
        "Linen": Linen,
        "NNX": lambda depth: nnx.eval_shape(lambda: Nnx(depth, rngs=nnx.Rngs(0))),
    }
    for depth in (depth for depth in DEPTHS if depth <= options.max_depth):
        for kind, make in models.items():
            model, seconds = make(depth), {}
            start = time.perf_counter()
            kernels = cf.find_kernels(model, x)
            seconds["find_kernels s"] = time.perf_counter() - start
            ranks_0, ranks = (dict.fromkeys(kernels, rank) for rank in (16.0, 4.0))
            start = time.perf_counter()
            plan = cf.make_plan(kernels, ranks, ranks_0)
            seconds["make_plan s"] = time.perf_counter() - start
            start = time.perf_counter()
            low = cf.factorize(model, plan)
            if isinstance(low, nn.Module):  # which is rewritten while it is called
                jax.eval_shape(low.init, jax.random.key(0), x)
            seconds["factorize s"] = time.perf_counter() - start
            rows.append({"what": f"{kind} model", "size": depth, **seconds})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


PARTS = {"width": by_width, "depth": by_depth, "models": by_model}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--max-width", type=int, default=1024, help="up to 4096 (default 1024)")
    parser.add_argument("--max-exact", type=int, default=1024, help="widest with method exact (default 1024)")
    parser.add_argument("--max-depth", type=int, default=1000, help="most kernels (default 1000)")
    parser.add_argument("--only", nargs="*", choices=PARTS, help="some of the parts")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each (default 3)")
    parser.add_argument("--json", metavar="FILE", help="write the table there, too")
    arguments = parser.parse_args()
    table: list[dict[str, Any]] = []
    for part in arguments.only or PARTS:
        table += PARTS[part](arguments)
        with contextlib.redirect_stdout(sys.stderr):
            report(table, arguments.json)  # what there is so far
    report(table, arguments.json)
