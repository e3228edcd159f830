"""A folder of measurements: what they were made on, and a line of JSON for each, so that a run can go on."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gconv.measure.terminal import fail

SAME = ("gpu", "cpu", "torch", "triton", "cudnn", "commit")  # what rows of one folder have in common


class Store:
    """``environment.json`` and the tables, ``NAME.jsonl``, of a folder.

    Args:
        folder: made if it is not there.
        environment: of this run. One that differs in what counts from the folder's is refused.
        overwrite: drop what is there instead.

    Attributes:
        environment: the folder's, that of its first run.
    """

    def __init__(self, folder: Path, environment: dict[str, Any], overwrite: bool = False) -> None:
        self.folder = folder
        path = folder / "environment.json"
        if folder.exists() and not folder.is_dir():
            fail(f"{folder} is no folder")
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists() and not overwrite:
            before = self.environment = read_environment(folder)
            for name in SAME:
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
        path.write_text(json.dumps(environment, indent=1) + "\n")

    def read(self, table: str, row: type) -> list[dict[str, Any]]:
        """The rows of a table, each such as ``row`` takes."""
        return read_table(self.folder / f"{table}.jsonl", row)

    def settled(self, table: str, row: type, names: Sequence[str]) -> set[tuple]:
        """Fields of the rows that were run, with a time or wrong. What could not be run is tried again."""
        rows = self.read(table, row)
        return {tuple(r[name] for name in names) for r in rows if r["problem"] is None or is_wrong(r)}

    def append(self, table: str, rows: Iterable[dict[str, Any]]) -> None:
        """Adds rows to a table, all or none of them in the file."""
        with open(self.folder / f"{table}.jsonl", "a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))


def read_environment(folder: Path) -> dict[str, Any]:
    """What a folder was measured on."""
    path = folder / "environment.json"
    try:
        facts = json.loads(path.read_text())
        return {"gpu": facts["gpu"], "cpu": facts["cpu"], **facts}
    except (ValueError, KeyError, TypeError) as error:
        fail(f"{path} is damaged: {error!r}")


def read_table(path: Path, row: type) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, each such as ``row`` takes; none where it is not there.

    A last line that was cut off, as by a kill, is taken away.
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
            fail(f"{path}, line {number}, is no measurement: {error}")
    return rows


def is_wrong(row: dict[str, Any]) -> bool:
    """Whether a measurement has no time because its answer was wrong."""
    return (row["problem"] or "").startswith("wrong")
