"""What cannot be printed never ends a run, nor changes what the process exits with."""

import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cuttlefish_jax.training import console
from cuttlefish_jax.training.console import Deaf, say
from cuttlefish_jax.training.report import epoch_bar


def run(script, **options):
    """A process that has ``say``; importing the package in it would take its time."""
    load = f"import os, runpy, sys\nsay = runpy.run_path({str(Path(console.__file__))!r})['say']\n"
    options |= {"env": {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}}
    command = [sys.executable, "-c", load + textwrap.dedent(script)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60, **options)


class Broken(io.StringIO):
    """A terminal that is gone."""

    def isatty(self):
        return True

    def write(self, text):
        raise OSError(5, "Input/output error")

    def flush(self):
        raise BrokenPipeError(32, "Broken pipe")


def test_a_reader_that_is_gone_changes_no_exit_status():
    done = run(
        """
        read, write = os.pipe()
        os.dup2(write, 1)
        os.close(read)
        for _ in range(3):
            say("x" * 100)
        print("y")
        sys.exit(130)
        """
    )
    assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_printed_to_again_when_it_has_space(tmp_path):
    with open("/dev/full", "w") as full:
        done = run(
            f"""
            say("lost")
            os.dup2(os.open({str(tmp_path / "out")!r}, os.O_WRONLY | os.O_CREAT), 1)
            say("seen")
            sys.exit(7)
            """,
            stdout=full,
        )
    assert (done.returncode, done.stderr) == (7, "")
    assert (tmp_path / "out").read_text() == "seen\n"
    with open("/dev/full", "w") as full:
        done = run("say('lost')\nsys.exit(7)", stdout=full)
    assert (done.returncode, done.stderr) == (7, "")


def test_letters_that_the_stream_does_not_have_are_escaped():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    say("größer", stream=stream)
    assert stream.buffer.getvalue() == b"gr\\xf6\\xdfer\n"


def test_a_closed_terminal_does_not_end_an_epoch(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    with epoch_bar(10, description="epoch 3", stream=Broken()) as advance:
        advance(10)
    say("x", stream=Broken())
    assert Deaf(Broken()).isatty()
