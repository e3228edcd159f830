"""The command line: runs commands, prints help, and prints each error as one line."""

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
ABOUT = "Train, use and analyze ResNeXt networks, which run on gconv's grouped convolutions."
HINTS = """\
To start:
  resnext train                       train a small network on 4,000 digits (two to three minutes)
  resnext evaluate                    test it on 1,000 others
  resnext predict runs/demo/samples   classify some of them

`resnext COMMAND --help` shows the options of a command."""


@dataclass(frozen=True)
class Command:
    """A command, named after its function, whose docstring is its help."""

    run: Callable[[argparse.Namespace], None]
    add_arguments: Callable[[Parser], None]

    @property
    def name(self) -> str:
        """Name of the command on the command line."""
        return self.run.__name__

    @property
    def help(self) -> list[str]:
        """Paragraphs of the help, of which the first is a summary."""
        return (inspect.getdoc(self.run) or "").split("\n\n")

    @property
    def summary(self) -> str:
        """The first sentence of the help as a phrase, for the list of commands."""
        return self.help[0][0].lower() + self.help[0][1:].rstrip(".")


COMMANDS = {
    "train and use": (
        Command(train.train, train.add_arguments),
        Command(evaluate.evaluate, evaluate.add_arguments),
        Command(predict.predict, predict.add_arguments),
        Command(export.export, export.add_arguments),
    ),
    "compare networks": (
        Command(cardinality.cardinality, cardinality.add_arguments),
        Command(costs.summary, costs.add_summary_arguments),
        Command(costs.complexity, costs.add_complexity_arguments),
        Command(costs.traffic, costs.add_traffic_arguments),
    ),
}


def main() -> None:
    """Run the command line. An error that a user can fix prints one line on stderr and exits with code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # the encoding of a terminal may lack some letters
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
        # Intermixed parsing allows options between arguments, but doesn't support `--`.
        parse = parser.parse_args if "--" in words else parser.parse_intermixed_args
        command.run(parse(words[1:]))
        return
    parser = Parser(PROG, usage=f"{PROG} [-h] [--version] COMMAND ...", description=_list(), epilog=HINTS)
    parser.add_argument(
        "--version", action="store_true", help="print the versions of gconv and torch and exit"
    )
    parser.add_argument("COMMAND", nargs="?", help=argparse.SUPPRESS, type=one_of(*commands)["type"])
    if parser.parse_args(words).version:
        console.print(f"gconv {gconv.__version__}, torch {torch.__version__}")
        return
    parser.print_help()
    sys.exit(2)


def _list() -> str:
    """Return the summaries of all commands."""
    parts = [_wrapped(ABOUT)]
    for title, group in COMMANDS.items():
        lines = (_wrapped(command.summary, f"  {command.name:<12} ") for command in group)
        parts.append("\n".join([f"{title}:", *lines]))
    return "\n\n".join(parts)


def _wrapped(text: str, start: str = "") -> str:
    """Return ``text`` wrapped to the terminal, or unchanged if it has indented lines, such as examples."""
    if "\n  " in text:
        return text
    width = min(shutil.get_terminal_size().columns, 110) - 2
    return textwrap.fill(
        text, width, initial_indent=start, subsequent_indent=" " * len(start), break_on_hyphens=False
    )


def _fail(message: str, told: bool = False) -> NoReturn:
    if not told:
        print(f"error: {shown(message)}", file=sys.stderr)
    sys.exit(2)
