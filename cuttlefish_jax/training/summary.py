"""The results of a run: the contents of ``summary.json``."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from cuttlefish_jax.errors import WorkdirError
from cuttlefish_jax.training import report
from cuttlefish_jax.training.agreement import agreed_outcome, first_hosts_text
from cuttlefish_jax.training.experiment import Experiment, Phase
from cuttlefish_jax.training.progress import Progress

if TYPE_CHECKING:
    from cuttlefish_jax.training.workdir import Workdir

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

    Raises:
      WorkdirError: if the last epoch is not among the lines.
    """
    last = metrics[-1] if metrics else {"epoch": None}
    if last["epoch"] != experiment.config.epochs - 1 or f"test_{experiment.task.score}" not in last:
        raise WorkdirError(
            f"metrics.jsonl has lost the line of the last epoch, {experiment.config.epochs - 1}, and with it "
            "the test score: restore the file, or start again with another --workdir"
        )
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
        "test_score": last[f"test_{score}"],
        "best_test_score": best.get(f"test_{score}"),
        "test_accuracy": last.get("test_accuracy"),
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


def read_metrics(directory: Workdir) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` as the first host, which wrote them, has them.

    Storage that is shared may take a moment to show them to the others.

    Raises:
      UserError: on all hosts, if they cannot be read or one is damaged.
    """
    with agreed_outcome():
        lines = directory.read_log("metrics.jsonl") if directory.is_writer else []
    return json.loads(first_hosts_text(json.dumps(lines)))


def draw_ranks(directory: Workdir, summary: Mapping[str, Any], *, title: str) -> None:
    """Draws ``ranks.png`` of a run that is finished; where that fails there is a warning, and no picture.

    Args:
      directory: of the run, with its ``ranks.jsonl``.
      summary: the contents of its ``summary.json``.
      title: above the picture.
    """
    if not directory.is_writer:
        return
    try:
        report.plot_ranks(
            [(line.pop("epoch"), line) for line in directory.read_log("ranks.jsonl")],
            directory.path / "ranks.png",
            switch_epoch=summary["switch_epoch"],
            factorized=summary["ranks"] or None,
            title=title,
        )
    except (OSError, TypeError, ValueError) as error:  # errors for users, and what numbers are not
        warnings.warn(f"there is no picture of the stable ranks: {error}", stacklevel=2)
