"""The tables of the page of measurements: what ``benchmarks/*.py --json`` wrote to ``benchmarks/results``."""

import json
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def show(name: str, *, notes: bool = True) -> None:
    """Prints one measurement as markdown: the command, where and when it ran, the table, its notes.

    Args:
      name: of the file in ``benchmarks/results``, without ``.json``.
      notes: whether to print the lines below the table too.
    """
    result = json.loads((RESULTS / f"{name}.json").read_text())
    where = result["environment"]
    print(f"```\n{result['command']}\n```\n")
    versions = ", ".join(f"{key} {where[key]}" for key in ("python", "jax", "flax") if key in where)
    print(f"{where['device']}, {versions}, {where['date']}.\n")
    rows = result["rows"]
    header = list(dict.fromkeys(key for row in rows for key in row))
    print("|", " | ".join(header), "|")
    print("|", " | ".join("---" for _ in header), "|")
    for row in rows:
        print("|", " | ".join(_cell(row.get(key)) for key in header), "|")
    print()
    if notes:
        for note in result.get("notes", []):
            print(f"- {note}")
    print()


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value).replace("|", "\\|")
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
