"""Lay out plain text: tables, and numbers with their nouns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "u"))


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, such as "1 residual" or "2 residuals"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def prefixed(value: float, unit: str) -> str:
    """Return a value with a unit and its prefix, such as "231 MFLOP" or "97.9 us"."""
    scale, prefix = next(((s, p) for s, p in PREFIXES if value >= s), PREFIXES[-1])
    return f"{value / scale:.4g} {prefix}{unit}"


def columns(rows: Iterable[Sequence[str]], left: int, rule: bool = False) -> str:
    """Return a table whose columns are as wide as their longest cell.

    Args:
        rows: rows of cells, all of the same length; the first row is the header.
        left: number of left-aligned columns, from the first; the others, for numbers, are right-aligned.
        rule: whether to draw a line below the header. Defaults to False.
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
