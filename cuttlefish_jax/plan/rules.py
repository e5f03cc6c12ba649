"""Rules by pattern: what a person says of some layers, and the bounds of the ranks that the others get."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Sequence

import jax
import numpy as np

from cuttlefish_jax.kernels import Kernel, Kernels
from cuttlefish_jax.plan.checks import check_rank, no_such_layer
from cuttlefish_jax.plan.measured import Measured
from cuttlefish_jax.plan.rank_rules import RankRatio, round_up

_LOWEST = ("min_rank", "min_rank_ratio")
_HIGHEST = ("max_rank", "max_rank_ratio")


@dataclasses.dataclass(frozen=True)
class Rule:
    """What to do with the layers whose path matches a pattern.

    Rules are tried in order, before the defaults (first and last layer and shortcuts are kept); the first
    whose pattern matches a layer decides. A rule without options factorizes the layer at the rank that the
    plan's rank rule gives, also where the defaults, or a profile, would keep it.

    A rule's minimum stands in place of the plan's, as do its maximum and its ``round_to``. Where it gives a
    number and a share, both hold. A fixed ``rank`` is taken as it is, and a ``rank_ratio`` is bounded and
    rounded like any rank.

    Attributes:
      pattern: a shell-style pattern (``*`` also crosses ``/``), e.g. ``"stage1/*"``.
      keep: leave the layer full-rank.
      rank: a fixed rank.
      rank_ratio: a fixed rank, as a share of ``min(m, n)``, rounded down.
      min_rank: a lower bound of the rank; above ``min(m, n)`` it stands for that.
      min_rank_ratio: the same as a share of ``min(m, n)``, rounded up.
      max_rank: an upper bound of the rank.
      max_rank_ratio: the same as a share of ``min(m, n)``, rounded down.
      round_to: the rank is rounded up to a multiple of this.

    Raises:
      ValueError: for options that contradict each other, or are out of range.

    Example:
      >>> import cuttlefish_jax as cf
      >>> rules = [
      ...     cf.Rule("*/attention/*", keep=True),
      ...     cf.Rule("head"),  # though it is the last layer
      ...     cf.Rule("encoder/0/*", rank=64),
      ...     cf.Rule("encoder/*", min_rank=16, max_rank_ratio=0.5, round_to=8),
      ... ]
    """

    pattern: str
    keep: bool = dataclasses.field(default=False, kw_only=True)
    rank: int | None = dataclasses.field(default=None, kw_only=True)
    rank_ratio: float | None = dataclasses.field(default=None, kw_only=True)
    min_rank: int | None = dataclasses.field(default=None, kw_only=True)
    min_rank_ratio: float | None = dataclasses.field(default=None, kw_only=True)
    max_rank: int | None = dataclasses.field(default=None, kw_only=True)
    max_rank_ratio: float | None = dataclasses.field(default=None, kw_only=True)
    round_to: int | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        what = f"rule {self.pattern!r}"
        if sum([self.keep, self.rank is not None, self.rank_ratio is not None]) > 1:
            raise ValueError(f"{what}: give one of keep, rank and rank_ratio")
        for name in ("rank_ratio", "min_rank_ratio", "max_rank_ratio"):
            if (value := getattr(self, name)) is not None and not 0 < value <= 1:
                raise ValueError(f"{what}: {name} {value} is not in (0, 1]")
        for name in ("min_rank", "max_rank", "round_to"):
            if (value := getattr(self, name)) is not None:
                check_count(f"{what}: {name}", value)
        for low, high in (_LOWEST[0], _HIGHEST[0]), (_LOWEST[1], _HIGHEST[1]):
            lowest, highest = getattr(self, low), getattr(self, high)
            if lowest is not None and highest is not None and lowest > highest:
                raise ValueError(f"{what}: {low} {lowest} is above {high} {highest}")
        bounds = [name for name in (*_LOWEST, *_HIGHEST, "round_to") if getattr(self, name) is not None]
        if bounds and (self.keep or self.rank is not None):
            fixed = "keep" if self.keep else "a fixed rank"
            raise ValueError(f"{what}: {fixed} and {bounds[0]} contradict each other")

    def matches(self, path: str) -> bool:
        """Whether the rule's pattern matches a layer's path."""
        return fnmatch.fnmatchcase(path, self.pattern)

    def fixed_rank(self, kernel: Kernel) -> int | None:
        """The rank that the rule fixes, ``None`` if it leaves that to the rank rule."""
        if self.rank is not None:
            return check_rank(self.rank, kernel)
        if self.rank_ratio is not None:
            return RankRatio(self.rank_ratio).rank(Measured(kernel=kernel))
        return None


@dataclasses.dataclass(frozen=True)
class RankBounds:
    """The ranks that one kernel may have.

    Attributes:
      lowest: the lowest.
      highest: the highest, at most ``min(m, n)``.
      round_to: multiples of this are preferred.
      full: ``min(m, n)``, which needs no rounding.
    """

    lowest: int
    highest: int
    round_to: int
    full: int

    @classmethod
    def of(
        cls, kernel: Kernel, rule: Rule | None, *, round_to: int, min_rank_ratio: float, max_rank_ratio: float
    ) -> RankBounds:
        """A kernel's bounds: the rule's, and the plan's where it gives none.

        Raises:
          ValueError: if no rank is within them.
        """
        full = kernel.max_rank
        min_rank, max_rank = 1, full
        if rule is not None and (rule.min_rank, rule.min_rank_ratio) != (None, None):
            min_rank, min_rank_ratio = rule.min_rank or 1, rule.min_rank_ratio or 0.0
        if rule is not None and (rule.max_rank, rule.max_rank_ratio) != (None, None):
            max_rank, max_rank_ratio = rule.max_rank or full, rule.max_rank_ratio or 1.0
        lowest = min(full, max(min_rank, round_up(min_rank_ratio * full), 1))
        highest = min(full, max_rank, RankRatio(max_rank_ratio).rank(Measured(kernel=kernel)))
        if lowest > highest:
            whose = f" by rule {rule.pattern!r}" if rule is not None else ""
            raise ValueError(
                f"the lowest rank {lowest} for {kernel.path!r} is above the highest {highest}{whose}"
            )
        if rule is not None and rule.round_to is not None:
            round_to = rule.round_to
        return cls(lowest, highest, round_to, full)

    def fit(self, rank: int) -> int:
        """The rank that a kernel gets for a wish: within the bounds, and rounded up where they allow it."""
        rounded = self.round_to * math.ceil(min(max(rank, self.lowest), self.highest) / self.round_to)
        if rounded <= self.highest:
            return rounded
        below = self.round_to * (self.highest // self.round_to)
        return self.highest if self.highest == self.full or below < self.lowest else below

    def ranks(self) -> list[int]:
        """Every rank that :meth:`fit` can give, ascending."""
        return sorted({self.fit(rank) for rank in range(self.lowest, self.highest + 1)})


def tile_size(platform: str | None = None) -> int:
    """The multiple that ranks should have on a kind of accelerator, for ``round_to``.

    Matrix units work in tiles, so a rank of 33 costs what the next multiple costs: of 8 on a GPU (tensor
    cores, 16-bit types), of 128 on a TPU (the width of its matrix unit). On a CPU, and where nothing is
    known, it is 1: no rounding.

    It is asked for where the plan is made, rather than found out by it: a plan made on a laptop for a TPU
    says ``round_to=cf.tile_size("tpu")``.

    Args:
      platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``; that of ``jax.default_backend()`` if ``None``.

    Example:
      >>> import cuttlefish_jax as cf
      >>> [cf.tile_size(platform) for platform in ("cpu", "gpu", "tpu")]
      [1, 8, 128]
    """
    return {"gpu": 8, "cuda": 8, "rocm": 8, "tpu": 128}.get(platform or jax.default_backend(), 1)


def check_rules(rules: Sequence[Rule], kernels: Kernels) -> None:
    """Raises a ValueError for a rule that matches no kernel; it names what is near, or why it is skipped.

    And for what is no list of rules.
    """
    if not isinstance(rules, Sequence) or not all(isinstance(rule, Rule) for rule in rules):
        raise ValueError(f"rules {rules!r} are no list of rules: give [cf.Rule(pattern, ...), ...]")
    for rule in rules:
        if any(rule.matches(path) for path in kernels):
            continue
        refused = {path: why for path, why in kernels.skipped.items() if rule.matches(path)}
        if refused:
            path, why = next(iter(refused.items()))
            raise ValueError(
                f"rule {rule.pattern!r} matches only layers that cannot be factorized: {path}: {why}"
            )
        raise ValueError(no_such_layer(rule.pattern, kernels, what="rule"))


def check_count(what: str, value: object) -> None:
    """Raises a ValueError if ``value`` is no whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{what} {value!r} is not an integer")
    if value < 1:
        raise ValueError(f"{what} {value} is below 1")
