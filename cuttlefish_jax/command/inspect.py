"""``cuttlefish inspect``: the spectra of a checkpoint, and what a plan would save."""

from __future__ import annotations

import argparse
from pathlib import Path

from cuttlefish_jax.command.checkpoints import read_checkpoint
from cuttlefish_jax.command.errors import check_output, needs
from cuttlefish_jax.command.network import add_network_options
from cuttlefish_jax.command.plans import add_plan_options, make_plan, measure
from cuttlefish_jax.command.table import spectra_table


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument(
        "--picture", metavar="FILE", help="draw the singular values of every layer into a PNG"
    )
    parser.add_argument("--force", action="store_true", help="replace the picture if it exists")
    add_network_options(parser)
    add_plan_options(parser)


def run(args: argparse.Namespace) -> None:
    """Prints a table of all layers; of a factorized checkpoint, with the ranks that it has."""
    picture = None if args.picture is None else Path(args.picture)
    check_output(picture, force=args.force)
    checkpoint = read_checkpoint(args.checkpoint, args.plan)
    spectra = measure(args, checkpoint)
    plan = checkpoint.plan or make_plan(args, checkpoint, spectra)
    state = "full-rank" if checkpoint.plan is None else "factorized; the spectra are those of the products"
    print(f"{checkpoint.path}: {checkpoint.num_params:,} parameters, {state}\n")
    print(spectra_table(spectra, plan))
    if picture is not None:
        with needs("matplotlib"):
            from cuttlefish_jax.command.picture import plot_singular_values
        plot_singular_values(
            spectra.singular_values,
            spectra.stable_ranks,
            picture,
            ranks=plan.ranks,
            title=str(checkpoint.path),
        )
        print(f"\nthe picture is {picture}")
