"""The results of a run: the contents of ``summary.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from cuttlefish_jax.training.experiment import Experiment, Phase
from cuttlefish_jax.training.progress import Progress

_PHASES = {"full": "full_rank", "low": "low_rank"}


def summarize(
    experiment: Experiment, phase: Phase, progress: Progress, metrics: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What came out of a run.

    Args:
      experiment: its fixed parts.
      phase: its last phase.
      progress: at its end.
      metrics: the lines of ``metrics.jsonl``.

    Returns:
      The contents of ``summary.json``: FLOPs are forward ones for one example, times in seconds, bytes those
      on one device, of the state at rest and of a train step at most, None if none was made; the score
      is the task's first metric, ``metric``, and "best" is the epoch with the best validation score. What a
      task does not measure, such as the accuracy of a regression, is None.
    """
    config, plan, best = experiment.config, progress.plan, progress.best or {}
    full = experiment.phase()
    params_full, score = experiment.kernels.num_params, experiment.task.score

    def throughput(phase_name: str) -> float | None:
        seconds = progress.seconds[phase_name]
        return progress.examples[phase_name] / seconds if seconds else None

    def memory(phase_name: str, what: str) -> int | None:
        return progress.memory.get(_PHASES[phase_name], {}).get(what)

    return {
        "method": config.method,
        "model": config.model.name,
        "dataset": config.data.name,
        "seed": config.seed,
        "epochs": config.epochs,
        "steps": sum(progress.examples.values()) // config.batch_size,
        # Lines that an older version wrote do not have it.
        "skipped_steps": sum(line.get("train_skipped_steps", 0) for line in metrics),
        "switch_epoch": progress.switch_epoch,
        "ranks": {} if plan is None else plan.ranks,
        "params_full": params_full,
        "params_final": params_full if plan is None else plan.num_params,
        "params_trained": experiment.num_trained(phase),
        "flops_full": experiment.count_flops(full),
        "flops_final": experiment.count_flops(phase),
        "metric": score,
        "test_score": metrics[-1][f"test_{score}"],
        "best_test_score": best.get(f"test_{score}"),
        "test_accuracy": metrics[-1].get("test_accuracy"),
        "best_test_accuracy": best.get("test_accuracy"),
        "best_epoch": best.get("epoch"),
        "train_seconds": progress.seconds["full_rank"] + progress.seconds["low_rank"],
        "rank_seconds": progress.seconds["rank"],
        "profile_seconds": progress.seconds["profile"],
        "switch_seconds": progress.seconds["switch"],
        "switch_stall_seconds": progress.seconds["stall"],
        "compile_seconds": progress.seconds["compile"],
        "compile_seconds_background": progress.seconds["background"],
        "examples_per_second_full": throughput("full_rank"),
        "examples_per_second_low": throughput("low_rank"),
        "parallelism": config.parallelism,
        **{f"{what}_bytes_{phase}": memory(phase, what) for what in ("state", "step") for phase in _PHASES},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }
