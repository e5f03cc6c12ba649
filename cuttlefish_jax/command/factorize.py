"""``cuttlefish factorize`` and ``cuttlefish merge``: a checkpoint into factors, and back."""

from __future__ import annotations

import argparse
from pathlib import Path

import jax

import cuttlefish_jax as cf
from cuttlefish_jax.command.checkpoints import read_checkpoint
from cuttlefish_jax.command.errors import check_output, mendable
from cuttlefish_jax.command.network import add_network_options
from cuttlefish_jax.command.plans import add_plan_options, make_plan, measure
from cuttlefish_jax.command.table import spectra_table
from cuttlefish_jax.errors import UserError, storage_errors
from cuttlefish_jax.serving import save_safetensors


def add_factorize_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``factorize``."""
    _add_output(parser)
    add_network_options(parser)
    add_plan_options(parser)


def run_factorize(args: argparse.Namespace) -> None:
    """Factorizes a checkpoint as its spectra suggest, or the options say; prints what was done."""
    out = _output(args)
    checkpoint = read_checkpoint(args.checkpoint, args.plan)
    if checkpoint.plan is not None:
        raise UserError(f"{checkpoint.path} is factorized already: cuttlefish merge it first")
    spectra = measure(args, checkpoint)
    plan = make_plan(args, checkpoint, spectra)
    print(spectra_table(spectra, plan))
    if not plan.ranks:
        raise UserError(
            "no layer is factorized, and nothing written: give --rank-ratio, --rule or --factorize"
        )
    with mendable():
        params = jax.device_get(cf.factorize_params(checkpoint.params, plan))
    _save(out, {**checkpoint.variables, "params": params}, plan)


def add_merge_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``merge``."""
    _add_output(parser)


def run_merge(args: argparse.Namespace) -> None:
    """Multiplies the factors of a checkpoint: the tree that the unmodified network has."""
    out = _output(args)
    checkpoint = read_checkpoint(args.checkpoint, args.plan)
    if checkpoint.plan is None:
        raise UserError(f"{checkpoint.path} is not factorized: it has no plan")
    params = checkpoint.full_rank()
    print(f"{checkpoint.num_params:,} parameters -> {checkpoint.plan.num_params_full:,}")
    _save(out, {**checkpoint.variables, "params": params}, None)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="FILE", help="the safetensors file to write")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")


def _output(args: argparse.Namespace) -> Path:
    path = Path(args.out)
    if path.suffix != ".safetensors":
        raise UserError(f"--out {path}: the name has to end in .safetensors, which is what is written")
    check_output(path, force=args.force)
    return path


def _save(out: Path, variables: dict, plan: cf.FactorizationPlan | None) -> None:
    with mendable(), storage_errors(out, option="--out"):
        save_safetensors(out, variables, plan)
    print(f"\nwritten to {out}")
