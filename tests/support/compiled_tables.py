"""The committed tables of what the compiler makes of the kernels."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import matrix

ROOT = Path(__file__).parents[2]
PINNED = re.search(r"^triton==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
RUN_MATRIX = "run `make matrix` and commit what it writes"


def read_table(text: str) -> list[dict[str, str]]:
    """Return the rows of a table of ``python -m gconv kernels``, by heading."""
    head, rule, *lines = text.splitlines()
    spans = [match.span() for match in re.finditer("-+", rule)]
    names = [head[start:end].strip() for start, end in spans]
    return [dict(zip(names, [line[a:b].strip() for a, b in spans], strict=True)) for line in lines]


def kept(version: str, name: str) -> list[dict[str, str]]:
    """Return a committed table: of Triton ``version``, one of ``matrix.TABLES``."""
    return read_table((matrix.COMMITTED / f"triton-{version}" / f"{name}.txt").read_text())


def spilling(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the rows of NVIDIA GPUs whose kernels spill registers."""
    return [row for row in rows if row["target"].startswith("sm_") and row["spills"] != "0"]
