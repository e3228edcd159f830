"""A folder of measurements: the environment, and a line of JSON for each, so that runs can be continued."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gconv.measure.terminal import fail

RESULTS_FOLDER = Path(__file__).parent / "results"  # the committed results
MUST_MATCH = ("gpu", "cpu", "torch", "triton", "cudnn", "commit")  # must be equal for all rows of a folder
TableRow = dict[str, Any]  # a row as in its file


class Store:
    """A folder with ``environment.json`` and tables, ``NAME.jsonl``.

    Exits with an error if the folder was measured in a different environment.

    Args:
        folder: the folder. Created if it doesn't exist.
        environment: the environment of this run. Its ``MUST_MATCH`` values must equal those of the folder.
        overwrite: whether to delete existing measurements instead. Defaults to False.

    Attributes:
        environment: the environment of the first run in this folder.
    """

    def __init__(self, folder: Path, environment: dict[str, Any], overwrite: bool = False) -> None:
        self.folder = folder
        path = folder / "environment.json"
        if folder.exists() and not folder.is_dir():
            fail(f"{folder} isn't a folder: choose a different --out")
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists() and not overwrite:
            before = self.environment = read_environment(folder)
            for name in MUST_MATCH:
                if before.get(name) != environment.get(name):
                    fail(
                        f"{folder} was measured with {name} {before.get(name)}, but this is {name} "
                        f"{environment.get(name)}: choose a different --out, or delete the old measurements "
                        "with --overwrite"
                    )
            return
        self.environment = environment
        for table in folder.glob("*.jsonl"):
            print(f"deleted {table}", file=sys.stderr)
            table.unlink()
        write_json(path, environment)

    def read(self, table: str, row: type) -> list[TableRow]:
        """Return the rows of a table. ``row`` is the dataclass with their fields."""
        return read_table(self.folder / f"{table}.jsonl", row)

    def settled(self, table: str, row: type, names: Sequence[str]) -> set[tuple]:
        """Return the fields ``names`` of the rows that are done: right or wrong, but not failed."""
        rows = self.read(table, row)
        return {tuple(r[name] for name in names) for r in rows if r["problem"] is None or is_wrong(r)}

    def append(self, table: str, rows: Iterable[TableRow]) -> None:
        """Add rows to a table."""
        with open(self.folder / f"{table}.jsonl", "a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))


def read_environment(folder: Path) -> dict[str, Any]:
    """Return the environment that a folder was measured in."""
    path = folder / "environment.json"
    try:
        facts = json.loads(path.read_text())
        return {"gpu": facts["gpu"], "cpu": facts["cpu"], **facts}
    except (ValueError, KeyError, TypeError) as error:
        fail(f"can't read {path}, which is damaged: {error!r}")


def read_table(path: Path, row: type) -> list[TableRow]:
    """Return the rows of a JSON lines file, with the fields of the dataclass ``row``.

    Returns no rows if the file doesn't exist. Removes an incomplete last line, as a killed process leaves it.
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
            fail(f"can't read line {number} of {path}, which isn't a measurement: {error}")
    return rows


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file under a temporary name and rename it, so that ``path`` is always complete."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)


def is_committed(commit: str | None) -> bool:
    """Return whether ``commit`` identifies the code: it is known, and nothing was uncommitted."""
    return commit is not None and not commit.endswith("-dirty")


def is_wrong(row: TableRow) -> bool:
    """Whether a measurement has no time because its result was wrong."""
    return (row["problem"] or "").startswith("wrong")
