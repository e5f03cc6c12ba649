"""The options that say what to factorize and at what ranks, and the plan that they give."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

import cuttlefish_jax as cf
from cuttlefish_jax.command.checkpoints import Checkpoint
from cuttlefish_jax.command.errors import mendable
from cuttlefish_jax.command.network import find_network
from cuttlefish_jax.command.tree_kernels import kernels_of_tree
from cuttlefish_jax.errors import UserError
from cuttlefish_jax.plan.rank_rules import RANK_RULES

_RULES = [name for name in RANK_RULES if name != "rank_ratio"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spectra:
    """What was measured of a checkpoint's kernels.

    Attributes:
      params: every kernel whole.
      kernels: its kernels.
      is_guessed: whether these are read off the params, and not a network's or a plan's.
      knows_flops: whether their positions are known.
      is_of_torch: whether the checkpoint was in the names and the layout of PyTorch.
      stable_ranks: of every kernel.
      singular_values: the same.
    """

    params: Mapping[str, Any]
    kernels: cf.Kernels
    is_guessed: bool
    knows_flops: bool
    is_of_torch: bool
    stable_ranks: Mapping[str, Any]
    singular_values: Mapping[str, Any]


def measure(args: argparse.Namespace, checkpoint: Checkpoint) -> Spectra:
    """Finds the kernels of a checkpoint and measures their spectra.

    Raises:
      UserError: if the checkpoint is not of the network that the options describe, or has no kernels.
    """
    params, network = checkpoint.full_rank(), find_network(args, checkpoint)
    if network is not None:
        kernels = network.kernels()
    elif checkpoint.plan is not None:
        kernels = checkpoint.plan.kernels
    else:
        kernels = kernels_of_tree(params)
    if not kernels:
        names = ", ".join(path for path, _ in kernels.skipped_entries[:3])
        hint = f"; the first of its arrays are {names}" if names else ""
        raise UserError(f"{checkpoint.path} has no array called kernel, as Flax names them{hint}")
    with mendable():
        return Spectra(
            params=params,
            kernels=kernels,
            is_guessed=network is None and checkpoint.plan is None,
            # A plan that was made without the network does not know of positions either.
            knows_flops=network is not None or any(kernel.positions > 1 for kernel in kernels.values()),
            is_of_torch=checkpoint.is_of_torch,
            stable_ranks=_on_host(cf.stable_ranks(params, kernels)),
            singular_values=_on_host(cf.singular_values(params, kernels)),
        )


def _on_host(measured: Mapping[str, Any]) -> dict[str, Any]:
    # One by one: a dict that passes through JAX comes back sorted by key.
    return {path: jax.device_get(values) for path, values in measured.items()}


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that :func:`make_plan` reads."""
    group = parser.add_argument_group("the plan")
    how = group.add_mutually_exclusive_group()
    how.add_argument("--rank-ratio", type=float, metavar="SHARE", help="ranks as a share of min(m, n)")
    how.add_argument(
        "--rule",
        metavar="NAME",
        help=f"the rank rule: {', '.join(_RULES)}, or the largest of several joined by +. The default is "
        "scaled_stable_rank, Cuttlefish's, against the run's initialisation or, if that is not known, a "
        "random matrix of the same shape",
    )
    group.add_argument(
        "--budget",
        type=_budget,
        metavar="KIND:SHARE",
        help="what may be left at most, e.g. parameters:0.3, or flops:0.5 where the network is known: the "
        "ranks are then lowered together, where it costs the least",
    )
    # One list: of the patterns that match a layer, the first one decides.
    group.add_argument(
        "--keep",
        action="append",
        dest="rules",
        type=lambda pattern: cf.Rule(pattern, keep=True),
        metavar="PATTERN",
        help="layers to leave full-rank; repeatable, and of all patterns the first that matches decides",
    )
    group.add_argument(
        "--factorize",
        action="append",
        dest="rules",
        type=_rule,
        metavar="PATTERN[=RANK]",
        help="layers to factorize, also where the defaults keep them, and at this rank; repeatable",
    )
    group.add_argument("--round-to", type=int, default=1, metavar="N", help="ranks are multiples of it")
    group.add_argument(
        "--min-rank-ratio", type=float, default=0.0, metavar="SHARE", help="lowest rank, of min(m, n)"
    )


def make_plan(args: argparse.Namespace, checkpoint: Checkpoint, spectra: Spectra) -> cf.FactorizationPlan:
    """The plan that the options describe.

    Raises:
      UserError: for an option that makes no sense, or a pattern that matches nothing.
    """
    with mendable():
        return cf.make_plan(
            spectra.kernels,
            spectra.stable_ranks,
            _known(checkpoint.ranks_0, spectra.kernels),
            singular_values=spectra.singular_values,
            rank_rule=_rank_rule(args),
            rules=args.rules or (),
            budget=_known_cost(args.budget, spectra),
            round_to=args.round_to,
            min_rank_ratio=args.min_rank_ratio,
        )


def _known_cost(budget: cf.Budget | None, spectra: Spectra) -> cf.Budget | None:
    if isinstance(budget, cf.Time):
        raise UserError(f"--budget {budget}: times have to be measured, with cf.profile_kernels in Python")
    if isinstance(budget, cf.FLOPs) and not spectra.knows_flops:
        raise UserError(f"--budget {budget}: FLOPs are known of a network alone: give --config or --model")
    return budget


def _known(ranks_0: Mapping[str, Any] | None, kernels: cf.Kernels) -> Mapping[str, Any] | None:
    # A run tracks the kernels that it may factorize; the command may be told of others.
    return ranks_0 if ranks_0 is not None and set(kernels) <= set(ranks_0) else None


def _rank_rule(args: argparse.Namespace) -> cf.RankRule:
    if args.rank_ratio is not None:
        return RANK_RULES["rank_ratio"](args)
    names = (args.rule or "scaled_stable_rank").split("+")
    for name in names:
        if name not in _RULES:
            raise UserError(f"--rule {args.rule}: {name!r} is none of {', '.join(_RULES)}")
    rules = tuple(RANK_RULES[name](args) for name in names)
    return rules[0] if len(rules) == 1 else cf.LargestOf(rules)


def _budget(option: str) -> cf.Budget:
    try:
        return cf.Budget.parse(option)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _rule(option: str) -> cf.Rule:
    pattern, equals, rank = option.partition("=")
    if not equals:
        return cf.Rule(pattern)
    if not rank.isdecimal():
        raise argparse.ArgumentTypeError(f"{rank!r} is not a rank")
    return cf.Rule(pattern, rank=int(rank))
