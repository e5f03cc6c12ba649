"""What has to be the same on all hosts before a run begins: the mistakes that people make on pods."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import socket
import time
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import cuttlefish_jax
from cuttlefish_jax.training.agreement import HostsDifferError, agree, agreed_outcome, first_hosts_text
from cuttlefish_jax.training.config import Config
from cuttlefish_jax.training.data import Source
from cuttlefish_jax.training.tasks import Task
from cuttlefish_jax.training.workdir import Workdir

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")
_MEETING = "hosts.json"
_LOOKS = 10  # one a second: storage that is shared may take a moment to show a new file
_EXAMPLES = 16


@contextlib.contextmanager
def shared_workdir(path: str | os.PathLike[str], config: Config) -> Iterator[Workdir]:
    """The working directory of a run, the same on all hosts, for the same program with the same settings.

    Args:
      path: of the directory.
      config: the run's settings.

    Raises:
      WorkdirError: if another process runs in the same directory.
      StorageError: if the directory cannot be made or written.
      HostsDifferError: if hosts have other programs, settings or numbers of devices, or do not see the same
        directory.
    """
    _check_devices()
    if jax.process_count() > 1:
        agree("the program", _program(), advice="Start the same checkout, installed alike, on all hosts")
        agree("config", json.loads(config.to_json()), advice="Start the same command on all hosts")
    with contextlib.ExitStack() as stack:
        with agreed_outcome():
            directory = stack.enter_context(Workdir(path, is_writer=jax.process_index() == 0))
        if jax.process_count() > 1:
            _check_shared(directory)
        yield directory


def check_data(task: Task) -> None:
    """Compares the data sets of the hosts: their sizes, and the contents of a few examples.

    Raises:
      HostsDifferError: if they are not the same.
    """
    if jax.process_count() > 1:
        sources = {"train": task.train, **task.evaluation}
        found = {split: _fingerprint(source) for split, source in sources.items()}
        agree("the data", found, advice="Prepare the same data set on all hosts, at config.data.data_dir")


def _check_devices() -> None:
    """Without a word to other hosts: JAX's ways of talking need as many devices on each."""
    numbers = Counter(device.process_index for device in jax.devices())
    for host, number in sorted(numbers.items()):
        if number != numbers[0]:
            raise HostsDifferError(
                f"host {host} has {number} devices and host 0 has {numbers[0]}: use hosts that are alike, or "
                "as many devices on each"
            )


def _program() -> dict[str, Any]:
    root = Path(cuttlefish_jax.__file__).parent
    code = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        code.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return {
        "cuttlefish_jax": cuttlefish_jax.__version__,
        **{package: version(package) for package in _PACKAGES},
        "python": platform.python_version(),
        "the device": jax.devices()[0].device_kind,
        "the SHA-256 of cuttlefish_jax/": code.hexdigest()[:12],
    }


def _check_shared(directory: Workdir) -> None:
    """The first host leaves a message in the directory, and the others have to find it."""
    message = f"{socket.gethostname()}, process {os.getpid()}, {time.time_ns()}"
    with agreed_outcome():
        directory.write_json(_MEETING, message)
    message = first_hosts_text(message)
    looks = 0
    while blind := _blind_hosts(directory, message):
        if (looks := looks + 1) == _LOOKS:
            raise HostsDifferError(
                f"{directory.path} is not the same directory on {' and '.join(blind)} as on host 0: give a "
                "--workdir on storage that all hosts share"
            )
        time.sleep(1)
    agree("whether there is a summary.json", directory.is_finished)


def _blind_hosts(directory: Workdir, message: str) -> list[str]:
    sees = multihost_utils.process_allgather(np.asarray(directory.read_json(_MEETING, str) == message))
    return [f"host {host}" for host in np.flatnonzero(~sees.ravel())]


def _fingerprint(source: Source) -> dict[str, Any]:
    indices = np.unique(np.linspace(0, len(source) - 1, _EXAMPLES).astype(int))
    digest = hashlib.sha256()
    for name, array in sorted(source.read(indices, batch=indices).items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode() + np.ascontiguousarray(array).data)
    return {"examples": len(source), "the SHA-256 of a few of them": digest.hexdigest()[:12]}
