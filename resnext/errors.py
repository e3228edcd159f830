"""Errors that a user can fix, each printed as one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from resnext.names import shown


class UserError(Exception):
    """An error that a user can fix. The command line prints it as one line and exits with code 2."""

    def __str__(self) -> str:
        return shown(super().__str__())  # one line, even if names in it contain line breaks


class ToldError(UserError):
    """An error that ends all processes and that only the first one prints."""


def explained(error: Exception) -> str | None:
    """Describe an error of the system and its fix in one line. Return None for any other error."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _MEMORY.search(str(error))):
        return "out of memory: use a smaller network, image size or --micro-batch, or fewer --workers"
    if ended := _WORKER.match(str(error)):
        ended = _WORKER.match(str(error.__cause__)) or ended  # of the two errors, the cause names the signal
        return (
            f"a worker process that reads images {ended[1]}, probably because memory or shared memory "
            "(/dev/shm) ran out: use fewer --workers, or --workers 0"
        )
    return None


_MEMORY = re.compile("can't allocate memory|out of memory")  # on a CPU, on other devices
_WORKER = re.compile(
    r"DataLoader worker \(pid[^ ]* [\d, ]+\) "
    r"(is killed by signal: [\w ]+|exited unexpectedly(?: with exit code \d+)?)"
)


def brief(error: Exception) -> str:
    """Describe any error in one line."""
    lines = (line.strip() for line in str(error).splitlines())
    first = next(filter(None, lines), "")
    return explained(error) or (first if isinstance(error, UserError) else f"{type(error).__name__}: {first}")


@contextmanager
def keeping(what: str, kept: str) -> Iterator[None]:
    """Re-raise an error as a ``UserError`` with ``kept``, and with ``what`` unless it is one already."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{error}; {kept}") from error
    except Exception as error:
        raise UserError(f"{what} ({brief(error)}); {kept}") from error
