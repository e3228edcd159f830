"""Files that are written whole or not at all."""

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
    """Return where ``path`` is written until it is whole."""
    return path.with_suffix(".part")


@contextmanager
def replacing(path: Path, *, part: Path | None = None, previous: Path | None = None) -> Iterator[Path]:
    """Yield a path to write to, and put the file in the place of ``path`` when the block ends.

    Whenever the process dies, ``path`` holds its old content or the new one. The content reaches the disk
    before it gets its name.

    Args:
        path: the file to write.
        part: the path to write to, in the same folder. Defaults to ``part_of(path)``.
        previous: gets the file that is replaced. By default that file is gone.

    Raises:
        OSError: the file cannot be written, and ``path`` still holds its old content; its name is in the
            error.
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
    """Write a text file in UTF-8, as :func:`replacing` does."""
    with replacing(path) as part:
        part.write_text(text, "utf-8", newline="")  # line ends as they are, on Windows too


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table with a column for each key, as :func:`replacing` does."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _link(path: Path, other: Path) -> None:
    """Give a file a second name, without a moment at which neither name is there."""
    part = part_of(other)
    part.unlink(missing_ok=True)
    try:
        os.link(path, part)
    except OSError:  # a file system without links
        shutil.copyfile(path, part)
    part.replace(other)


def _sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` last, if the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
