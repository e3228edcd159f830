"""A folder of measurements: their environment, and a line of JSON for each, so that a run can go on."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gconv.measure.terminal import fail

RESULTS_FOLDER = Path(__file__).parent / "results"  # the committed results
MUST_MATCH = ("gpu", "cpu", "torch", "triton", "cudnn", "commit")  # for all rows of a folder
TableRow = dict[str, Any]  # a row as its file has it


class Store:
    """A folder with ``environment.json`` and tables, ``NAME.jsonl``.

    Args:
        folder: made if it does not exist.
        environment: of this run. Must equal the folder's in ``MUST_MATCH``.
        overwrite: drop what the folder holds instead.

    Attributes:
        environment: that of the folder's first run.
    """

    def __init__(self, folder: Path, environment: dict[str, Any], overwrite: bool = False) -> None:
        self.folder = folder
        path = folder / "environment.json"
        if folder.exists() and not folder.is_dir():
            fail(f"{folder} is not a folder: choose another --out")
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists() and not overwrite:
            before = self.environment = read_environment(folder)
            for name in MUST_MATCH:
                if before.get(name) != environment.get(name):
                    fail(
                        f"{folder} was measured with {name} {before.get(name)}, now {environment.get(name)}: "
                        "choose another --out, or --overwrite"
                    )
            return
        self.environment = environment
        for table in folder.glob("*.jsonl"):
            print(f"dropped {table}", file=sys.stderr)
            table.unlink()
        write_json(path, environment)

    def read(self, table: str, row: type) -> list[TableRow]:
        """Return the rows of a table, with the fields of the dataclass ``row``."""
        return read_table(self.folder / f"{table}.jsonl", row)

    def settled(self, table: str, row: type, names: Sequence[str]) -> set[tuple]:
        """Return the fields ``names`` of rows that ran, right or wrong; those that failed are tried again."""
        rows = self.read(table, row)
        return {tuple(r[name] for name in names) for r in rows if r["problem"] is None or is_wrong(r)}

    def append(self, table: str, rows: Iterable[TableRow]) -> None:
        """Add rows to a table."""
        with open(self.folder / f"{table}.jsonl", "a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))


def read_environment(folder: Path) -> dict[str, Any]:
    """Return what a folder was measured on."""
    path = folder / "environment.json"
    try:
        facts = json.loads(path.read_text())
        return {"gpu": facts["gpu"], "cpu": facts["cpu"], **facts}
    except (ValueError, KeyError, TypeError) as error:
        fail(f"{path} is damaged: {error!r}")


def read_table(path: Path, row: type) -> list[TableRow]:
    """Return the rows of a file of JSON lines, with the fields of the dataclass ``row``; none without a file.

    Removes a last line that was cut off, as when the process was killed.
    """
    if not path.exists():
        return []
    *lines, rest = path.read_text().split("\n")
    if rest:
        path.write_text("".join(f"{line}\n" for line in lines))
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(asdict(row(**json.loads(line))))
        except (ValueError, TypeError) as error:
            fail(f"{path}, line {number}, is not a measurement: {error}")
    return rows


def write_json(path: Path, value: Any) -> None:
    """Write a file of JSON, beside the old one and then over it, so that it is always whole."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)


def is_committed(commit: str | None) -> bool:
    """Return whether results of this ``commit`` can be told from those of other code."""
    return commit is not None and not commit.endswith("-dirty")


def is_wrong(row: TableRow) -> bool:
    """Whether a measurement has no time because its answer was wrong."""
    return (row["problem"] or "").startswith("wrong")
