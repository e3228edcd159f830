"""The study of cardinality against width at equal complexity: the comparison of the paper, trained here."""

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
    """The networks and trainings to compare.

    Attributes:
        about: description in one line.
        settings: settings of each training, except for cardinality, width and seed.
        pairs: (C, d) of each network: cardinality and channels per group.
    """

    about: str
    settings: Settings
    pairs: tuple[tuple[int, int], ...]


PRESETS = {
    "small": Preset(
        "two stages of half the paper's width on scikit-learn's 1,797 digits, in minutes on a CPU",
        Settings(
            Source("digits"),
            Network((1, 1, 0, 0), stem_width=32),
            Recipe(epochs=30, batch_size=64, micro_batch=64, learning_rate=3e-3, warmup_epochs=2.0),
        ),
        # Half the widths of the paper in blocks with half the channels: same ratios, a quarter of the FLOPs.
        tuple((c, d // 2) for c, d in complexity.EQUAL_COMPLEXITY.items()),
    ),
    "cifar": Preset(
        "ResNeXt-29 on CIFAR-10 or CIFAR-100 with the paper's recipe of 300 epochs, which needs a GPU",
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
    """Train each network with each seed.

    Finished trainings in ``folder`` aren't repeated, and unfinished ones continue.

    Args:
        preset: networks and trainings to compare.
        data: the data set of the preset's settings.
        seeds: number of trainings of each network, with seeds 0, 1, ...
        folder: folder for the runs and ``study.csv``.
        world: processes that train together.
        console: console that the trainings print to.
        progress: progress bars for the study and the current training.
        options: options of each training. Defaults to ``DEFAULT_OPTIONS``.
        finished: called after each training with its name and its error in percent. Defaults to doing
            nothing.

    Returns:
        The networks with the error of each seed.

    Raises:
        UserError: as `resnext.loop.train`, or a run in ``folder`` has other settings.
        Interrupted: as `resnext.loop.train`. Finished trainings are kept.
    """
    compared = [_compared(preset, data, c, d) for c, d in preset.pairs]
    whole = progress.add_task("", total=seeds * len(compared), status="")
    # Seeds in the outer loop, so that a study that was stopped has the same seeds for all networks.
    for seed in range(seeds):
        for pair in compared:
            name = f"{pair.cardinality}x{pair.width}d-seed{seed}"
            progress.update(whole, description=f"study: {name}")
            settings = _settings(preset, pair, seed)
            try:
                pair.errors[seed] = _error(settings, data, folder / name, world, console, progress, options)
            except Interrupted as interrupted:
                kept = f"{shown(folder)} has everything up to {name}; run the same command again to continue"
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
    """Return the top-1 error of a training in percent, from its checkpoint if it is finished."""
    path = folder / checkpoint.FILE_NAME
    exists = world.first_does(path.exists)
    saved = world.each_does(lambda: checkpoint.load(path)) if exists else None
    if saved and (differs := difference(saved.settings, settings)):
        raise UserError(f"{path} belongs to a study with other settings: {differs}; choose another --name")
    rows = saved.training["rows"] if saved else []
    if len(rows) < settings.recipe.epochs:
        result = train(
            settings, data, folder, world, console, options=options, resumed=saved, progress=progress
        )
        return 100 - result.accuracy
    return 100 - rows[-1]["test_accuracy"]


def _write(path: Path, compared: Sequence[Compared]) -> None:
    """Write ``study.csv``, with a row for each training."""
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
