"""A factorization plan as a JSON document, and back: a document from elsewhere is not trusted."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from cuttlefish_jax.json_reader import JsonReader
from cuttlefish_jax.kernels import Kernel, Kernels, insert_axes
from cuttlefish_jax.plan.budgets import Budget, BudgetUse

if TYPE_CHECKING:
    from cuttlefish_jax.plan.plan import FactorizationPlan

_FORMAT = 1
_READER = JsonReader("factorization plan")


def write_plan(plan: FactorizationPlan) -> str:
    """The document that :func:`read_plan` reads."""
    document = {
        "format": _FORMAT,
        "ranks": plan.ranks,
        "kept": dict(plan.kept_entries),
        "skipped": plan.kernels.skipped,
        "decided": plan.decided,
        "budget": None if plan.budget is None else _budget_document(plan.budget),
        "extra_batch_norm": plan.extra_batch_norm,
        "num_params_full": plan.num_params_full,
        "num_params": plan.num_params,
        "embedding_first": plan.kernels.embedding_first,
        "kernels": [dataclasses.asdict(kernel) for kernel in plan.kernels.values()],
    }
    return json.dumps(document, indent=1)


def read_plan(text: str) -> dict[str, Any]:
    """The fields of the plan that :func:`write_plan` wrote; a ValueError for any other text."""
    document = _READER.load(text)
    if (version := _READER.get(document, "format", int)) != _FORMAT:
        raise _READER.error(f"its format {version} is not {_FORMAT}")
    entries = tuple(_kernel(entry) for entry in _READER.get(document, "kernels", list))
    if len({kernel.path for kernel in entries}) < len(entries):
        raise _READER.error("two of its kernels have one path")
    return dict(
        kernels=Kernels(
            entries=entries,
            skipped_entries=_texts(document, "skipped"),
            num_params=_READER.get(document, "num_params_full", int),
            # Documents of version 0.1.0 do not have it.
            embedding_first="embedding_first" in document and _READER.get(document, "embedding_first", bool),
        ),
        rank_entries=tuple(_READER.get(document, "ranks", dict).items()),
        kept_entries=_texts(document, "kept"),
        extra_batch_norm=_READER.get(document, "extra_batch_norm", bool),
        # Nor have they these.
        decided_entries=_texts(document, "decided") if "decided" in document else (),
        budget=None if document.get("budget") is None else _budget(_READER.get(document, "budget", dict)),
    )


def _budget_document(use: BudgetUse) -> dict[str, Any]:
    return {"budget": str(use.budget), "asked": use.asked, "used": use.used}


def _budget(entry: Any) -> BudgetUse:
    text = _READER.get(entry, "budget", str)
    asked, used = (_READER.get(entry, key, float) for key in ("asked", "used"))
    try:
        return BudgetUse(budget=Budget.parse(text), asked=asked, used=used)
    except ValueError as error:
        raise _READER.error(str(error)) from error


def _kernel(entry: Any) -> Kernel:
    path = _READER.get(entry, "path", str)
    default = entry.get("stack_indices") is None  # the stack axes
    kernel = Kernel(
        path=path,
        layer=_READER.get(entry, "layer", str),
        shape=_READER.integers(entry, "shape"),
        reduction_axes=_READER.integers(entry, "reduction_axes"),
        output_axes=_READER.integers(entry, "output_axes"),
        stack_axes=_READER.integers(entry, "stack_axes"),
        stack_indices=None if default else _READER.integers(entry, "stack_indices"),
        positions=_READER.get(entry, "positions", int),
        # Documents of version 0.1.0 do not have it.
        param=_READER.get(entry, "param", str) if "param" in entry else "kernel",
        lookups=_READER.get(entry, "lookups", int) if "lookups" in entry else 0,
    )
    axes = kernel.stack_axes + kernel.reduction_axes + kernel.output_axes
    if sorted(axes) != list(range(len(kernel.shape))) or not kernel.reduction_axes or not kernel.output_axes:
        raise _READER.error(f"the axes of {path!r} are not those of its shape {kernel.shape}")
    counts = (kernel.positions, kernel.lookups)
    if min(kernel.shape) < 1 or min(counts) < 0 or max(counts) < 1:
        raise _READER.error(f"{path!r} has a size or positions below 1")
    indices = kernel.stack_axes if kernel.stack_indices is None else kernel.stack_indices
    own = len(kernel.shape) - len(kernel.stack_axes)
    inside = all(-own - i <= index + 1 and index <= own + i for i, index in enumerate(indices))
    if not inside or sorted(insert_axes(own, indices)[1]) != sorted(kernel.stack_axes):
        raise _READER.error(f"the stack indices of {path!r} do not give its stack axes")
    return kernel


def _texts(document: Any, key: str) -> tuple[tuple[str, str], ...]:
    texts = _READER.get(document, key, dict)
    if not all(isinstance(value, str) for value in texts.values()):
        raise _READER.error(f"{key!r} has a reason that is no text")
    return tuple(texts.items())
