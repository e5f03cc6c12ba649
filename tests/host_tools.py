"""Hosts of a pod: processes with CPU devices of their own, which talk through gloo."""

import contextlib
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
_START = """
    import sys, jax
    jax.distributed.initialize(f"localhost:{sys.argv.pop()}", 2, int(sys.argv.pop()))
"""
# In seconds: what the documentation promises for hosts that have lost another one.
PROMISED = 60


def run_on_two_hosts(code, *arguments):
    """What each of the two printed; ``code`` finds the arguments in ``sys.argv[1:]``."""
    port = free_port()
    program = textwrap.dedent(_START) + textwrap.dedent(code)
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments), str(i), str(port)],
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [host.communicate(timeout=240)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0]
    return outputs


def free_port():
    """A port for the coordinator."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


class TrainingHost:
    """A process of train.py, whose output is read as it comes.

    Args:
      config: settings, ``{"epochs": 3}``; tuples as text.
      arguments: more of the command line.
      cache: a folder for compiled programs.
      devices: how many it has.
    """

    def __init__(self, config, *arguments, cache, devices):
        settings = [f"--config.{key}={value}" for key, value in config.items()]
        command = [sys.executable, "train.py", "--config=configs/quickstart.py", *settings, *arguments]
        environment = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            # Programs that run a few times: optimising them takes longer than it saves.
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT / "tests/host_audit"), os.environ.get("PYTHONPATH", "")]),
            "HOST_AUDIT": str(cache),
        }
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines = []
        self._writes = Path(cache) / f"{self.process.pid}.writes"
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        with self.process.stdout as stream:
            for line in stream:
                self.lines.append(line)

    @property
    def output(self):
        """What it has printed."""
        return "".join(self.lines)

    def written_in(self, directory):
        """What its Python code has written, renamed and deleted in a directory."""
        return [line for line in self._writes.read_text().splitlines() if f"{directory}/" in line]

    def wait_for(self, text):
        """Waits until it has printed something; an error if it ends without."""
        while text not in self.output:
            assert self.process.poll() is None, self.output
            time.sleep(0.05)

    def wait(self, timeout=240):
        """Its exit status."""
        status = self.process.wait(timeout)
        self._reader.join()
        return status


@contextlib.contextmanager
def training_hosts(config, workdir, *arguments, cache, hosts=2, devices=2, others=((), ())):
    """Processes of train.py in one run, started; none of them outlives the block.

    Args:
      config: settings.
      workdir: of the run.
      arguments: of all command lines.
      cache: a folder for compiled programs.
      hosts: how many processes; of one, the command line is that of a single machine.
      devices: of each of them.
      others: more arguments of each host's command line.
    """
    port, started = free_port(), []
    try:
        for i in range(hosts):
            address = (
                f"--coordinator_address=localhost:{port}",
                f"--num_processes={hosts}",
                f"--process_id={i}",
            )
            more = [f"--workdir={workdir}", *arguments, *(address if hosts > 1 else ()), *others[i]]
            started.append(TrainingHost(config, *more, cache=cache, devices=devices))
        yield started
    finally:
        for host in started:
            host.process.kill()
            host.wait()
