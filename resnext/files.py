"""Atomic file writing: a file is written completely or not at all."""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def part_of(path: Path) -> Path:
    """Return the path that ``path`` is written to until it is complete."""
    return path.with_suffix(".part")


@contextmanager
def replacing(path: Path, *, part: Path | None = None, previous: Path | None = None) -> Iterator[Path]:
    """Yield a path to write to, and rename it to ``path`` when the block ends.

    If the process dies at any moment, ``path`` has either its old content or the new one. The content is
    synced to disk before the file is renamed.

    Args:
        path: file to replace.
        part: path to write to, in the same folder. Defaults to ``part_of(path)``.
        previous: path to keep the replaced file at. Defaults to None, which deletes it.

    Raises:
        OSError: the file can't be written. The error names ``path``, which still has its old content.
    """
    part = part or part_of(path)
    try:
        yield part
        with part.open("r+b") as file:
            os.fsync(file.fileno())
        if previous and path.exists():
            _link(path, previous)
        part.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.filename not in (None, str(part)):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, atomically; see `replacing`."""
    with replacing(path) as part:
        part.write_text(text, "utf-8", newline="")  # keeps line ends, on Windows too


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a CSV file with a column for each key, atomically; see `replacing`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _link(path: Path, other: Path) -> None:
    """Give a file a second name; at any moment, at least one of the names exists."""
    part = part_of(other)
    part.unlink(missing_ok=True)
    try:
        os.link(path, part)
    except OSError:  # a file system without links
        shutil.copyfile(path, part)
    part.replace(other)


def _sync_folder(folder: Path) -> None:
    """Sync the names in ``folder`` to disk, if the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
