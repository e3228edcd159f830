"""Helpers for tests of the command line: tables, one-line errors, CSV files."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

Run = Callable[..., tuple[int, str, str]]

# Options for a training run that takes a second.
SMALL = ("--epochs", "2", "--repeats", "1,1,0,0", "--cardinality", "2", "--base-width", "2")


def cells(out: str) -> list[list[str]]:
    """Return the cells of the tables in ``out``, row by row."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]


def one_line(err: str, *parts: str) -> None:
    """Assert that ``err`` is a one-line error that contains all ``parts``."""
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    for part in parts:
        assert part in err, err


def rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    return list(csv.DictReader(path.read_text().splitlines()))
