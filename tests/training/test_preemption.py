"""Signals are noted, not obeyed; twice is once for schedulers, and an end for people."""

import os
import signal
import threading

import pytest

from cuttlefish_jax.training.preemption import Notice, Preempted


@pytest.fixture(autouse=True)
def foreground():
    """Ctrl-C as in a terminal: in the background of a shell it is ignored, and these tests may run there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_noted_and_the_handlers_come_back(number, status):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with Notice() as notice:
        notice.stop_if_here()
        os.kill(os.getpid(), number)
        assert notice.is_here()
        with pytest.raises(Preempted, match=f"stopped by {number.name}") as caught:
            notice.stop_if_here()
    assert caught.value.status == status
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_second_ctrl_c_ends_the_process_and_a_second_sigterm_does_not():
    with Notice() as notice:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert notice.is_here()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_is_ignored_stays_ignored():
    """Ctrl-C in a background job of a shell, for one."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Notice() as notice:
            os.kill(os.getpid(), signal.SIGINT)
            assert not notice.is_here()
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_there_is_nothing_to_install():
    found = []

    def enter():
        with Notice() as notice:
            found.append((signal.getsignal(signal.SIGTERM), notice.is_here()))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(signal.getsignal(signal.SIGTERM), False)]
