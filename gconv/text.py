"""Lay out the plain text tables of reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def columns(rows: Iterable[Sequence[str]], left: int, rule: bool = False) -> str:
    """Return a table with columns as wide as they need.

    Args:
        rows: rows of cells, the same number in each; the first row is the head.
        left: how many columns are aligned left; the others, for numbers, are aligned right.
        rule: whether a line separates the head from the rest. Defaults to False.
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
