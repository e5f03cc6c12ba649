"""Inference: full-rank, factorized and merged networks, and the factorized one as an exported program.

    python benchmarks/serving.py --config.model.width=32 [--config configs/resnet18.py:digits] [--ratio 0.25]
        [--batch_sizes 1,64] [--json FILE]

The forward passes are compiled from one set of weights, with all layers but those of stage 1 factorized at a
fixed ratio, and run in turn in one process. Every round gives a ratio to the full-rank network; the medians
are reported. "merged" is the full-rank network with the products of the factors, what merge_params is for.
"exported" is the factorized one as a program with its weights as constants, which was written to bytes and
read again. Full and merged do the same arithmetic: how far their ratio is from 1 is the noise.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from absl import app, flags
from common import report
from ml_collections import config_flags

import cuttlefish_jax as cf
from cuttlefish_jax import serving
from cuttlefish_jax.training.network import create_network, input_shapes

_CONFIG = config_flags.DEFINE_config_file("config", "configs/resnet18.py:digits")
_CLASSES = flags.DEFINE_integer("classes", 10, "length of the network's output", 1)
_RATIO = flags.DEFINE_float("ratio", 0.25, "rank as a share of min(m, n)", 0, 1)
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1", "64"], "examples per call")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "rounds; the medians are reported", 1)
_SECONDS = flags.DEFINE_float("seconds", 0.2, "how long one network runs in a round, about", 0)
_JSON = flags.DEFINE_string("json", None, "write the table to this file too")

Call = Callable[..., Any]


def measure(
    model: nn.Module, inputs: tuple[jax.ShapeDtypeStruct, ...], batch_sizes: list[int]
) -> list[dict[str, Any]]:
    kernels = cf.find_kernels(model, *inputs, train=False)
    rules = [cf.Rule("stage1/*", keep=True)] if any(path.startswith("stage1/") for path in kernels) else []
    plan = cf.make_plan(kernels, rank_rule=cf.RankRatio(_RATIO.value), rules=rules)
    low = cf.factorize(model, plan)
    full_variables = jax.jit(lambda *x: model.init(jax.random.key(0), *x, train=False))(*_batch(inputs, 1))
    low_params = cf.factorize_params(full_variables["params"], plan)
    variables = {
        "full": full_variables,
        "factorized": {**full_variables, "params": low_params},
        "merged": {**full_variables, "params": cf.merge_params(low_params, plan)},
    }
    networks = {"full": model, "factorized": low, "merged": model}
    program = jax.export.deserialize(
        bytearray(serving.export(low, variables["factorized"], *inputs, train=False))
    )
    rows = []
    for batch_size in batch_sizes:
        batch = _batch(inputs, batch_size)
        calls: dict[str, Call] = {
            name: _compiled(network, variables[name], batch) for name, network in networks.items()
        }
        calls["exported"] = jax.jit(program.call)
        seconds = _alternate(calls, batch)
        for name, times in seconds.items():
            ratios = [full / own for full, own in zip(seconds["full"], times, strict=True)]
            network = networks.get(name, low)
            weights = variables.get(name, variables["factorized"])
            flops = cf.count_flops(
                lambda v, x, n=network: n.apply(v, *x, train=False), weights, _batch(inputs, 1)
            )
            rows.append(
                {
                    "network": name,
                    "batch": batch_size,
                    "params": sum(leaf.size for leaf in jax.tree.leaves(weights["params"])),
                    "MFLOP/example": flops / 1e6,
                    "ms/call": 1e3 * statistics.median(times),
                    "examples/s": batch_size / statistics.median(times),
                    "speed-up": statistics.median(ratios),
                    "lowest": min(ratios),
                    "highest": max(ratios),
                }
            )
    return rows


def _batch(inputs: tuple[jax.ShapeDtypeStruct, ...], size: int) -> tuple[jax.Array, ...]:
    return tuple(jax.numpy.ones((size, *x.shape[1:]), x.dtype) for x in inputs)


def _compiled(network: nn.Module, variables: Mapping[str, Any], batch: tuple[jax.Array, ...]) -> Call:
    def forward(weights: Any, *inputs: jax.Array) -> jax.Array:
        return network.apply(weights, *inputs, train=False)

    compiled = jax.jit(forward).lower(variables, *batch).compile()
    return lambda *inputs: compiled(variables, *inputs)


def _alternate(calls: Mapping[str, Call], batch: tuple[jax.Array, ...]) -> dict[str, list[float]]:
    """Seconds per call of every network in every round."""
    repeats = {name: max(1, round(_SECONDS.value / _seconds(call, batch, 1))) for name, call in calls.items()}
    rounds = [
        {name: _seconds(call, batch, repeats[name]) for name, call in calls.items()}
        for _ in range(_ROUNDS.value)
    ]
    return {name: [each[name] for each in rounds] for name in calls}


def _seconds(call: Call, batch: tuple[jax.Array, ...], repeats: int) -> float:
    jax.block_until_ready(call(*batch))  # compiles, and warms up
    start = time.perf_counter()
    for _ in range(repeats):
        output = call(*batch)
    jax.block_until_ready(output)
    return (time.perf_counter() - start) / repeats


def main(_: list[str]) -> None:
    config = _CONFIG.value
    model = create_network(config.model, num_outputs=_CLASSES.value)
    rows = measure(model, input_shapes(config.data), [int(size) for size in _BATCH_SIZES.value])
    about = f"{config.name}, width {config.model.width}, ratio {_RATIO.value}, {_ROUNDS.value} rounds"
    report(rows, _JSON.value, notes=[about])


if __name__ == "__main__":
    app.run(main)
