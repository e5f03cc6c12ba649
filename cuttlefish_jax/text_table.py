"""Tables in plain text."""

from __future__ import annotations

from collections.abc import Sequence, Set


def align(rows: Sequence[Sequence[str]], *, right: Set[int] = frozenset()) -> list[str]:
    """The lines of a table: a header, a rule below it, and rows.

    Args:
      rows: cells, the header first.
      right: the columns that are aligned to the right.

    Example:
      >>> print("\\n".join(align([("layer", "rank"), ("conv", "8")], right={1})))
      layer  rank
      -----  ----
      conv      8
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
