"""What a command line needs that torch does not bring: progress lines, option types, one way to fail."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
STOPPED = 3  # exit code: time was up, and something is left to do
LINES = 10  # of progress where stderr is no terminal


def track(items: Iterable[T], what: str, total: int | None = None, lines: int = LINES) -> Iterator[T]:
    """``items``, with a line on stderr that says how many are done and how long the rest may take.

    The line moves on a terminal; elsewhere there are as many as ``lines`` at most.
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


def add_names(
    parser: argparse.ArgumentParser,
    option: str,
    of: Collection[str],
    default: Sequence[str] | None = None,
    note: str = "",
) -> None:
    """An option that takes some of the names ``of``; all by default.

    ``note`` follows the names in the help.
    """
    default = list(of if default is None else default)
    left_out = [name for name in of if name not in default]
    told = " ".join(default) if len(left_out) > 1 else " but ".join(["all", *left_out])
    text = f"of {', '.join(of)}{note}; default: {told}"
    parser.add_argument(option, nargs="+", metavar="NAME", choices=list(of), default=default, help=text)


def run_resumable(command: Callable[[], int]) -> int:
    """Runs a command that keeps what it has done; its exit code."""
    try:
        return command()
    except KeyboardInterrupt:
        print(
            "\ninterrupted: what was measured is kept; the same command goes on from there", file=sys.stderr
        )
        return 130
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else error)


def count(text: str) -> int:
    """For argparse: a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def minutes(text: str) -> float:
    """For argparse: a time to stop after."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number > 0:
        raise argparse.ArgumentTypeError(f"must be a positive number of minutes, got {text!r}")
    return number


def load_function(name: str) -> Callable[..., Any]:
    """Import what ``MODULE:FUNCTION`` names, or fail with a line."""
    module, _, function = name.partition(":")
    if not function:
        fail(f"{name} must be MODULE:FUNCTION, such as torchvision.models:resnext50_32x4d")
    try:
        return getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever a stranger's module raises
        fail(f"{name}: {first_line(error)}")


def first_line(error: Exception) -> str:
    """What an error says first; its class, if that is nothing."""
    return str(error).partition("\n")[0] or type(error).__name__


def fail(message: Any) -> NoReturn:
    """One line on stderr, and exit code 2: for what a person can mend."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _show(what: str, done: int, total: int, seconds: float, moving: bool) -> None:
    bar = f"[{'#' * (20 * done // max(total, 1)):<20}] " if moving else ""
    left = f", {_duration(seconds / done * (total - done))} left" if 0 < done < total else ""
    line = f"{what}: {bar}{done} of {total}{left}"
    print(f"\r{line:<79}" if moving else line, end="" if moving else "\n", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
