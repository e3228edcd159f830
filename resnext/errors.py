"""Errors that a user can fix, each in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from resnext.names import shown


class UserError(Exception):
    """One line that says what is wrong and how to fix it; the command line prints it and exits with 2."""

    def __str__(self) -> str:
        return shown(super().__str__())  # one line, whatever the names in it


class ToldError(UserError):
    """An error that all processes end with, and that the first of them prints."""


def explained(error: Exception) -> str | None:
    """Return in one line what the system refused and what helps; None if ``error`` is of another kind."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _MEMORY.search(str(error))):
        return "out of memory: use a smaller network, image size or --micro-batch, or fewer --workers"
    if ended := _WORKER.match(str(error)):
        ended = _WORKER.match(str(error.__cause__)) or ended  # of two errors the first one knows the signal
        return (
            f"a worker that reads images {ended[1]}; the system ends one when memory, or the shared memory "
            "in /dev/shm, runs out: use fewer --workers, or 0 for none"
        )
    return None


_MEMORY = re.compile("can't allocate memory|out of memory")  # a CPU's, every other device's
_WORKER = re.compile(
    r"DataLoader worker \(pid[^ ]* [\d, ]+\) "
    r"(is killed by signal: [\w ]+|exited unexpectedly(?: with exit code \d+)?)"
)


def brief(error: Exception) -> str:
    """Return ``error`` in one line, whatever it is."""
    lines = (line.strip() for line in str(error).splitlines())
    first = next(filter(None, lines), "")
    return explained(error) or (first if isinstance(error, UserError) else f"{type(error).__name__}: {first}")


@contextmanager
def keeping(what: str, kept: str) -> Iterator[None]:
    """Turn a failure inside into one line: ``what``, unless the error says it, and what is ``kept``."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{error}; {kept}") from error
    except Exception as error:
        raise UserError(f"{what} ({brief(error)}); {kept}") from error
