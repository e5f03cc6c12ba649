"""A factorization plan as a JSON document, and back: a document from elsewhere is not trusted."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from cuttlefish_jax.kernels import Kernel, Kernels, insert_axes

if TYPE_CHECKING:
    from cuttlefish_jax.plan import FactorizationPlan

_FORMAT = 1


def write_plan(plan: FactorizationPlan) -> str:
    """The document that :func:`read_plan` reads."""
    document = {
        "format": _FORMAT,
        "ranks": plan.ranks,
        "kept": dict(plan.kept_entries),
        "skipped": plan.kernels.skipped,
        "extra_batch_norm": plan.extra_batch_norm,
        "num_params_full": plan.num_params_full,
        "num_params": plan.num_params,
        "embedding_first": plan.kernels.embedding_first,
        "kernels": [dataclasses.asdict(kernel) for kernel in plan.kernels.values()],
    }
    return json.dumps(document, indent=1)


def read_plan(text: str) -> dict[str, Any]:
    """The fields of the plan that :func:`write_plan` wrote; a ValueError for any other text."""
    try:
        document = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except (TypeError, ValueError, RecursionError) as error:
        raise _error(f"it is not JSON: {error}") from error
    if (version := _get(document, "format", int)) != _FORMAT:
        raise _error(f"its format {version} is not {_FORMAT}")
    entries = tuple(_kernel(entry) for entry in _get(document, "kernels", list))
    if len({kernel.path for kernel in entries}) < len(entries):
        raise _error("two of its kernels have one path")
    return dict(
        kernels=Kernels(
            entries=entries,
            skipped_entries=_texts(document, "skipped"),
            num_params=_get(document, "num_params_full", int),
            # Documents of version 0.1.0 do not have it.
            embedding_first="embedding_first" in document and _get(document, "embedding_first", bool),
        ),
        rank_entries=tuple(_get(document, "ranks", dict).items()),
        kept_entries=_texts(document, "kept"),
        extra_batch_norm=_get(document, "extra_batch_norm", bool),
    )


def _kernel(entry: Any) -> Kernel:
    path = _get(entry, "path", str)
    kernel = Kernel(
        path=path,
        layer=_get(entry, "layer", str),
        shape=_integers(entry, "shape"),
        reduction_axes=_integers(entry, "reduction_axes"),
        output_axes=_integers(entry, "output_axes"),
        stack_axes=_integers(entry, "stack_axes"),
        stack_indices=_integers(entry, "stack_indices") if entry.get("stack_indices") is not None else None,
        positions=_get(entry, "positions", int),
    )
    axes = kernel.stack_axes + kernel.reduction_axes + kernel.output_axes
    if sorted(axes) != list(range(len(kernel.shape))) or not kernel.reduction_axes or not kernel.output_axes:
        raise ValueError(
            f"not a factorization plan: the axes of {path!r} are not those of its shape {kernel.shape}"
        )
    if min(kernel.shape) < 1 or kernel.positions < 1:
        raise _error(f"{path!r} has a size or positions below 1")
    indices = kernel.stack_axes if kernel.stack_indices is None else kernel.stack_indices
    own = len(kernel.shape) - len(kernel.stack_axes)
    inside = all(-own - i <= index + 1 and index <= own + i for i, index in enumerate(indices))
    if not inside or sorted(insert_axes(own, indices)[1]) != sorted(kernel.stack_axes):
        raise ValueError(
            f"not a factorization plan: the stack indices of {path!r} do not give its stack axes"
        )
    return kernel


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(document := dict(pairs)) < len(pairs):
        raise ValueError("an object has the same key twice")
    return document


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _get(document: Any, key: str, kind: type) -> Any:
    if not isinstance(document, dict) or key not in document:
        raise _error(f"there is no {key!r}")
    value = document[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _error(f"{key!r} is {value!r:.40}, expected {kind.__name__}")
    return value


def _integers(document: Any, key: str) -> tuple[int, ...]:
    values = _get(document, key, list)
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        raise _error(f"{key!r} is {values!r:.40}, expected integers")
    return tuple(values)


def _texts(document: Any, key: str) -> tuple[tuple[str, str], ...]:
    texts = _get(document, key, dict)
    if not all(isinstance(value, str) for value in texts.values()):
        raise _error(f"{key!r} has a reason that is no text")
    return tuple(texts.items())


def _error(what: str) -> ValueError:
    return ValueError(f"not a factorization plan: {what}")
