"""Plain text tables, for reports that people print."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def columns(rows: Iterable[Sequence[str]], left: int, rule: bool = False) -> str:
    """A table, the head being its first row.

    Args:
        rows: of cells, as many in each.
        left: as many columns are flush left; the others, numbers, flush right.
        rule: whether a line divides head and body.
    """
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if rule:
        rows.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
