"""Time of single layers, forward and backward, full-rank against factorized.

    python benchmarks/layer_time.py [--ratio 0.25] [--dtype bfloat16] [--batch 64] [--json FILE]

Convolutions of 3x3 and 1x1 with 128, 256 and 512 channels on the images that a ResNet for 32x32 pixels has
there, and dense layers of 512, 1024 and 2048 features. "share" is the share of the FLOP saving that becomes
time: 1 where a layer with a quarter of the FLOPs takes a quarter of the time. "share, stock" is the same
with factors of one pixel as the convolutions of Flax, and not as products of matrices, see
cuttlefish_jax/convolution.py. All are run in turn in one process, and the medians of the rounds are reported.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from common import report

import cuttlefish_jax as cf
from cuttlefish_jax.layer_types import LAYER_TYPES
from cuttlefish_jax.profiling.timing import forward_and_backward

_SECONDS = 0.1  # that one layer runs in a round, about
_MAX_CALLS = 100


@contextlib.contextmanager
def stock_convolutions() -> Iterator[None]:
    """Within it, factors of one pixel are computed by Flax's own convolution."""
    own = LAYER_TYPES[nn.Conv]

    def without(fields: Callable[[Any, int], Any]) -> Callable[[Any, int], Any]:
        return lambda *args: {k: v for k, v in fields(*args).items() if k != "conv_general_dilated"}

    LAYER_TYPES[nn.Conv] = dataclasses.replace(own, first=without(own.first), second=without(own.second))
    try:
        yield
    finally:
        LAYER_TYPES[nn.Conv] = own


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


def compiled(layer: nn.Module, x: jax.ShapeDtypeStruct) -> Callable[[int], float]:
    """The forward and backward pass of a layer, as a function that runs it so often: seconds of one."""
    random = lambda shape: 0.1 * jax.random.normal(jax.random.key(0), shape.shape, shape.dtype)  # noqa: E731
    inputs = random(x)
    variables = jax.jit(layer.init)(jax.random.key(0), inputs)
    cotangent = random(jax.eval_shape(layer.apply, variables, inputs))
    step = jax.jit(forward_and_backward(layer.apply)).lower(variables, inputs, cotangent).compile()

    def run(calls: int) -> float:
        output, gradients, start = cotangent, None, time.perf_counter()
        for _ in range(calls):
            output, gradients = step(variables, inputs, output)  # each waits for the one before it
        jax.block_until_ready((output, gradients))
        return (time.perf_counter() - start) / calls

    return run


def measure(layer: nn.Module, x: jax.ShapeDtypeStruct, ratio: float, rounds: int) -> dict[str, Any]:
    kernels = cf.find_kernels(layer, x)
    rank = max(1, int(ratio * kernels[""].max_rank))
    plan = cf.FactorizationPlan.from_ranks(kernels, {"": rank})
    low = cf.factorize(layer, plan)
    runs = {"full": compiled(layer, x), "factorized": compiled(low, x)}
    if isinstance(layer, nn.Conv):
        with stock_convolutions():
            runs["stock"] = compiled(cf.factorize(layer, plan), x)
    calls = {}
    for name, run in runs.items():
        run(2)  # warms up
        calls[name] = min(_MAX_CALLS, max(1, round(_SECONDS / run(2))))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(run(calls[name]))
    flops = [
        cf.count_flops(net.apply, jax.eval_shape(net.init, jax.random.key(0), x), x) for net in (layer, low)
    ]
    speedups = {
        name: statistics.median(a / b for a, b in zip(seconds["full"], times, strict=True))
        for name, times in seconds.items()
    }
    row = {
        "rank": rank,
        "full ms": 1e3 * statistics.median(seconds["full"]),
        "factorized ms": 1e3 * statistics.median(seconds["factorized"]),
        "FLOPs x fewer": flops[0] / flops[1],
        "x faster": speedups["factorized"],
        "share": share(speedups["factorized"], flops[0] / flops[1]),
    }
    if "stock" in runs:
        row |= {
            "x faster, stock": speedups["stock"],
            "share, stock": share(speedups["stock"], flops[0] / flops[1]),
        }
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
    rows = []
    for name, layer, x in layers(options.dtype, options.batch):
        rows.append({"layer": name, **measure(layer, x, options.ratio, options.rounds)})
        print(rows[-1], flush=True)
    about = f"{options.dtype}, batch {options.batch}, ratio {options.ratio}, {options.rounds} rounds"
    report(rows, options.json, notes=[about])


if __name__ == "__main__":
    main()
