"""A factorization plan: which layers become two factors, at what rank, and why not."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping

from cuttlefish_jax.kernels import Kernels
from cuttlefish_jax.plan.budgets import BudgetUse, num_params_low
from cuttlefish_jax.plan.checks import check_rank, no_such_layer
from cuttlefish_jax.plan.document import read_plan, write_plan
from cuttlefish_jax.plan.report import plan_table


def check_plan(plan: object) -> None:
    """Raises a ValueError if ``plan`` is no plan, but ranks, say."""
    if not isinstance(plan, FactorizationPlan):
        raise ValueError(
            f"{type(plan).__name__} is no FactorizationPlan: "
            "FactorizationPlan.from_ranks(kernels, ranks) makes one of ranks"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactorizationPlan:
    """Which kernels are replaced by two factors, and at what ranks. Hashable; JSON in and out.

    Every layer of the model is either in :attr:`ranks` or in :attr:`kept`.

    Attributes:
      kernels: the model's kernels.
      rank_entries: ``(path, rank)`` of every layer to factorize, in call order.
      kept_entries: ``(path, reason)`` of every other kernel.
      extra_batch_norm: whether a batch norm of ``rank`` channels stands between the factors.
      decided_entries: ``(path, what)`` decided the ranks, where that is known.
      budget: what became of the budget, if there was one.
    """

    kernels: Kernels
    rank_entries: tuple[tuple[str, int], ...]
    kept_entries: tuple[tuple[str, str], ...] = ()
    extra_batch_norm: bool = False
    decided_entries: tuple[tuple[str, str], ...] = ()
    budget: BudgetUse | None = None

    def __post_init__(self):
        for path, rank in self.rank_entries:
            if path in self.kernels:
                check_rank(rank, self.kernels[path])
        decisions = Counter(path for path, _ in (*self.rank_entries, *self.kept_entries))
        for path in {**self.kernels, **decisions}:
            if path not in self.kernels:
                raise ValueError(no_such_layer(path, self.kernels))
            if decisions[path] != 1:
                what = "both factorized and kept" if decisions[path] else "neither factorized nor kept"
                raise ValueError(f"{path!r} is {what}")
        for path in self.decided.keys() - self.ranks.keys():
            raise ValueError(f"{path!r} has a reason for its rank, and no rank")

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
                raise ValueError(no_such_layer(path, kernels))
        entries = tuple(
            (path, check_rank(ranks[path], kernel)) for path, kernel in kernels.items() if path in ranks
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
    def decided(self) -> dict[str, str]:
        """``{path: what decided its rank}``: a rule, the rank rule, a budget; of those that are known."""
        return dict(self.decided_entries)

    @property
    def num_params_full(self) -> int:
        """Parameters of the whole model before the switch."""
        return self.kernels.num_params

    @property
    def num_params(self) -> int:
        """Parameters of the whole model after the switch."""
        saved = (
            self.kernels[path].num_params() - num_params_low(self.kernels[path], rank, self.extra_batch_norm)
            for path, rank in self.rank_entries
        )
        return self.num_params_full - sum(saved)

    def restricted(self, paths: Collection[str], reason: str) -> FactorizationPlan:
        """The plan for the layers at ``paths`` alone; the others of its layers are kept, with the reason."""
        left_out = [path for path in self.ranks if path not in paths]
        if not left_out:
            return self
        return dataclasses.replace(
            self,
            rank_entries=tuple((path, rank) for path, rank in self.rank_entries if path not in left_out),
            kept_entries=(*self.kept_entries, *((path, reason) for path in left_out)),
            decided_entries=tuple(
                (path, what) for path, what in self.decided_entries if path not in left_out
            ),
        )

    def report(self) -> str:
        """A table for people: every layer, its shape, rank, parameters before and after, and what decided."""
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
