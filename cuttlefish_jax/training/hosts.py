"""The processes of a run on several hosts: how they meet, and how they end when one of them fails."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

import jax

from cuttlefish_jax.errors import HostLostError, StorageError, UserError
from cuttlefish_jax.training.console import Deaf, say

# How long JAX waits for a sign of life from a process before it ends all others, and how long a process that
# fails waits for others that fail by the same error: together less than the minute of docs/runs.md.
_HEARTBEAT_SECONDS = 30
_PARTING_SECONDS = 10


def join(
    *,
    automatic: bool = False,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = 300,
) -> None:
    """Connects the processes of a run; to be called before anything else of JAX.

    With nothing given, or with one process, nothing is done.

    Args:
      automatic: whether JAX finds the others by itself: on a TPU pod, under SLURM or Open MPI.
      coordinator_address: ``host:port`` of process 0. This and the next two go together.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      timeout: seconds to wait for the others. After that the process ends, with one line and status 2: JAX
        has no exception for it.

    Raises:
      UserError: if what is given makes no sense, or if there is no cluster or no connection.
    """
    explicit = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    given = [flag for flag, value in explicit.items() if value is not None]
    if automatic and given:
        raise UserError(f"--distributed finds the hosts by itself: leave it out, or {' and '.join(given)}")
    if not automatic and not given:
        return
    if timeout < 1:
        raise UserError(f"--initialization_timeout={timeout}: it must be 1 or more seconds")
    if given:
        missing = [flag for flag in explicit if flag not in given]
        if coordinator_address is None or num_processes is None or process_id is None:
            raise UserError(f"{' and '.join(given)} without {' and '.join(missing)}: give all three")
        _check(coordinator_address, num_processes, process_id)
        if num_processes == 1:
            return
    with _deadline(timeout, coordinator_address, num_processes):
        try:
            jax.distributed.initialize(
                coordinator_address,
                num_processes,
                process_id,
                cluster_detection_method="deactivate" if given else None,
                # Longer than the deadline: JAX would end the process without an exception.
                initialization_timeout=timeout + 60,
                heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            )
        except (ValueError, RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())
            if given:
                raise UserError(
                    f"process {process_id} cannot take part at {coordinator_address} ({reason}): is the "
                    "port in use, or the address not of this network?"
                ) from error
            raise UserError(
                f"--distributed finds no cluster here ({reason}): on other machines than TPU pods and those "
                "of SLURM or Open MPI give --coordinator_address, --num_processes and --process_id"
            ) from error


def leave(status: int, error: BaseException) -> int:
    """Ends a process that has failed and said why; the other hosts end within a minute.

    A process that waits for the others at its exit, as JAX has it, would wait for hosts that wait for it. So
    it waits for a moment only: for hosts that fail by the same error, and have yet to say so.

    Args:
      status: the exit status.
      error: why; for a host that is lost nobody waits.

    Returns:
      The status, where there is no other process and nothing to wait for. Else this does not return.
    """
    # Threads of a save that orbax could not begin wait for five minutes, and the exit for them.
    if not jax.distributed.is_initialized() and not isinstance(error, StorageError):
        return status
    for stream in filter(None, (sys.stdout, sys.stderr)):
        Deaf(stream).flush()
    if jax.distributed.is_initialized() and not isinstance(error, HostLostError):
        alone = threading.Timer(_PARTING_SECONDS, os._exit, (status,))
        alone.daemon = True
        alone.start()
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()
    os._exit(status)


def say_once(text: str) -> None:
    """Prints for people, once however many hosts there are."""
    if jax.process_index() == 0:
        say(text)


@contextlib.contextmanager
def lost_hosts() -> Iterator[None]:
    """Turns what JAX raises when the connection to another host breaks into an error that says so.

    Raises:
      HostLostError: in place of that error, which becomes its cause.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = str(error)
        # Of gloo, on CPUs; between GPUs or TPUs no error comes, but JAX ends the process.
        if not jax.distributed.is_initialized() or "Gloo" not in text:
            raise
        raise HostLostError(
            f"another host has stopped or cannot be reached ({' '.join(text.split())[:200]}): see what it "
            "printed. The same command, started on all hosts, goes on from the last checkpoint"
        ) from error


def _check(coordinator_address: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator_address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator_address={coordinator_address}: it must be host:port, of process 0")
    if num_processes < 1:
        raise UserError(f"--num_processes={num_processes}: it must be 1 or more")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id}: with --num_processes={num_processes} it must be from 0 to "
            f"{num_processes - 1}"
        )


@contextlib.contextmanager
def _deadline(timeout: int, address: str | None, num_processes: int | None) -> Iterator[None]:
    who = "the processes" if num_processes is None else f"the {num_processes} processes"
    where = "" if address is None else f" at {address}"

    def end() -> None:
        say(
            f"error: {who} did not all meet{where} within {timeout} s (--initialization_timeout): start the "
            "same command on every host, and see that process 0 runs and that its port can be reached",
            stream=sys.stderr,
        )
        os._exit(2)

    timer = threading.Timer(timeout, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
