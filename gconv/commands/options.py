"""The options that several commands share, and functions that read their values."""

from __future__ import annotations

import argparse
import importlib
import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn

from gconv.measure.terminal import fail, first_line

TF32 = "where tf32 is float32 multiplied in TF32, as F.conv2d does by default"  # for the help of --dtypes


class _Parser(argparse.ArgumentParser):
    """A parser that reports a wrong command line in one line, which points to the help."""

    def error(self, message: str) -> NoReturn:
        """Print ``message``, which argparse may have prefixed with "argument --batch: ", and exit."""
        message = re.sub(r"^argument (\S+): (?=must )", r"\1 ", message).removeprefix("argument ")
        fail(f"{message}; see `{self.prog} --help`")


def new_parser(prog: str, description: str, **settings: Any) -> argparse.ArgumentParser:
    """Return a parser that prints ``description`` without wrapping it again.

    Args:
        prog: name of the program.
        description: the text above the options.
        **settings: other arguments of ``argparse.ArgumentParser``.
    """
    raw = argparse.RawDescriptionHelpFormatter
    return _Parser(prog, description=description, formatter_class=raw, **settings)


def add_names(
    parser: argparse._ActionsContainer,
    option: str,
    names: Collection[str],
    default: Sequence[str] | None = None,
    purpose: str = "",
) -> None:
    """Add an option that accepts one or more of ``names``.

    Args:
        parser: the parser to add it to.
        option: the option, such as "--dtypes".
        names: the names to choose from.
        default: the value if the option isn't given. Defaults to None, all names.
        purpose: what the names select, for the help. Defaults to "", which lists only the names.
    """
    default = list(names if default is None else default)
    left_out = [name for name in names if name not in default]
    shown = " ".join(default) if len(left_out) > 1 else " but ".join(["all", *left_out])
    text = f"{purpose + ': ' if purpose else ''}{', '.join(names)} (default: {shown})"
    parser.add_argument(option, nargs="+", metavar="NAME", choices=list(names), default=default, help=text)


def add_input(parser: argparse._ActionsContainer) -> None:
    """Add ``--input SIZE ...``, the size of a network's input without the batch, and ``--image C H W``.

    Both set ``input``.
    """
    size = (3, 224, 224)
    parser.add_argument(
        "--input", type=count, nargs="+", default=size, metavar="SIZE",
        help="size of the network's input without the batch: channels, height and width of an image, "
        "channels and length of a sequence, or channels, depth, height and width of a volume; put it last "
        "(default: 3 224 224)",
    )  # fmt: skip
    parser.add_argument(
        "--image", type=count, nargs=3, dest="input", default=size, metavar=("C", "H", "W"),
        help="the same for an image: channels, height and width",
    )  # fmt: skip


def add_batch(parser: argparse._ActionsContainer, default: int | list[int], help: str) -> None:
    """Add ``--batch``, which accepts one size, or several if ``default`` is a list."""
    several = isinstance(default, list)
    shown = " ".join(map(str, default)) if isinstance(default, list) else default
    parser.add_argument(
        "--batch", type=count, nargs="+" if several else None, default=default, metavar="N",
        help=f"{help} (default: {shown})",
    )  # fmt: skip


def add_processes(parser: argparse._ActionsContainer) -> None:
    """Add ``--processes N``. The default is None, one per core."""
    parser.add_argument(
        "--processes",
        type=count,
        metavar="N",
        help="number of processes that compile kernels (default: one per core)",
    )


def count(text: str) -> int:
    """Return the positive integer that ``text`` spells; a type for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def minutes(text: str) -> float:
    """Return the positive number of minutes that ``text`` spells; a type for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number > 0:
        raise argparse.ArgumentTypeError(f"must be a positive number of minutes, got {text!r}")
    return number


def load_function(name: str) -> Callable[..., Any]:
    """Import the function named by ``MODULE:FUNCTION``, or exit with a one-line error."""
    module, _, function = name.partition(":")
    if not function:
        fail(f"the model must be MODULE:FUNCTION, such as torchvision.models:resnext50_32x4d, got {name!r}")
    try:
        return getattr(importlib.import_module(module), function)
    except Exception as error:  # importing a module can raise any error
        fail(f"can't import {name}: {first_line(error)}")
