"""The command line: finds the command, prints help, and turns errors into one line."""

from __future__ import annotations

import argparse
import inspect
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from typing import NoReturn

import torch

import gconv
from resnext.cli import cardinality, costs, evaluate, export, predict, train
from resnext.cli.options import Parser, one_of
from resnext.cli.runtime import console, say
from resnext.errors import ToldError, UserError, explained
from resnext.interruption import Interrupted
from resnext.names import shown
from resnext.world import rank

PROG = "resnext"
ABOUT = "ResNeXt on gconv's grouped convolutions: train a network, use it, take it apart."
HINTS = """\
Start with `resnext train`, then `resnext evaluate` and `resnext predict runs/demo/samples`.
`resnext COMMAND --help` explains a command.
On several GPUs: `torchrun --nproc-per-node=4 -m resnext train ...`."""


@dataclass(frozen=True)
class Command:
    """A command, called as its function, whose docstring is its help."""

    run: Callable[[argparse.Namespace], None]
    add_arguments: Callable[[Parser], None]

    @property
    def name(self) -> str:
        """Return what the command line calls it."""
        return self.run.__name__

    @property
    def help(self) -> list[str]:
        """Return the paragraphs of its help; the first is a summary."""
        return (inspect.getdoc(self.run) or "").split("\n\n")


COMMANDS = {
    "train and use": (
        Command(train.train, train.add_arguments),
        Command(evaluate.evaluate, evaluate.add_arguments),
        Command(predict.predict, predict.add_arguments),
        Command(export.export, export.add_arguments),
    ),
    "compare and count": (
        Command(cardinality.cardinality, cardinality.add_arguments),
        Command(costs.summary, costs.add_summary_arguments),
        Command(costs.complexity, costs.add_complexity_arguments),
        Command(costs.traffic, costs.add_traffic_arguments),
    ),
}


def main() -> None:
    """Run the command line. What a user can fix is one line on stderr, and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal may not have every letter
            stream.reconfigure(errors="backslashreplace")
    try:
        _run(sys.argv[1:])
    except Interrupted as interrupted:
        if rank() == 0:
            say(f"interrupted: {interrupted}")
        sys.exit(128 + interrupted.number)
    except UserError as error:
        _fail(str(error), told=isinstance(error, ToldError))
    except Exception as error:
        what = explained(error)
        if what is None:
            raise
        _fail(what)


def _run(words: Sequence[str]) -> None:
    commands = {command.name: command for group in COMMANDS.values() for command in group}
    if words and words[0] in commands:
        command = commands[words[0]]
        parser = Parser(f"{PROG} {command.name}", description="\n\n".join(map(_wrapped, command.help)))
        command.add_arguments(parser)
        # Options may stand between arguments. `--` ends options, but not for parse_intermixed_args.
        parse = parser.parse_args if "--" in words else parser.parse_intermixed_args
        command.run(parse(words[1:]))
        return
    parser = Parser(PROG, usage=f"{PROG} [-h] [--version] COMMAND ...", description=_list(), epilog=HINTS)
    parser.add_argument("--version", action="store_true", help="print the versions of gconv and torch")
    parser.add_argument("COMMAND", nargs="?", help=argparse.SUPPRESS, type=one_of(*commands)["type"])
    if parser.parse_args(words).version:
        console.print(f"gconv {gconv.__version__}, torch {torch.__version__}")
        return
    parser.print_help()
    sys.exit(2)


def _list() -> str:
    """Return the help of all commands in short."""
    parts = [_wrapped(ABOUT)]
    for title, group in COMMANDS.items():
        lines = (_wrapped(command.help[0], f"  {command.name:<12} ") for command in group)
        parts.append("\n".join([f"{title}:", *lines]))
    return "\n\n".join(parts)


def _wrapped(text: str, start: str = "") -> str:
    width = min(shutil.get_terminal_size().columns, 110) - 2
    return textwrap.fill(text, width, initial_indent=start, subsequent_indent=" " * len(start))


def _fail(message: str, told: bool = False) -> NoReturn:
    if not told:
        print(f"error: {shown(message)}", file=sys.stderr)
    sys.exit(2)
