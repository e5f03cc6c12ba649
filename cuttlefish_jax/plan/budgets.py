"""Budgets: how much of the model a plan may leave, in parameters, FLOPs or measured time."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar

from cuttlefish_jax.kernels import Kernel, Kernels

if TYPE_CHECKING:
    from cuttlefish_jax.profiling.kernel_profile import KernelProfile


def num_params_low(kernel: Kernel, rank: int, extra_batch_norm: bool) -> int:
    """Parameters of a kernel's factors, and of the batch norm between them if there is one."""
    norm = 2 * rank * math.prod(kernel.stack_shape) if extra_batch_norm else 0
    return kernel.num_params(rank) + norm


@dataclasses.dataclass(frozen=True)
class Budget(abc.ABC):
    """An upper bound of what a plan leaves of the model, as a share of what it costs full-rank.

    One of :class:`Parameters`, :class:`FLOPs` and :class:`Time`. ``str()`` of a budget is the text, such as
    ``parameters:0.3``, that :meth:`parse` reads.

    Attributes:
      share: of the full-rank cost, ``0 < share <= 1``.
    """

    share: float
    name: ClassVar[str]
    noun: ClassVar[str]

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"{type(self).__name__}: share {self.share} is not in (0, 1]")

    def __str__(self) -> str:
        return f"{self.name}:{self.share!r}"

    @staticmethod
    def parse(text: str) -> Budget:
        """The budget that a text such as ``"parameters:0.3"``, ``"flops:0.5"`` or ``"time:0.7"`` names.

        Raises:
          ValueError: for any other text.

        Example:
          >>> import cuttlefish_jax as cf
          >>> cf.Budget.parse("flops:0.5")
          FLOPs(share=0.5)
        """
        name, _, share = text.partition(":")
        kinds = {kind.name: kind for kind in (Parameters, FLOPs, Time)}
        try:
            return kinds[name](float(share))
        except (KeyError, ValueError) as error:
            what = f"{text!r} is not a budget such as " + ", ".join(f"'{kind}:0.5'" for kind in kinds)
            raise ValueError(what) from error

    @abc.abstractmethod
    def full_cost(self, kernels: Kernels, profile: KernelProfile | None) -> float:
        """What the share is of: the full-rank model's cost."""

    @abc.abstractmethod
    def cost(
        self, kernel: Kernel, rank: int | None, *, profile: KernelProfile | None, extra_batch_norm: bool
    ) -> float:
        """What one kernel costs, whole (``None``) or at a rank."""


@dataclasses.dataclass(frozen=True)
class Parameters(Budget):
    """At most this share of the model's parameters, those of layers that cannot be factorized included."""

    name: ClassVar[str] = "parameters"
    noun: ClassVar[str] = "parameters"

    def full_cost(self, kernels: Kernels, profile: KernelProfile | None) -> float:
        """The parameters of the whole model."""
        return kernels.num_params

    def cost(
        self, kernel: Kernel, rank: int | None, *, profile: KernelProfile | None, extra_batch_norm: bool
    ) -> float:
        """Parameters of the kernel or its factors."""
        return kernel.num_params() if rank is None else num_params_low(kernel, rank, extra_batch_norm)


@dataclasses.dataclass(frozen=True)
class FLOPs(Budget):
    """At most this share of the kernels' forward FLOPs, as the plan's report counts them.

    These are the products with the kernels that :func:`cuttlefish_jax.find_kernels` found, those that are
    kept included; products of activations with each other, and layers that cannot be factorized, are not
    counted. :func:`cuttlefish_jax.count_flops` counts everything.
    """

    name: ClassVar[str] = "flops"
    noun: ClassVar[str] = "forward FLOPs of the kernels"

    def full_cost(self, kernels: Kernels, profile: KernelProfile | None) -> float:
        """The forward FLOPs of all kernels, per example."""
        return sum(kernel.flops() for kernel in kernels.values())

    def cost(
        self, kernel: Kernel, rank: int | None, *, profile: KernelProfile | None, extra_batch_norm: bool
    ) -> float:
        """Forward FLOPs of the kernel or its factors, per example."""
        return kernel.flops(rank)


@dataclasses.dataclass(frozen=True)
class Time(Budget):
    """At most this share of the time that the profiled kernels take in a training step, as it is predicted.

    Full-rank, that is what :func:`cuttlefish_jax.profile_kernels` measured; at a rank,
    :meth:`cuttlefish_jax.KernelProfile.predicted_seconds`, an upper estimate which does not fall below the
    rank that was measured. So a profile at a low ratio gives a budget more room. The rest of the step, the
    kernels that were not profiled included, is not counted.
    """

    name: ClassVar[str] = "time"
    noun: ClassVar[str] = "measured time of the kernels"

    def full_cost(self, kernels: Kernels, profile: KernelProfile | None) -> float:
        """Seconds of all profiled kernels in one training step."""
        if profile is None:
            raise ValueError("budget Time needs a profile: pass profile=cf.profile_kernels(model, *inputs)")
        return sum(profile.seconds(path)[0] for path in profile)

    def cost(
        self, kernel: Kernel, rank: int | None, *, profile: KernelProfile | None, extra_batch_norm: bool
    ) -> float:
        """Seconds of the kernel or its factors in one training step."""
        path = kernel.path
        if profile is None or path not in profile:
            if rank is None:
                return 0.0
            raise ValueError(f"the profile has no {path!r}: time that layer too, or keep it by a rule")
        return profile.seconds(path)[0] if rank is None else profile.predicted_seconds(path, rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetUse:
    """What became of a budget.

    Attributes:
      budget: the budget.
      asked: the share that the plan's rank rule and rules would have left.
      used: the share that the plan leaves; ``asked``, where that is within the budget.
    """

    budget: Budget
    asked: float
    used: float

    def __post_init__(self) -> None:
        for share in (self.asked, self.used):
            if not 0 <= share < math.inf:
                raise ValueError(f"{share} is no share of a budget")
