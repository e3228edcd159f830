"""The committed tables of the compiler's output for the kernels."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import matrix

ROOT = Path(__file__).parents[2]
PINNED = re.search(r"^triton==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
RUN_MATRIX = "run `make matrix` and commit its output"


def read_table(text: str) -> list[dict[str, str]]:
    """Return the rows of a table printed by ``python -m gconv kernels``, by column."""
    head, rule, *lines = text.splitlines()
    spans = [match.span() for match in re.finditer("-+", rule)]
    names = [head[start:end].strip() for start, end in spans]
    return [dict(zip(names, [line[a:b].strip() for a, b in spans], strict=True)) for line in lines]


def kept(version: str, name: str) -> list[dict[str, str]]:
    """Return the committed table ``name``, one of ``matrix.TABLES``, for a Triton version."""
    return read_table((matrix.COMMITTED / f"triton-{version}" / f"{name}.txt").read_text())


def spilling(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the rows of NVIDIA GPUs whose kernels spill registers."""
    return [row for row in rows if row["target"].startswith("sm_") and row["spills"] != "0"]
