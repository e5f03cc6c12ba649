"""What the benchmarks share: the line that says where a figure was taken, the table, the JSON."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import jax


def environment() -> dict[str, Any]:
    """Device, versions and date of this measurement."""
    devices = jax.devices()
    return {
        "device": f"{len(devices)} x {devices[0].device_kind} on {platform.machine()}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "date": datetime.date.today().isoformat(),
    }


def report(
    rows: Sequence[Mapping[str, Any]], json_file: str | None = None, *, notes: Sequence[str] = ()
) -> None:
    """Prints the rows as a table, the environment above and the notes below it; the same to a JSON file."""
    where = environment()
    print(", ".join(f"{name} {value}" for name, value in where.items()), end="\n\n")
    header = list(dict.fromkeys(key for row in rows for key in row))
    cells = [header, *([_show(row.get(key)) for key in header] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    cells.insert(1, ["-" * width for width in widths])
    for line in cells:
        shown = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        print("  ".join(shown).rstrip())
    for note in notes:
        print(f"\n{note}")
    if json_file:
        contents = {"environment": where, "rows": list(rows), "notes": list(notes)}
        Path(json_file).write_text(json.dumps(contents, indent=1) + "\n")


def _show(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
