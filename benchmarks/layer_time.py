"""Time of single layers, forward and backward, full-rank against factorized.

    python benchmarks/layer_time.py [--ratio 0.25] [--dtype bfloat16] [--batch 64] [--json FILE]

Convolutions of 3x3 and 1x1 with 128, 256 and 512 channels on the images that a ResNet for 32x32 pixels has
there, and dense layers of 512, 1024 and 2048 features. "share" is the share of the FLOP saving that becomes
time: 1 where a layer with a quarter of the FLOPs takes a quarter of the time. "share, product" is the same
with factors of one pixel as products of matrices, see benchmarks/products.py. All are run in turn in one
process, and the medians of the rounds are reported.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from common import report
from products import products

import cuttlefish_jax as cf
from cuttlefish_jax.profiling.timing import forward_and_backward

_SECONDS = 0.1  # that one layer runs in a round, about
_MAX_CALLS = 100


def layers(dtype: str, batch: int) -> Iterator[tuple[str, nn.Module, jax.ShapeDtypeStruct]]:
    """Names, layers and inputs."""
    kind = jnp.dtype(dtype)
    for channels, size in ((128, 16), (256, 8), (512, 4)):
        x = jax.ShapeDtypeStruct((batch, size, size, channels), kind)
        yield f"conv 3x3, {channels}", nn.Conv(channels, (3, 3), use_bias=False, dtype=kind), x
        yield f"conv 1x1, {channels}", nn.Conv(channels, (1, 1), use_bias=False, dtype=kind), x
        larger = jax.ShapeDtypeStruct((batch, 2 * size, 2 * size, channels // 2), kind)
        name = f"conv 3x3, {channels // 2} to {channels}, stride 2"
        yield name, nn.Conv(channels, (3, 3), strides=2, use_bias=False, dtype=kind), larger
    for features in (512, 1024, 2048):
        x = jax.ShapeDtypeStruct((32 * batch, features), kind)
        yield f"dense {features}", nn.Dense(features, use_bias=False, dtype=kind), x


class Run:
    """The forward and backward pass of a layer."""

    def __init__(self, layer: nn.Module, x: jax.ShapeDtypeStruct):
        random = lambda leaf: 0.1 * jax.random.normal(jax.random.key(0), leaf.shape, leaf.dtype)  # noqa: E731
        variables = jax.tree.map(random, jax.eval_shape(layer.init, jax.random.key(0), x))
        self.flops = cf.count_flops(layer.apply, variables, x)
        self._arguments = (variables, random(x), random(jax.eval_shape(layer.apply, variables, x)))
        self._lowered = jax.jit(forward_and_backward(layer.apply)).lower(*self._arguments)
        self._step: Any = None

    def compile(self) -> None:
        """Compiles the passes; of several layers at once in threads."""
        self._step = self._lowered.compile()

    def seconds(self, calls: int) -> float:
        """Seconds of one call, of so many in a row."""
        (variables, x, output), gradients, start = self._arguments, None, time.perf_counter()
        for _ in range(calls):
            output, gradients = self._step(variables, x, output)  # each waits for the one before it
        jax.block_until_ready((output, gradients))
        return (time.perf_counter() - start) / calls


def prepare(layer: nn.Module, x: jax.ShapeDtypeStruct, ratio: float) -> tuple[int, dict[str, Run]]:
    """The rank, and the passes to be compared."""
    kernels = cf.find_kernels(layer, x)
    rank = max(1, int(ratio * kernels[""].max_rank))
    low = cf.factorize(layer, cf.FactorizationPlan.from_ranks(kernels, {"": rank}))
    runs = {"full": Run(layer, x), "factorized": Run(low, x)}
    if isinstance(layer, nn.Conv):
        with products():
            runs["product"] = Run(low, x)
    return rank, runs


def measure(rank: int, runs: dict[str, Run], rounds: int) -> dict[str, Any]:
    calls = {}
    for name, run in runs.items():
        run.seconds(2)  # warms up
        calls[name] = min(_MAX_CALLS, max(1, round(_SECONDS / run.seconds(2))))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(run.seconds(calls[name]))
    fewer = runs["full"].flops / runs["factorized"].flops
    faster = {
        name: statistics.median(a / b for a, b in zip(seconds["full"], times, strict=True))
        for name, times in seconds.items()
    }
    row = {
        "rank": rank,
        "full ms": 1e3 * statistics.median(seconds["full"]),
        "factorized ms": 1e3 * statistics.median(seconds["factorized"]),
        "FLOPs x fewer": fewer,
        "x faster": faster["factorized"],
        "share": share(faster["factorized"], fewer),
    }
    if "product" in runs:
        row |= {"x faster, product": faster["product"], "share, product": share(faster["product"], fewer)}
    return row


def share(speedup: float, flop_ratio: float) -> float:
    """The share of the FLOPs saved that is saved of the time, too."""
    return (1 - 1 / speedup) / (1 - 1 / flop_ratio)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ratio", type=float, default=0.25, help="rank as a share of min(m, n)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=64, help="images; rows of dense layers / 32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", help="write the table to this file too")
    options = parser.parse_args()
    prepared = {
        name: prepare(layer, x, options.ratio) for name, layer, x in layers(options.dtype, options.batch)
    }
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # Before anything is timed: compilers use the devices, too.
        list(pool.map(Run.compile, [run for _, runs in prepared.values() for run in runs.values()]))
    rows = []
    for name, layer in prepared.items():
        rows.append({"layer": name, **measure(*layer, options.rounds)})
        print(rows[-1], flush=True)
    about = f"{options.dtype}, batch {options.batch}, ratio {options.ratio}, {options.rounds} rounds"
    report(rows, options.json, notes=[about])


if __name__ == "__main__":
    main()
