"""The command ``cuttlefish``: its parser, and what becomes of errors."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from cuttlefish_jax.command import export, factorize, inspect
from cuttlefish_jax.command.tree_kernels import HEURISTICS
from cuttlefish_jax.errors import UserError

_COMMANDS = {
    "inspect": (inspect.add_options, inspect.run, "spectra, stable ranks, and what a plan would save"),
    "factorize": (
        factorize.add_factorize_options,
        factorize.run_factorize,
        "replace kernels by factors, and write them with their plan",
    ),
    "merge": (factorize.add_merge_options, factorize.run_merge, "multiply the factors again"),
    "export": (export.add_options, export.run, "network and weights as one StableHLO program"),
}
_CHECKPOINTS = (
    "a safetensors file, or a folder of one; the workdir of a train.py run, whose best epoch is read, or its "
    "checkpoints/; or what orbax saved of a params tree or a training state"
)


class _Parser(argparse.ArgumentParser):
    """A parser with errors of one line."""

    def error(self, message: str) -> NoReturn:
        """Prints the message alone."""
        sys.exit(_refuse(f"{message}; see {self.prog} --help"))


def run() -> None:
    """Runs the command line of this process, and ends the process.

    Exit status: 0, or 2 for what needs mending (one line says what), or 1 for a fault of the program.
    """
    sys.exit(main(parse(sys.argv[1:])))


def main(args: argparse.Namespace) -> int:
    """Runs one of the commands; its exit status."""
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # of `cuttlefish inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError) as error:
        return _refuse(" ".join(str(error).split()))
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of a command line, without the name of the program."""
    parser = _Parser(
        prog="cuttlefish",
        description="Looks at the spectra of a Flax checkpoint, factorizes it, and makes it ready to serve.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (add_options, function, summary) in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=None if name in ("merge", "export") else f"{HEURISTICS}.",
        )
        command.add_argument("checkpoint", metavar="CHECKPOINT", help=_CHECKPOINTS)
        command.add_argument(
            "--plan",
            metavar="FILE",
            help="the plan of a factorized checkpoint that does not have it, as JSON",
        )
        add_options(command)
        command.set_defaults(run=function)
    args = parser.parse_args(argv)
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells of every step it takes
    return args


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
