"""The command ``resnext train``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console

from resnext import checkpoint, loop
from resnext.checkpoint import Checkpoint
from resnext.cli.options import (
    DEMO,
    RUNS,
    Parser,
    add_fields,
    add_machine,
    given,
    one_of,
    options_of,
    settings_of,
)
from resnext.cli.runtime import backend_of, console, data_of, device_of
from resnext.config import DATA_SETS, DEFAULT_OPTIONS, Network, Options, Recipe, Settings, Source, defaults
from resnext.data import Data
from resnext.errors import UserError
from resnext.evaluation import Evaluation
from resnext.model import VARIANTS
from resnext.names import quoted, shown
from resnext.world import World, join

RESULTS = (
    ("curves.png", "training curves"),
    ("confusion.png", "confusion matrix: true and predicted classes"),
    ("mistakes.png", "misclassified held-out images, with the guesses"),
    ("summary.csv", "the table above; steps.csv has loss and learning rate of each step"),
    ("checkpoint.pt", "the trained network; try: resnext evaluate {run}"),
    ("samples/", "some held-out images; try: resnext predict -c {run} {samples}"),
)


def add_arguments(parser: Parser) -> None:
    """Add the options of ``train``, in groups."""
    parser.usage = "%(prog)s [PATH] [options]"
    settings = {data: defaults(data) for data in DATA_SETS}
    options = {"": DEFAULT_OPTIONS}
    data = parser.add_argument_group("data")
    add_fields(data, Source, defaults={"": Source()})
    add_fields(data, Options, "workers", "skip_corrupt", defaults=options)
    network = parser.add_argument_group("network")
    text = f"named network, which the options below can change: {', '.join(VARIANTS)}"
    network.add_argument("--network", help=text, **one_of(*VARIANTS) | {"metavar": "NAME"})
    add_fields(network, Network, defaults={data: each.network for data, each in settings.items()})
    recipe = parser.add_argument_group("recipe")
    add_fields(recipe, Recipe, defaults={data: each.recipe for data, each in settings.items()})
    running = parser.add_argument_group("execution")
    add_machine(running)
    add_fields(running, Options, "channels_last", "compile", defaults=options)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--name", default=DEMO.name, help=f"name of the run, a folder in --out (default: {DEMO.name})"
    )
    output.add_argument("--out", type=Path, default=RUNS, help=f"folder of all runs (default: {RUNS})")
    output.add_argument(
        "--resume",
        action="store_true",
        help="continue the run of this name where it stopped, or start it if there is none",
    )
    output.add_argument("--overwrite", action="store_true", help="replace an existing run of this name")
    add_fields(output, Options, "checkpoint_steps", "tensorboard", defaults=options)


def train(arguments: argparse.Namespace) -> None:
    """Train a ResNeXt on one or more devices, and test it on held-out images after each epoch.

    By default, it trains a small network on 4,000 handwritten digits that come with installed packages, in
    two to three minutes on two cores. --data selects other images and with them other defaults: ResNeXt-29
    and the paper's CIFAR recipe for cifar10 and cifar100, ResNeXt-50 and the paper's ImageNet recipe for
    folder.

    Examples:
      resnext train
      resnext train --data cifar10 cifar-10-python.tar.gz --name cifar --precision bfloat16
      resnext train --data folder photos --name photos
      resnext train --name photos --resume
      torchrun --nproc-per-node=4 -m resnext train --data folder photos --name photos

    Results are written to OUT/NAME: checkpoint.pt (and previous.pt, the checkpoint before it), config.json,
    summary.csv (a row per epoch), steps.csv, curves.png, confusion.png, mistakes.png and samples/ (images to
    try `resnext predict` on).

    Ctrl-C and SIGTERM finish the step, save a checkpoint and stop. --resume continues from the last
    checkpoint, also after a crash, as if the training had never stopped. Several GPUs train the same network
    as one if the share of each in a batch is a multiple of --micro-batch.
    """
    device = device_of(arguments.device)
    with backend_of(arguments.backend, device), join(device) as world:
        folder = _folder(arguments.out, arguments.name)
        saved, settings, data = _prepare(arguments, folder, world)
        printer = console if world.first else Console(quiet=True)
        start = time.perf_counter()
        result = loop.train(
            settings,
            data,
            folder,
            world,
            printer,
            options=options_of(arguments, data),
            resumed=saved,
            overwrite=arguments.overwrite,
        )
        _print_result(printer, result, folder, time.perf_counter() - start)


def _prepare(
    arguments: argparse.Namespace, folder: Path, world: World
) -> tuple[Checkpoint | None, Settings, Data]:
    """Load the checkpoint to resume (if any), the settings and the data, before anything is written."""
    resumes = world.first_does(lambda: _resumes(folder, arguments.resume, arguments.overwrite))

    def read() -> tuple[Checkpoint | None, Settings, Data]:
        saved = checkpoint.load(folder) if resumes else None
        base = saved.settings if saved else defaults(given(arguments, Source).get("name", Source().name))
        settings = settings_of(arguments, base, saved)
        return saved, settings, data_of(settings.source)

    return world.each_does(read)


def _folder(out: Path, name: str) -> Path:
    if Path(name).name != name or name in ("", ".."):
        raise UserError(
            f"--name must be the name of a folder, got '{name}'; use --out to choose where it is created"
        )
    return out / name


def _resumes(folder: Path, resume: bool, overwrite: bool) -> bool:
    """Return whether to continue from a checkpoint in ``folder``. If not, the run can use the folder.

    Raises:
        UserError: neither is possible.
    """
    if resume and overwrite:
        raise UserError("--resume continues a run and --overwrite replaces it: pass only one of them")
    if not folder.exists():
        return False
    is_run = (folder / "config.json").is_file()
    if resume:
        if not is_run:
            raise UserError(f"can't resume {folder}: it isn't a run (no config.json); choose another --name")
        return any((folder / name).exists() for name in (checkpoint.FILE_NAME, checkpoint.PREVIOUS))
    if not overwrite:
        raise UserError(
            f"{folder} already exists: pass --resume to continue it or --overwrite to replace it, "
            "or choose another --name"
        )
    if not is_run:
        raise UserError(f"won't overwrite {folder}: it isn't a run (no config.json); choose another --name")
    return False


def _print_result(printer: Console, result: Evaluation, folder: Path, seconds: float) -> None:
    minutes, seconds = divmod(round(seconds), 60)
    wrong = int((~result.correct).sum())
    printer.print(
        f"\n{result.accuracy:.2f}% of {len(result.correct):,} held-out images right, "
        f"{wrong:,} wrong, after {minutes} min {seconds} s"
    )
    printer.print(f"written to {shown(folder)}:", soft_wrap=True)
    for name, what in RESULTS:
        text = what.format(run=quoted(folder), samples=quoted(folder / "samples"))
        printer.print(f"  {name:<14} {text}", soft_wrap=True)
