"""Which layers get faster on this device when they are factorized: measured once for a run."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import jax

import cuttlefish_jax as cf
from cuttlefish_jax.errors import WorkdirError
from cuttlefish_jax.training.agreement import agreed_outcome, first_hosts_text
from cuttlefish_jax.training.console import say
from cuttlefish_jax.training.hosts import say_once

if TYPE_CHECKING:
    from cuttlefish_jax.training.experiment import Experiment
    from cuttlefish_jax.training.workdir import Workdir

_FILE = "profile.json"


def get_profile(experiment: Experiment, directory: Workdir) -> cf.KernelProfile:
    """The run's profile: that in its working directory, or one that is measured now and kept there.

    The first host measures, or reads, for all of them, so that all make the same plan.

    Args:
      experiment: the run.
      directory: its working directory.

    Raises:
      WorkdirError: if the file in the directory is no profile.
    """
    with agreed_outcome():
        text = _first_host_profile(experiment, directory) if jax.process_index() == 0 else ""
    profile = cf.KernelProfile.from_json(first_hosts_text(text))
    say_once(f"{profile.report()}\n")
    return profile


def _first_host_profile(experiment: Experiment, directory: Workdir) -> str:
    file = directory.path / _FILE
    if (document := directory.read_json(_FILE, object)) is not None:
        # Not measured again: a run that goes on has to decide as it did before, on another device too.
        try:
            profile = cf.KernelProfile.from_json(json.dumps(document))
            profile.check(experiment.kernels)
            if profile.ratio != experiment.config.profile.ratio:
                raise ValueError(f"it was measured at ratio {profile.ratio:g}, not config.profile.ratio")
        except ValueError as error:
            raise WorkdirError(f"{file}: {error}. Delete the file to measure again") from error
        return profile.to_json()
    config = experiment.config
    examples = config.batch_size // (jax.device_count() * config.optimizer.accumulation_steps)
    inputs = [jax.ShapeDtypeStruct((examples, *x.shape[1:]), x.dtype) for x in experiment.task.inputs]
    profile = cf.profile_kernels(
        experiment.model,
        *inputs,
        ratio=config.profile.ratio,
        paths=experiment.candidates,
        progress=_say,
        train=False,
    )
    text = profile.to_json()
    directory.write_json(_FILE, json.loads(text))
    return text


def _say(done: int, total: int, what: str) -> None:
    # On standard error, as the bars of the epochs: standard output has results only.
    say(f"measuring what factorizing saves, {done}/{total}: {what}", stream=sys.stderr)
