"""What every command prints on a terminal: progress, one-line errors, exit codes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NoReturn, TypeVar

T = TypeVar("T")
STOPPED = 3  # exit code of a command that ran out of time before it finished
LINES = 10  # most progress lines, if stderr isn't a terminal


def track(items: Iterable[T], what: str, total: int | None = None, lines: int = LINES) -> Iterator[T]:
    """Yield ``items``, and show on stderr how many are done and about how long the rest will take.

    On a terminal, one line is updated in place; otherwise a few lines are printed.

    Args:
        items: the items to yield.
        what: the label of the line, such as "compiling".
        total: number of items. Defaults to None, the length of ``items``.
        lines: most lines to print if stderr isn't a terminal. Defaults to ``LINES``.
    """
    total = len(items) if total is None and isinstance(items, Collection) else total or 0
    moving, start, shown = sys.stderr.isatty(), time.monotonic(), -1
    done = 0
    for done, item in enumerate(items):
        part = done * lines // max(total, 1)
        if moving or (lines and part > shown):
            shown = part
            _show(what, done, total, time.monotonic() - start, moving)
        yield item
    if moving and total:
        _show(what, done + 1, total, time.monotonic() - start, moving)
        print(file=sys.stderr)


def run_resumable(command: Callable[[], int]) -> int:
    """Run a command that saves its results as it goes.

    If a file can't be read or written, prints the error and exits with code 2.

    Args:
        command: runs the command and returns its exit code.

    Returns:
        That exit code, or 130 after Ctrl-C.
    """
    try:
        return command()
    except KeyboardInterrupt:
        print(
            "\ninterrupted: the results so far are saved; run the same command again to continue",
            file=sys.stderr,
        )
        return 130
    except OSError as error:
        fail(f"can't read or write {error.filename}: {error.strerror}" if error.filename else error)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class if there is no message."""
    return str(error).partition("\n")[0] or type(error).__name__


def fail(message: object) -> NoReturn:
    """Print one line on stderr and exit with code 2, for problems that the user can fix."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _show(what: str, done: int, total: int, seconds: float, moving: bool) -> None:
    """Print a line of progress, over the previous one if ``moving``."""
    bar = f"[{'#' * (20 * done // max(total, 1)):<20}] " if moving else ""
    left = f", {_duration(seconds / done * (total - done))} left" if 0 < done < total else ""
    line = f"{what}: {bar}{done} of {total}{left}"
    print(f"\r{line:<79}" if moving else line, end="" if moving else "\n", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
