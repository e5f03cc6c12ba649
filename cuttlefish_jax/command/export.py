"""``cuttlefish export``: a checkpoint and its network as one StableHLO program."""

from __future__ import annotations

import argparse
from pathlib import Path

import cuttlefish_jax as cf
from cuttlefish_jax.command.checkpoints import read_checkpoint
from cuttlefish_jax.command.errors import check_output, mendable
from cuttlefish_jax.command.network import add_network_options, find_network
from cuttlefish_jax.errors import UserError, storage_errors
from cuttlefish_jax.files import replace_file
from cuttlefish_jax.serving import export

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--out", required=True, metavar="FILE", help="the program to write")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    parser.add_argument(
        "--platforms",
        metavar="NAMES",
        help=f"where it is to run, of {', '.join(_PLATFORMS)}, joined by commas; by default where this runs",
    )
    add_network_options(parser)


def run(args: argparse.Namespace) -> None:
    """Exports the network, factorized if the checkpoint is, for batches of any size."""
    out = Path(args.out)
    check_output(out, force=args.force)
    checkpoint = read_checkpoint(args.checkpoint, args.plan)
    network = find_network(args, checkpoint)
    if network is None:
        raise UserError(
            f"{checkpoint.path} does not say what network it is of: give --config RUN/config.json, or --model"
        )
    model = network.model
    platforms = _platforms(args.platforms)
    with mendable():
        if checkpoint.plan is not None:
            model = cf.factorize(model, checkpoint.plan)
        program = export(model, checkpoint.variables, *network.inputs, platforms=platforms, train=False)
    with storage_errors(out, option="--out"):
        replace_file(out, program)
    shapes = ", ".join(f"{x.dtype}[{', '.join(['batch', *map(str, x.shape[1:])])}]" for x in network.inputs)
    print(
        f"written to {out}, {len(program):,} bytes, for inputs {shapes}\n"
        "with jax and flatbuffers it runs as\n"
        f'  jax.export.deserialize(bytearray(open("{out}", "rb").read())).call(...)'
    )


def _platforms(names: str | None) -> list[str] | None:
    if names is None:
        return None
    for name in names.split(","):
        if name not in _PLATFORMS:
            raise UserError(f"--platforms {names}: {name!r} is none of {', '.join(_PLATFORMS)}")
    return names.split(",")
