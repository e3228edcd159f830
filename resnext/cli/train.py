"""``resnext train``."""

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
    ("confusion.png", "which classes were mistaken for which"),
    ("mistakes.png", "the held-out images that it got wrong, with its guesses"),
    ("summary.csv", "the table above; steps.csv: loss and learning rate of each step"),
    ("checkpoint.pt", "the network: resnext evaluate {run}"),
    ("samples/", "images to try: resnext predict -c {run} {samples}"),
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
    text = f"A named network, which the options below change: {', '.join(VARIANTS)}."
    network.add_argument("--network", help=text, **one_of(*VARIANTS) | {"metavar": "NAME"})
    add_fields(network, Network, defaults={data: each.network for data, each in settings.items()})
    recipe = parser.add_argument_group("recipe")
    add_fields(recipe, Recipe, defaults={data: each.recipe for data, each in settings.items()})
    running = parser.add_argument_group("how it runs")
    add_machine(running)
    add_fields(running, Options, "channels_last", "compile", defaults=options)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--name", default=DEMO.name, help=f"Name of the run, a folder in --out. [default: {DEMO.name}]"
    )
    output.add_argument("--out", type=Path, default=RUNS, help=f"Folder of all runs. [default: {RUNS}]")
    output.add_argument(
        "--resume",
        action="store_true",
        help="Continue the run of this name where it stopped, or start it if there is none.",
    )
    output.add_argument("--overwrite", action="store_true", help="Replace a run of this name.")
    add_fields(output, Options, "checkpoint_steps", "tensorboard", defaults=options)


def train(arguments: argparse.Namespace) -> None:
    """Train a ResNeXt, on one device or many, and test it on images that it has not seen.

    Without options it trains on 4,000 real handwritten digits that come with installed packages, in two to
    three minutes on two cores. --data chooses other images and with them the defaults: the paper's recipe for
    ResNeXt-29 on cifar10 and cifar100 and for ResNeXt-50 on folder, a small network for digits.

    It writes to OUT/NAME: checkpoint.pt (and previous.pt, the one before), config.json, summary.csv (a row
    per epoch), steps.csv, curves.png, confusion.png, mistakes.png and samples/ (images to try `predict` on).

    On N GPUs, `torchrun --nproc-per-node=N -m resnext train ...` trains the network that one GPU trains,
    provided that each GPU's share of the batch is a whole number of micro-batches. Ctrl-C and SIGTERM end the
    step, save and stop. --resume continues from there, or after a crash from the last checkpoint, as if
    nothing had happened.
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
    """Load the checkpoint to resume, if there is one, settings and data: before anything is written."""
    resumes = world.first_does(lambda: _resumes(folder, arguments.resume, arguments.overwrite))

    def read() -> tuple[Checkpoint | None, Settings, Data]:
        saved = checkpoint.load(folder) if resumes else None
        base = saved.settings if saved else defaults(given(arguments, Source).get("name", Source().name))
        settings = settings_of(arguments, base, saved)
        return saved, settings, data_of(settings.source)

    return world.each_does(read)


def _folder(out: Path, name: str) -> Path:
    if Path(name).name != name or name in ("", ".."):
        raise UserError(f"--name {name}: not the name of a folder; --out says where the folder is made")
    return out / name


def _resumes(folder: Path, resume: bool, overwrite: bool) -> bool:
    """Return whether there is a checkpoint to continue from; otherwise the run may use ``folder``.

    Raises:
        UserError: it may not.
    """
    if resume and overwrite:
        raise UserError("--resume continues a run, --overwrite removes it: choose one")
    if not folder.exists():
        return False
    is_run = (folder / "config.json").is_file()
    if resume:
        if not is_run:
            raise UserError(f"{folder}: not a run, so there is nothing to resume; choose another --name")
        return any((folder / name).exists() for name in (checkpoint.FILE_NAME, checkpoint.PREVIOUS))
    if not overwrite:
        raise UserError(
            f"{folder}: already exists; continue it with --resume, choose another --name, or pass --overwrite"
        )
    if not is_run:
        raise UserError(f"{folder}: not a run, so it is not overwritten; choose another --name")
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
