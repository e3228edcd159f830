"""``resnext cardinality``."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from resnext import plots, tables
from resnext import study as studying
from resnext.cli.options import (
    RUNS,
    Backend,
    BackendOption,
    DeviceOption,
    WorkersOption,
    backend_of,
    console,
    data_of,
    device_of,
    print_table,
)
from resnext.cli.training import Precision, default_workers, told_when_interrupted
from resnext.comparison import verdict
from resnext.config import Options, Settings
from resnext.errors import UserError, keeping
from resnext.names import shown
from resnext.study import PRESETS, Preset
from resnext.train import progress_bar
from resnext.world import join

PresetName = StrEnum("PresetName", list(PRESETS))
Cifar = StrEnum("Cifar", ["cifar10", "cifar100"])


def cardinality(
    path: Annotated[
        Path | None, typer.Argument(help="Of the preset cifar: the published archive, or its folder.")
    ] = None,
    preset: Annotated[
        PresetName,
        typer.Option(help="; ".join(f"**{name}**: {p.about}" for name, p in PRESETS.items()) + "."),
    ] = PresetName.small,
    data: Annotated[Cifar | None, typer.Option(help="Of the preset cifar.")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Trainings of each pair.")] = 3,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Of each training, instead of the preset's.")
    ] = None,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Images of one forward pass, as in `train`.")
    ] = None,
    precision: Annotated[Precision | None, typer.Option(help="Of autocast, as in `train`.")] = None,
    name: Annotated[
        str | None,
        typer.Option(help="The study's name: a folder of it is made in --out. [cardinality-PRESET]"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where runs are kept.")] = RUNS,
    workers: WorkersOption = None,
    compile: Annotated[bool, typer.Option("--compile", help="With torch.compile.")] = False,
    device: DeviceOption = "auto",
    backend: BackendOption = Backend.auto,
) -> None:
    """Train the paper's comparison: five networks, equally complex, of few wide groups to many narrow ones.

    Each pair of cardinality C and width d is trained with several seeds; the table has the errors with their
    spread beside those that the paper reports for ImageNet, and says when the differences are within the
    noise. Leaves in OUT/NAME a run for each training, `study.csv` and `cardinality.png`.

    Ctrl-C stops it; the same command goes on where it was, in the middle of a training too.
    """
    settings = _settings(PRESETS[preset], data, path, epochs, micro_batch, precision)
    compared = replace(PRESETS[preset], settings=settings)
    where = device_of(device)
    folder = out / (name or f"cardinality-{preset.value}")
    with backend_of(backend, where), told_when_interrupted(), join(where) as world:
        images = world.each_does(lambda: data_of(settings.source))
        options = Options(default_workers(images) if workers is None else workers, compile=compile)
        printer = console if world.first else Console(quiet=True)
        printer.print(f"{preset.value}: {PRESETS[preset].about}", soft_wrap=True)
        printer.print(
            f"{len(compared.pairs)} networks x {seeds} seeds, {settings.recipe.epochs} epochs each, on "
            f"{len(images.train):,} images of {images.name}; {len(images.test):,} held out. "
            f"Kept in {shown(folder)}\n",
            soft_wrap=True,
        )
        with progress_bar(printer) as progress:
            done = studying.study(
                compared,
                images,
                seeds,
                folder,
                world,
                Console(quiet=True),
                progress,
                options=options,
                finished=lambda training, error: printer.print(f"{training:<16} error {error:6.2f}%"),
            )
        picture, table = folder / "cardinality.png", folder / "study.csv"
        if world.first:
            console.print()
            print_table(
                tables.of_study(f"{images.name}, {settings.recipe.epochs} epochs, {seeds} seeds", done)
            )
            console.print(f"\n{verdict(done, len(images.test))}")
            console.print(
                "The paper's errors are top-1 on ImageNet at 50 layers: of other networks on other images, "
                "shown for their order alone."
            )
            with keeping(f"{picture}: not written", f"{table} is, and the same command draws it again"):
                plots.cardinality(picture, done, images.name)
            console.print(f"\nwritten: {shown(picture)}, {shown(table)}", soft_wrap=True)


def _settings(
    preset: Preset,
    data: Cifar | None,
    path: Path | None,
    epochs: int | None,
    micro_batch: int | None,
    precision: Precision | None,
) -> Settings:
    """The preset's, with what was said in their place."""
    source = preset.settings.source
    if data and source.name not in list(Cifar):
        raise UserError(
            f"--data {data.value}: the preset of {source.name} has no other; --preset cifar has two"
        )
    source = replace(
        source, name=data.value if data else source.name, path=str(path.absolute()) if path else None
    )
    recipe = preset.settings.recipe
    recipe = recipe.lasting(epochs) if epochs else recipe
    said = {"micro_batch": micro_batch, "precision": precision and precision.value}
    recipe = replace(recipe, **{key: value for key, value in said.items() if value is not None})
    return replace(preset.settings, source=source, recipe=recipe)
