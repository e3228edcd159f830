"""The command line."""

from __future__ import annotations

import sys
from io import TextIOWrapper
from typing import Annotated, NoReturn

import torch
import typer

import gconv
from resnext.cli import counting, studying, training, using
from resnext.cli.options import console
from resnext.errors import ToldError, UserError, explained
from resnext.names import shown

app = typer.Typer(
    name="resnext",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="ResNeXt on gconv's grouped convolutions: train one, use it, take it apart.",
    epilog="Start with `resnext train`, then `resnext evaluate` and `resnext predict runs/demo/samples`. "
    "On several GPUs: `torchrun --nproc-per-node=4 -m resnext train ...`.",
)


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """What holds for every command."""
    if version:
        console.print(f"gconv {gconv.__version__}, torch {torch.__version__}")
        raise typer.Exit


for command, panel in (
    (training.train, "Train and use"),
    (using.evaluate, "Train and use"),
    (using.predict, "Train and use"),
    (using.export, "Train and use"),
    (studying.cardinality, "Compare and count"),
    (counting.summary, "Compare and count"),
    (counting.complexity, "Compare and count"),
    (counting.traffic, "Compare and count"),
):
    app.command(rich_help_panel=panel)(command)


def main() -> None:
    """Runs the command line; what a person can mend is one line on stderr, and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal may not have every letter
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except UserError as error:
        _fail(str(error), told=isinstance(error, ToldError))
    except Exception as error:
        what = explained(error)
        if what is None:
            raise
        _fail(what)


def _fail(message: str, told: bool = False) -> NoReturn:
    if not told:
        print(f"error: {shown(message)}", file=sys.stderr)
    sys.exit(2)
