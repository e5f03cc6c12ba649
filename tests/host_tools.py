"""Two hosts of a pod: two processes with two CPU devices each, which talk through gloo."""

import os
import socket
import subprocess
import sys
import textwrap

_START = """
    import sys, jax
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{sys.argv.pop()}", 2, int(sys.argv.pop()))
"""


def run_on_two_hosts(code, *arguments):
    """What each of the two printed; ``code`` finds the arguments in ``sys.argv[1:]``."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
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
