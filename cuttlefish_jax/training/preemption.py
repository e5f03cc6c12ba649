"""Notices that the process is to end soon: SIGTERM from a scheduler, Ctrl-C from a user.

A notice only takes note. The loop asks for it where it can stop with everything saved: after every step of
training, before every batch of an evaluation, before and after the switch.
"""

from __future__ import annotations

import itertools
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preempted(Exception):
    """A run was told to stop, and did, after a checkpoint.

    Attributes:
      status: what the process should exit with: 128 and the number of the signal, as shells have it: 143
        for SIGTERM, 130 for Ctrl-C.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


class Notice:
    """Takes note of SIGTERM and SIGINT while it is entered, in place of ending the process.

    A second Ctrl-C ends the process at once, by ``KeyboardInterrupt``; further SIGTERMs change nothing, for
    some schedulers send several. Handlers are those of the main thread: in any other one nothing is noticed.

    On several hosts a notice is JAX's to take and to pass on, so that all hosts, whichever of them was told,
    stop at the same step. There SIGTERM alone is one.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._before: dict[int, Any] = {}
        self._calls = itertools.count()
        # Without JAX's service nothing is noticed: SIGTERM then ends the process, as by default.
        self._is_shared = jax.process_count() > 1 and jax.config.values["jax_enable_preemption_service"]

    def __enter__(self) -> Notice:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # Ignored in a background job of a shell, say, or handled by a library in C: left alone.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def is_here(self) -> bool:
        """Whether it is time to stop; every host has to ask equally often, and all get the same answer."""
        if self._number is None and self._is_shared:
            # Looks at a flag of this process, unless a notice has come to any host.
            is_time = multihost_utils.reached_preemption_sync_point(next(self._calls))
            self._number = signal.SIGTERM if is_time else None
        return self._number is not None

    def stop_if_here(self) -> None:
        """Raises :class:`Preempted` if it is time to stop."""
        if self.is_here():
            assert self._number is not None
            raise Preempted(self._number)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._number is not None:
            signal.default_int_handler(number, frame)
        self._number = number
