"""Cardinality against width at equal complexity: the comparison of the ResNeXt paper, trained for real."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from resnext import checkpoint, complexity, files
from resnext.comparison import Compared
from resnext.config import (
    DEFAULT_OPTIONS,
    Network,
    Options,
    Recipe,
    Settings,
    Source,
    build,
    defaults,
    difference,
)
from resnext.data import Data
from resnext.errors import UserError
from resnext.interruption import Interrupted
from resnext.loop import train
from resnext.names import shown
from resnext.world import World


@dataclass(frozen=True)
class Preset:
    """What is compared.

    Attributes:
        about: in a line.
        settings: of each training, but for the pair and the seed.
        pairs: (C, d), the cardinality and the width of a group.
    """

    about: str
    settings: Settings
    pairs: tuple[tuple[int, int], ...]


PRESETS = {
    "small": Preset(
        "two stages of half the paper's width, on scikit-learn's 1,797 digits: minutes on a CPU",
        Settings(
            Source("digits"),
            Network((1, 1, 0, 0), stem_width=32),
            Recipe(epochs=30, batch_size=64, micro_batch=64, learning_rate=3e-3, warmup_epochs=2.0),
        ),
        # Half of the paper's widths in blocks of half the channels: the same ratios, a quarter of the FLOPs.
        tuple((c, d // 2) for c, d in complexity.EQUAL_COMPLEXITY.items()),
    ),
    "cifar": Preset(
        "ResNeXt-29 on CIFAR-10 or CIFAR-100, 300 epochs each by the paper's recipe: for a GPU",
        defaults("cifar10"),
        tuple(complexity.EQUAL_COMPLEXITY.items()),
    ),
}


def study(
    preset: Preset,
    data: Data,
    seeds: int,
    folder: Path,
    world: World,
    console: Console,
    progress: Progress,
    *,
    options: Options = DEFAULT_OPTIONS,
    finished: Callable[[str, float], None] = lambda name, error: None,
) -> list[Compared]:
    """Train each pair with each seed. Trainings in ``folder`` are not repeated, but continued if unfinished.

    Args:
        preset: what is compared.
        data: the images that its settings name.
        seeds: number of trainings of each pair, with seeds from 0 on.
        folder: gets a run for each training, and ``study.csv``.
        world: the processes that train together.
        console: where the trainings print.
        progress: shows the whole study and the training that runs.
        options: how each training is carried out.
        finished: called after each training with its name and its error.

    Raises:
        UserError, Interrupted: as :func:`resnext.loop.train`; finished trainings are kept.
    """
    compared = [_compared(preset, data, c, d) for c, d in preset.pairs]
    whole = progress.add_task("", total=seeds * len(compared), status="")
    # Seeds outside: a study that was stopped compares all pairs alike.
    for seed in range(seeds):
        for pair in compared:
            name = f"{pair.cardinality}x{pair.width}d-seed{seed}"
            progress.update(whole, description=f"study: {name}")
            settings = _settings(preset, pair, seed)
            try:
                pair.errors[seed] = _error(settings, data, folder / name, world, console, progress, options)
            except Interrupted as interrupted:
                kept = f"{shown(folder)} keeps everything up to {name}; the same command continues from there"
                raise Interrupted(interrupted.number, kept) from None
            world.first_does(lambda: _write(folder / "study.csv", compared))
            finished(name, pair.errors[seed])
            progress.advance(whole)
    progress.remove_task(whole)
    return compared


def _compared(preset: Preset, data: Data, cardinality: int, width: int) -> Compared:
    network = replace(preset.settings.network, cardinality=cardinality, base_width=width)
    with torch.device("meta"):
        model = build(network, len(data.classes), data.format.channels)
    stages = complexity.stages(model, data.format.size)
    return Compared(cardinality, width, sum(s.parameters for s in stages), sum(s.flops for s in stages))


def _settings(preset: Preset, pair: Compared, seed: int) -> Settings:
    network = replace(preset.settings.network, cardinality=pair.cardinality, base_width=pair.width)
    return replace(preset.settings, network=network, recipe=replace(preset.settings.recipe, seed=seed))


def _error(
    settings: Settings,
    data: Data,
    folder: Path,
    world: World,
    console: Console,
    progress: Progress,
    options: Options,
) -> float:
    """Return the top-1 error of one training in percent, from its checkpoint if it is finished."""
    path = folder / checkpoint.FILE_NAME
    exists = world.first_does(path.exists)
    saved = world.each_does(lambda: checkpoint.load(path)) if exists else None
    if saved and (differs := difference(saved.settings, settings)):
        raise UserError(f"{path}: of another study: {differs}; choose another --name")
    rows = saved.training["rows"] if saved else []
    if len(rows) < settings.recipe.epochs:
        result = train(
            settings, data, folder, world, console, options=options, resumed=saved, progress=progress
        )
        return 100 - result.accuracy
    return 100 - rows[-1]["test_accuracy"]


def _write(path: Path, compared: Sequence[Compared]) -> None:
    """Write a row for each training, with all the precision there is."""
    rows = [
        {
            "cardinality": pair.cardinality,
            "width": pair.width,
            "parameters": pair.parameters,
            "flops": pair.flops,
            "seed": seed,
            "error": round(error, 4),
        }
        for pair in compared
        for seed, error in pair.errors.items()
    ]
    files.write_csv(path, rows)
