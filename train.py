"""Trains a network the Cuttlefish way: full-rank first, low-rank from the epoch its stable ranks settle.

    python train.py --config configs/quickstart.py
    python train.py --config configs/resnet18.py:cifar100 --config.seed=1 --workdir runs/c100-seed1

The same command goes on with a run that was interrupted. SIGTERM, a scheduler's notice of pre-emption, and
Ctrl-C stop it after the step that is under way, with a checkpoint.

Exit status: 0 when the run is finished, 143 when it was stopped by SIGTERM and 130 by Ctrl-C, 2 for settings,
data or files that need mending (one line says what), 1 for a fault of the program.
"""

import os
import re
import sys
import traceback
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from cuttlefish_jax.errors import UserError
from cuttlefish_jax.training import hosts
from cuttlefish_jax.training.console import say
from cuttlefish_jax.training.loop import run
from cuttlefish_jax.training.preemption import Preempted

_CONFIG = config_flags.DEFINE_config_file("config", None, "a file in configs/, e.g. configs/quickstart.py")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "where everything is written; default runs/<name of the config>"
)
_CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "where compiled programs are kept for the next run; default JAX_COMPILATION_CACHE_DIR, or a folder in "
    "the user's cache; empty for none",
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "one of several processes that JAX finds: of a TPU pod, SLURM or Open MPI"
)
_ADDRESS = flags.DEFINE_string("coordinator_address", None, "or host:port of process 0, anywhere else, with")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "how many processes there are, and")
_PROCESS = flags.DEFINE_integer("process_id", None, "which one this is, from 0")
_TIMEOUT = flags.DEFINE_integer("initialization_timeout", 300, "seconds that processes wait for each other")


def main(argv: list[str]) -> int:
    """Runs the experiment that the command line names."""
    if len(argv) > 1:
        return _refuse(f"unexpected arguments {' '.join(argv[1:])}: settings are given as --config.key=value")
    config = _CONFIG.value
    try:
        name = config.name
    except OSError as error:  # no such file: ml_collections says so when the configuration is first used
        return _refuse(" ".join(str(error).split()))
    try:
        hosts.join(
            automatic=_DISTRIBUTED.value,
            coordinator_address=_ADDRESS.value,
            num_processes=_PROCESSES.value,
            process_id=_PROCESS.value,
            timeout=_TIMEOUT.value,
        )
        _use_cache(_CACHE.value)
        run(config, _WORKDIR.value or Path("runs") / name)
    except UserError as error:
        return hosts.leave(_refuse(str(error)), error)
    except Preempted as stopped:
        return stopped.status
    except BaseException as error:
        if jax.distributed.is_initialized():
            traceback.print_exc()
            hosts.leave(1, error)
        raise
    return 0


def _use_cache(folder: str | None) -> None:
    if folder is None:
        if jax.config.values["jax_compilation_cache_dir"]:  # of the environment
            return
        folder = _default_cache()
    jax.config.update("jax_compilation_cache_dir", folder or None)


def _default_cache() -> str:
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # a user that the system does not know, as in some containers
        reason = "there is no home folder: give --compilation_cache or set HOME"
        say(f"warning: compiled programs are not kept for the next run, {reason}", stream=sys.stderr)
        return ""
    return str(Path(home) / "cuttlefish_jax" / "compiled")


def _parse(argv: list[str]) -> list[str]:
    try:
        args = flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(_refuse(" ".join(str(error).split())))
    except (AttributeError, KeyError, TypeError, OSError) as error:  # what ml_collections raises for a typo
        hint = re.search(r"Did you mean .*\?", str(error))  # the rest is a key, quoted several times over
        message = hint[0] if hint else " ".join(str(error).split())
        sys.exit(_refuse(f"the configuration has no such setting or file: {message}"))
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = logging.WARNING  # orbax tells of every step it takes
    return args


def _refuse(message: str) -> int:
    say(f"error: {message}", stream=sys.stderr)
    return 2


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=_parse)
