"""How much of a step is spent waiting for input, on device and from the host; images/s of ImageNet's input.

    python benchmarks/input_pipeline.py [--config configs/quickstart.py] [--config.key=value] [--json FILE]

For each way, the step of train.py runs on batches as they come, and on one batch over and over: what the
first takes longer is "lost" to the input. The loops alternate, and the median of the rounds' own differences
is reported, with their extremes. On a machine that others use as well the rounds differ by more than the
loss: there, look at "blocked", the share of the loop that was spent inside the call for the next batch.

The last rows are of ImageNet's decoding and augmentation on one core, beside the bare decoding of the JPEGs,
see benchmarks/image_decoding.py; ``--nodecoding`` leaves them out.
"""

from __future__ import annotations

import statistics
from typing import Any

from absl import app, flags
from common import Runner, report
from image_decoding import decoding_rows
from ml_collections import ConfigDict, config_flags

from cuttlefish_jax.training.experiment import Experiment

# More steps than the pipeline reads ahead: what it read while another loop ran is used up before timing.
_READ_AHEAD = 16

_CONFIG = config_flags.DEFINE_config_file("config", "configs/quickstart.py")
_STEPS = flags.DEFINE_integer("steps", 30, "timed steps of one loop", 1)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "rounds; the medians are reported", 1)
_DECODING = flags.DEFINE_bool("decoding", True, "whether to measure ImageNet's decoding too")
_JSON = flags.DEFINE_string("json", None, "write the table to this file too")


def measure(config: ConfigDict, steps: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each way."""
    runners: dict[str, Runner] = {}
    for name, on_device in (("on device", True), ("from host", False)):
        config.data.on_device = on_device
        experiment = Experiment.from_config(config)
        runners[name] = Runner(experiment, experiment.phase())
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, runner in runners.items():
            before = runner.repeat(steps)
            runner.run(runner.batches, _READ_AHEAD)
            loop, blocked = runner.run(runner.batches, steps)
            times[name].append((loop, (before + runner.repeat(steps)) / 2, blocked))
    rows = []
    for name, measured in times.items():
        lost = [100 * (loop - alone) / loop for loop, alone, _ in measured]
        loop, alone, blocked = (statistics.median(column) / steps for column in zip(*measured, strict=True))
        rows.append(
            {
                "input": name,
                "loop ms/step": 1e3 * loop,
                "steps alone ms/step": 1e3 * alone,
                "examples/s": config.batch_size / loop,
                "lost %": f"{statistics.median(lost):.1f}",
                "least-most": f"{min(lost):.1f} to {max(lost):.1f}",
                "blocked %": 100 * blocked / loop,
            }
        )
    return rows


def main(_: list[str]) -> None:
    config = _CONFIG.value
    with config.unlocked():
        rows = measure(config, _STEPS.value, _ROUNDS.value)
    shape = f"{config.data.image_size}x{config.data.image_size}, batch {config.batch_size}"
    notes = [f"{config.name}: {config.model.name}, {config.data.name} {shape}"]
    if _DECODING.value:
        decoding, about = decoding_rows()
        rows += [{"input": f"ImageNet: {row.pop('way')}", **row} for row in decoding]
        notes.append(f"ImageNet: {about}")
    report(rows, _JSON.value, notes=notes)


if __name__ == "__main__":
    app.run(main)
