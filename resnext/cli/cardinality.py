"""The command ``resnext cardinality``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from resnext import plots, study, tables
from resnext.cli.options import (
    RUNS,
    Parser,
    add_fields,
    add_machine,
    given,
    number,
    one_of,
    options_of,
    settings_of,
)
from resnext.cli.runtime import backend_of, console, data_of, device_of, print_table, say
from resnext.comparison import Compared, verdict
from resnext.config import DEFAULT_OPTIONS, Options, Recipe, Source
from resnext.data import Data
from resnext.errors import UserError, keeping
from resnext.names import shown
from resnext.progress import progress_bar
from resnext.study import PRESETS, Preset
from resnext.world import join

CIFAR = ("cifar10", "cifar100")


def add_arguments(parser: Parser) -> None:
    """Add the options of ``cardinality``."""
    parser.usage = "%(prog)s [PATH] [options]"
    recipes = {name: preset.settings.recipe for name, preset in PRESETS.items()}
    options = {"": DEFAULT_OPTIONS}
    what = parser.add_argument_group("study")
    about = "; ".join(f"{name}: {preset.about}" for name, preset in PRESETS.items())
    what.add_argument("--preset", default="small", help=f"{about} (default: small)", **one_of(*PRESETS))
    text = "number of trainings of each network, with seeds 0, 1, ... (default: 3)"
    what.add_argument("--seeds", type=number(int, 1, 100), default=3, metavar="N", help=text)
    data = parser.add_argument_group("data")
    add_fields(data, Source, "path", defaults={"": Source()})
    text = "data set of the preset cifar (default: cifar10)"
    data.add_argument("--data", default=argparse.SUPPRESS, help=text, **one_of(*CIFAR))
    add_fields(data, Options, "workers", defaults=options)
    recipe = parser.add_argument_group("recipe")
    add_fields(recipe, Recipe, "epochs", "micro_batch", "precision", defaults=recipes)
    running = parser.add_argument_group("execution")
    add_machine(running)
    add_fields(running, Options, "compile", defaults=options)
    output = parser.add_argument_group("output")
    output.add_argument("--name", help="name of the study, a folder in --out (default: cardinality-PRESET)")
    output.add_argument("--out", type=Path, default=RUNS, help=f"folder of all runs (default: {RUNS})")


def cardinality(arguments: argparse.Namespace) -> None:
    """Train networks of equal complexity, from one wide group to 32 narrow groups, and compare their errors.

    This is the comparison of section 5.1 of the ResNeXt paper. Each network, a pair of cardinality C and
    width d, is trained with several seeds. The table shows the errors and their spread next to the ImageNet
    errors that the paper reports, and a line below it whether the differences exceed the noise between seeds.
    The folder OUT/NAME contains study.csv, cardinality.png and a run for each training.

    Ctrl-C stops the study. Run the same command again to continue, even in the middle of a training.

    Examples:
      resnext cardinality
      resnext cardinality --preset cifar cifar-10-python.tar.gz --seeds 5
    """
    preset = _preset(arguments)
    device = device_of(arguments.device)
    folder = arguments.out / (arguments.name or f"cardinality-{arguments.preset}")
    with backend_of(arguments.backend, device), join(device) as world:
        data = world.each_does(lambda: data_of(preset.settings.source))
        printer = console if world.first else Console(quiet=True)
        _print_plan(printer, arguments, preset, data, folder)
        with progress_bar(printer) as progress:
            done = study.study(
                preset,
                data,
                arguments.seeds,
                folder,
                world,
                Console(quiet=True),
                progress,
                options=options_of(arguments, data),
                finished=lambda name, error: printer.print(f"{name:<16} error {error:6.2f}%"),
            )
        if world.first:
            title = f"{data.name}, {preset.settings.recipe.epochs} epochs, {arguments.seeds} seeds"
            _print_result(title, done, data, folder)


def _preset(arguments: argparse.Namespace) -> Preset:
    """Return the preset, with its settings overridden by the command line."""
    preset = PRESETS[arguments.preset]
    name = preset.settings.source.name
    if "name" in given(arguments, Source) and name not in CIFAR:
        raise UserError(
            f"--data {arguments.data} needs --preset cifar; --preset {arguments.preset} always uses {name}"
        )
    return replace(preset, settings=settings_of(arguments, preset.settings))


def _print_plan(
    printer: Console, arguments: argparse.Namespace, preset: Preset, data: Data, folder: Path
) -> None:
    printer.print(f"{arguments.preset}: {preset.about}", soft_wrap=True)
    printer.print(
        f"{len(preset.pairs)} networks x {arguments.seeds} seeds, {preset.settings.recipe.epochs} epochs "
        f"each, on {len(data.train):,} images of {data.name}, {len(data.test):,} held out; "
        f"results in {shown(folder)}\n",
        soft_wrap=True,
    )


def _print_result(title: str, done: list[Compared], data: Data, folder: Path) -> None:
    picture, table = folder / "cardinality.png", folder / "study.csv"
    console.print()
    print_table(tables.of_study(title, done))
    console.print(f"\n{verdict(done, len(data.test))}")
    console.print(
        "The paper's errors are top-1 errors of 50-layer networks on ImageNet: compare only their order."
    )
    with keeping(f"couldn't write {picture}", f"{table} is written; run the same command again to plot it"):
        plots.cardinality(picture, done, data.name)
    say(f"\nwrote {shown(picture)} and {shown(table)}")
