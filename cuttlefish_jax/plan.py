"""From measurements to a factorization plan: which layers become two factors, at what rank, and why not."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cuttlefish_jax.kernels import Kernel, Kernels
from cuttlefish_jax.measured import Measured, measure
from cuttlefish_jax.plan_json import read_plan, write_plan
from cuttlefish_jax.plan_report import plan_table
from cuttlefish_jax.rank_rules import RankRatio, RankRule, ScaledStableRank, check_rank_rule, round_up

if TYPE_CHECKING:
    from cuttlefish_jax.kernel_profile import KernelProfile

_SHORTCUT_NAMES = ("shortcut", "downsample", "proj", "skip", "residual")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactorizationPlan:
    """Which kernels are replaced by two factors, and at what ranks. Hashable; JSON in and out.

    Every layer of the model is either in :attr:`ranks` or in :attr:`kept`.

    Attributes:
      kernels: the model's kernels.
      rank_entries: ``(path, rank)`` of every layer to factorize, in call order.
      kept_entries: ``(path, reason)`` of every other kernel.
      extra_batch_norm: whether a batch norm of ``rank`` channels stands between the factors.
    """

    kernels: Kernels
    rank_entries: tuple[tuple[str, int], ...]
    kept_entries: tuple[tuple[str, str], ...] = ()
    extra_batch_norm: bool = False

    def __post_init__(self):
        for path, rank in self.rank_entries:
            if path in self.kernels:
                _check_rank(rank, self.kernels[path])
        decisions = Counter(path for path, _ in (*self.rank_entries, *self.kept_entries))
        for path in {**self.kernels, **decisions}:
            if path not in self.kernels:
                raise ValueError(_no_such_layer(path, self.kernels))
            if decisions[path] != 1:
                what = "both factorized and kept" if decisions[path] else "neither factorized nor kept"
                raise ValueError(f"{path!r} is {what}")

    @classmethod
    def from_ranks(
        cls, kernels: Kernels, ranks: Mapping[str, int], *, extra_batch_norm: bool = False
    ) -> FactorizationPlan:
        """A plan with exactly these ranks; all other layers are kept.

        Args:
          kernels: what :func:`cuttlefish_jax.find_kernels` returned.
          ranks: ``{path: rank}``, ``1 <= rank <= min(m, n)``.
          extra_batch_norm: as the attribute.

        Raises:
          ValueError: for a path that is no kernel's, or a rank out of bounds.
        """
        kept = tuple((path, "no rank given") for path in kernels if path not in ranks)
        for path in ranks:
            if path not in kernels:
                raise ValueError(_no_such_layer(path, kernels))
        entries = tuple(
            (path, _check_rank(ranks[path], kernel)) for path, kernel in kernels.items() if path in ranks
        )
        return cls(
            kernels=kernels, rank_entries=entries, kept_entries=kept, extra_batch_norm=extra_batch_norm
        )

    @property
    def ranks(self) -> dict[str, int]:
        """``{path: rank}`` of the layers to factorize, in call order."""
        return dict(self.rank_entries)

    @property
    def kept(self) -> dict[str, str]:
        """``{path: reason}`` of every kernel left as it is, those of unsupported layers included."""
        return dict(self.kept_entries) | self.kernels.skipped

    @property
    def num_params_full(self) -> int:
        """Parameters of the whole model before the switch."""
        return self.kernels.num_params

    @property
    def num_params(self) -> int:
        """Parameters of the whole model after the switch."""
        saved = (
            self.kernels[path].num_params() - _num_params_low(self.kernels[path], rank, self.extra_batch_norm)
            for path, rank in self.rank_entries
        )
        return self.num_params_full - sum(saved)

    def report(self) -> str:
        """A table for people: every layer, its shape, rank, parameters before and after, and why."""
        return plan_table(self)

    def to_json(self) -> str:
        """The plan as a JSON document that :meth:`from_json` reads back to an equal plan."""
        return write_plan(self)

    @classmethod
    def from_json(cls, text: str) -> FactorizationPlan:
        """Reads :meth:`to_json`'s document.

        Raises:
          ValueError: if ``text`` is no such document, or its ranks do not fit its kernels.
        """
        fields = read_plan(text)
        try:
            return cls(**fields)
        except ValueError as error:
            message = " ".join(str(error).splitlines())
            raise ValueError(f"not a factorization plan: {message}") from error


@dataclasses.dataclass(frozen=True)
class Rule:
    """What to do with the layers whose path matches a pattern.

    Rules are tried in order, before the defaults (first and last layer and shortcuts are kept); the first
    whose pattern matches a layer decides. A rule without options factorizes the layer at the rank that the
    plan's rank rule gives, also where the defaults, or a profile, would keep it.

    Attributes:
      pattern: a shell-style pattern (``*`` also crosses ``/``), e.g. ``"stage1/*"``.
      keep: leave the layer full-rank.
      rank: a fixed rank.
      rank_ratio: a fixed rank, as a share of ``min(m, n)``, rounded down.
      min_rank_ratio: a lower bound of the rank, as a share of ``min(m, n)``.
    """

    pattern: str
    keep: bool = dataclasses.field(default=False, kw_only=True)
    rank: int | None = dataclasses.field(default=None, kw_only=True)
    rank_ratio: float | None = dataclasses.field(default=None, kw_only=True)
    min_rank_ratio: float | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        if sum([self.keep, self.rank is not None, self.rank_ratio is not None]) > 1:
            raise ValueError(f"rule {self.pattern!r}: give one of keep, rank and rank_ratio")
        for name in ("rank_ratio", "min_rank_ratio"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"rule {self.pattern!r}: {name} {value} is not in (0, 1]")

    def matches(self, path: str) -> bool:
        """Whether the rule's pattern matches a layer's path."""
        return fnmatch.fnmatchcase(path, self.pattern)


def make_plan(
    kernels: Kernels,
    ranks_t: Mapping[str, Any] | None = None,
    ranks_0: Mapping[str, Any] | None = None,
    *,
    singular_values: Mapping[str, Any] | None = None,
    rank_rule: RankRule = ScaledStableRank(),  # noqa: B008 (frozen)
    rules: Sequence[Rule] = (),
    profile: KernelProfile | None = None,
    min_speedup: float = 1.5,
    min_layer_speedup: float = 1.0,
    round_to: int = 1,
    min_rank_ratio: float = 0.0,
    extra_batch_norm: bool = False,
) -> FactorizationPlan:
    r"""Chooses the layers to factorize, and their ranks.

    The rank is the one that ``rank_rule`` gives, in ``[1, min(m, n)]``: by default the scaled stable rank,
    :math:`r = \lceil \xi \, sr(W_t) \rceil` with :math:`\xi = \min(m, n) / sr(W_0)` (Cuttlefish, Wang et al.,
    MLSys 2023). Layers stacked by ``scan`` or ``vmap`` share one rank, their largest.

    Kept full-rank, unless one of ``rules`` matches them, are the first layer (behind an embedding, that is
    the embedding, and no kernel), the last one and 1x1 shortcut convolutions, and with a ``profile`` every
    layer that would not get faster. A kernel of zeros is kept unless a rule gives it a rank: its factors
    would hardly move from zero. A layer that would not get smaller is kept in any case.

    Args:
      kernels: what :func:`cuttlefish_jax.find_kernels` returned.
      ranks_t: ``{path: stable rank}`` now, a scalar or ``[*stack]``; not needed by every ``rank_rule``.
      ranks_0: the same at the random initialisation; ``None`` for pre-trained weights.
      singular_values: ``{path: f[*stack, min(m, n)]}`` now, what :func:`cuttlefish_jax.singular_values`
        returned; for the rank rules that look at them.
      rank_rule: how ranks are chosen.
      rules: exceptions, tried in order.
      profile: measured speed-ups, what :func:`cuttlefish_jax.profile_kernels` returned.
      min_speedup: with a profile, the layers of a stack are kept if it gets less than this many times faster.
      min_layer_speedup: with a profile, a layer is kept unless it is predicted to run more than this many
        times as fast at its own rank; 0 if being smaller is enough.
      round_to: ranks are rounded up to a multiple of this (at most to ``min(m, n)``).
      min_rank_ratio: lower bound of every rank, as a share of ``min(m, n)``.
      extra_batch_norm: put a batch norm between the factors.

    Raises:
      ValueError: for a rule that matches nothing, a fixed rank out of bounds, a measurement that the rank
        rule needs and that is missing, or that is not finite, a profile of another model.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, cuttlefish_jax as cf
      >>> model, x = nn.Sequential([nn.Dense(64) for _ in range(3)]), jnp.ones((1, 64))
      >>> kernels = cf.find_kernels(model, x)
      >>> cf.make_plan(kernels, {path: 5.0 for path in kernels}).ranks
      {'layers_1': 20}
      >>> cf.make_plan(kernels, rank_rule=cf.RankRatio(0.25), rules=[cf.Rule("layers_2")]).ranks
      {'layers_1': 16, 'layers_2': 16}
    """
    if round_to < 1:
        raise ValueError(f"round_to {round_to} is below 1")
    if not 0 <= min_rank_ratio <= 1:
        raise ValueError(f"min_rank_ratio {min_rank_ratio} is not in [0, 1]")
    for name, bound in (("min_speedup", min_speedup), ("min_layer_speedup", min_layer_speedup)):
        if not 0 <= bound < math.inf:
            raise ValueError(f"{name} {bound} is not a number >= 0")
    check_rank_rule(rank_rule)
    _check_rules(rules, kernels)
    if profile is not None:
        profile.check(kernels)

    ranks: list[tuple[str, int]] = []
    kept: list[tuple[str, str]] = []
    defaults = _default_reasons(kernels)
    for path, kernel in kernels.items():
        rule = next((rule for rule in rules if rule.matches(path)), None)
        if rule is None:
            reason = defaults.get(path) or _slow_stack(profile, path, min_speedup)
        else:
            reason = f"rule {rule.pattern!r}" if rule.keep else None
        rank = 0
        if reason is None and (rank := _fixed_rank(rule, kernel)) == 0:
            measured = measure(kernel, rank_rule, ranks_t, ranks_0, singular_values)
            reason = _zero_kernel(measured)
            rank = 0 if reason else rank_rule.rank(measured)
        if reason is None:
            if rule is None or rule.rank is None:
                floor = rule.min_rank_ratio if rule and rule.min_rank_ratio is not None else min_rank_ratio
                rank = max(1, rank, round_up(floor * kernel.max_rank))
                rank = min(kernel.max_rank, round_to * math.ceil(rank / round_to))
            if _num_params_low(kernel, rank, extra_batch_norm) >= kernel.num_params():
                reason = f"rank {rank} of {kernel.max_rank} would not make it smaller"
            elif rule is None:
                reason = _slow_layer(profile, path, rank, min_layer_speedup)
        if reason is None:
            ranks.append((path, rank))
        else:
            kept.append((path, reason))
    return FactorizationPlan(
        kernels=kernels,
        rank_entries=tuple(ranks),
        kept_entries=tuple(kept),
        extra_batch_norm=extra_batch_norm,
    )


def _fixed_rank(rule: Rule | None, kernel: Kernel) -> int:
    """The rank that a rule fixes, 0 if it leaves it to the rank rule."""
    if rule and rule.rank is not None:
        return _check_rank(rule.rank, kernel)
    if rule and rule.rank_ratio is not None:
        return RankRatio(rule.rank_ratio).rank(Measured(kernel=kernel))
    return 0


def _zero_kernel(measured: Measured) -> str | None:
    zeros, copies = measured.zero_copies, math.prod(measured.kernel.stack_shape)
    if zeros == 0:
        return None
    return "its kernel is zero" + (f" in {zeros} of {copies} copies" if zeros < copies else "")


def _slow_stack(profile: KernelProfile | None, path: str, min_speedup: float) -> str | None:
    if profile is None:
        return None
    try:
        stack = profile.stack_of(path)
    except KeyError as error:
        raise ValueError(f"the profile has no {path!r}: time that layer too, or give it a rule") from error
    if (speedup := profile[stack]) >= min_speedup:
        return None
    gets = f"stack {stack!r} gets only {_times(speedup)} faster at ratio {profile.ratio:g}"
    return f"{gets}, less than {min_speedup:g}x"


def _slow_layer(profile: KernelProfile | None, path: str, rank: int, min_layer_speedup: float) -> str | None:
    if profile is None or (speedup := profile.predicted_speedup(path, rank)) > min_layer_speedup:
        return None
    return f"predicted {_times(speedup)} as fast at rank {rank}"


def _times(speedup: float) -> str:
    # Rounded down, lest what falls short of 1.5 reads as 1.50x.
    return f"{math.floor(100 * speedup + 1e-6) / 100:.2f}x"


def _num_params_low(kernel: Kernel, rank: int, extra_batch_norm: bool) -> int:
    norm = 2 * rank * math.prod(kernel.stack_shape) if extra_batch_norm else 0
    return kernel.num_params(rank) + norm


def _default_reasons(kernels: Kernels) -> dict[str, str]:
    """Why the layers that nobody spoke of are kept (Cuttlefish never factorizes these)."""
    paths = list(kernels)
    reasons = {
        path: "shortcut"
        for path, kernel in kernels.items()
        if kernel.is_pointwise and any(name in path.rsplit("/", 1)[-1] for name in _SHORTCUT_NAMES)
    }
    if paths:
        reasons[paths[-1]] = "last layer"
        if not kernels.embedding_first:
            reasons[paths[0]] = "first layer"
    return reasons


def _check_rules(rules: Sequence[Rule], kernels: Kernels) -> None:
    for rule in rules:
        if any(rule.matches(path) for path in kernels):
            continue
        refused = {p: why for p, why in kernels.skipped.items() if rule.matches(p)}
        if refused:
            path, why = next(iter(refused.items()))
            raise ValueError(
                f"rule {rule.pattern!r} matches only layers that cannot be factorized: {path}: {why}"
            )
        raise ValueError(_no_such_layer(rule.pattern, kernels, what="rule"))


def _no_such_layer(name: str, kernels: Iterable[str], what: str = "path") -> str:
    near = difflib.get_close_matches(name, list(kernels), n=3, cutoff=0.0)
    names = ", ".join(path or "(root)" for path in near)
    hint = f"near it: {names}" if near else "the model has no kernels"
    return f"{what} {name!r} matches no layer; {hint}"


def _check_rank(rank: Any, kernel: Kernel) -> int:
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)):
        raise ValueError(f"rank {rank!r} for {kernel.path!r} is not an integer")
    if rank < 1:
        raise ValueError(f"rank {rank} for {kernel.path!r} is below 1")
    if rank > kernel.max_rank:
        raise ValueError(f"rank {rank} for {kernel.path!r} exceeds min(m, n) = {kernel.max_rank}")
    return int(rank)
