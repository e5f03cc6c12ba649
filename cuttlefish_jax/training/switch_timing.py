"""When to switch: what the tracker, the deadline and the configuration come to, epoch by epoch."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from cuttlefish_jax.training.method import deadline

if TYPE_CHECKING:
    from cuttlefish_jax.training.config import Config
    from cuttlefish_jax.training.progress import Progress


def switch_is_due(config: Config, progress: Progress, epoch: int) -> bool:
    """Whether to switch before an epoch; warns when ranks have missed their deadline.

    Args:
      config: the configuration.
      progress: of the run; ``stays_full_rank`` is set if that is what a missed deadline means.
      epoch: the epoch to be trained next.
    """
    last_call = deadline(config)
    if progress.plan is not None or progress.stays_full_rank:
        return False
    if progress.tracker.switch_epoch is not None:
        return epoch >= progress.tracker.switch_epoch
    if last_call is None or epoch < last_call:
        return False
    left = [path for path in progress.ranks_t if path not in progress.tracker.converged_at]
    switches = config.switch.if_never == "switch"
    progress.stays_full_rank = not switches
    verdict = "switching now" if switches else "staying full-rank to the end"
    warnings.warn(
        f"the stable ranks of {len(left)} layers ({left[0]} ...) have not converged by epoch {epoch} of "
        f"{config.epochs}: {verdict} (config.switch.deadline, config.switch.if_never)",
        stacklevel=2,
    )
    return switches


def next_switch(config: Config, progress: Progress, epochs_trained: int) -> int | None:
    """The epoch before which the switch will come, if that is in one or two epochs.

    Args:
      config: the configuration.
      progress: of the run, in its full-rank phase.
      epochs_trained: how many epochs are done.
    """
    tracker = progress.tracker
    last_call = deadline(config) if config.switch.if_never == "switch" else None
    for epochs in (1, 2):
        epoch = epochs_trained + epochs
        if tracker.switch_epoch is not None:
            is_then = tracker.switch_epoch == epoch
        else:
            is_then = tracker.converges_within(epochs) or last_call == epoch
        if is_then:
            return epoch if epoch < config.epochs else None
    return None
