"""``resnext train``."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from resnext import checkpoint
from resnext.checkpoint import Checkpoint
from resnext.cli.options import (
    DEMO,
    RUNS,
    Backend,
    BackendOption,
    DataName,
    DeviceOption,
    SkipCorruptOption,
    WorkersOption,
    backend_of,
    console,
    data_of,
    device_of,
)
from resnext.cli.settings import choices_of, default_of, settings_of
from resnext.config import OPTIMIZERS, PRECISIONS, SCHEDULES, Options, Settings
from resnext.data import Data, ImageFiles
from resnext.errors import UserError
from resnext.interruption import Interrupted
from resnext.model import VARIANTS
from resnext.names import quoted, shown
from resnext.train import train as run_training
from resnext.world import join, local_size, rank

Optimizer = StrEnum("Optimizer", list(OPTIMIZERS))
Schedule = StrEnum("Schedule", list(SCHEDULES))
Precision = StrEnum("Precision", list(PRECISIONS))
Variant = StrEnum("Variant", list(VARIANTS))

RUN, DATA, NETWORK, RECIPE, SCALE = "The run", "Data", "Network", "Recipe", "Scale and speed"
MOST_WORKERS = 8


def train(
    context: typer.Context,
    path: Annotated[
        Path | None,
        typer.Argument(help="Where the images of cifar10, cifar100 and folder lie."),
    ] = None,
    data: Annotated[
        DataName,
        typer.Option(
            help="What to train on. **mnist5k**, **digits**: 5,000 and 1,797 digits that come along. "
            "**cifar10**, **cifar100**: PATH is the published archive, python or binary, or its folder. "
            "**folder**: PATH has `train/CLASS/*.jpg` and `val/CLASS/*.jpg`.",
            rich_help_panel=DATA,
        ),
    ] = DataName.mnist5k,
    image_size: Annotated[
        int | None,
        typer.Option(min=8, max=2**12, help="Pixels of a side, for folder. [224]", rich_help_panel=DATA),
    ] = None,
    skip_corrupt: SkipCorruptOption = False,
    workers: WorkersOption = None,
    name: Annotated[
        str, typer.Option(help="The run's name: a folder of it is made in --out.", rich_help_panel=RUN)
    ] = DEMO.name,
    out: Annotated[Path, typer.Option(help="Where runs are kept.", rich_help_panel=RUN)] = RUNS,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on where the run of this name stopped; start it if there is none.",
            rich_help_panel=RUN,
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run of this name.", rich_help_panel=RUN)
    ] = False,
    checkpoint_steps: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Also write a checkpoint after as many updates. [1,000 for folder, else after epochs alone]",
            rich_help_panel=RUN,
        ),
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write TensorBoard's event files too.", rich_help_panel=RUN)
    ] = False,
    network: Annotated[
        Variant | None,
        typer.Option(help="A named network. The next four change it.", rich_help_panel=NETWORK),
    ] = None,
    repeats: Annotated[
        str | None,
        typer.Option(
            help="Blocks of each of the four stages. " + default_of("network", "repeats"),
            rich_help_panel=NETWORK,
        ),
    ] = None,
    cardinality: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=4096,
            help="Groups of each 3x3. " + default_of("network", "cardinality"),
            rich_help_panel=NETWORK,
        ),
    ] = None,
    base_width: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=4096,
            help="Channels of a group in the first stage. " + default_of("network", "base_width"),
            rich_help_panel=NETWORK,
        ),
    ] = None,
    stem_width: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=4096,
            help="Channels of the stem. " + default_of("network", "stem_width"),
            rich_help_panel=NETWORK,
        ),
    ] = None,
    fused: Annotated[
        bool | None,
        typer.Option(
            "--fused",
            help="Batch norms inside the 3x3's kernels: the same network, fewer passes over memory.",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Passes over the training images. " + default_of("recipe", "epochs"),
            rich_help_panel=RECIPE,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Images in one update, of all processes together; those left over sit out, others each "
            "epoch. " + default_of("recipe", "batch_size"),
            rich_help_panel=RECIPE,
        ),
    ] = None,
    optimizer: Annotated[
        Optimizer | None,
        typer.Option(
            help="sgd is Nesterov's, momentum 0.9. " + default_of("recipe", "optimizer"),
            rich_help_panel=RECIPE,
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            min=0, help="The highest rate. " + default_of("recipe", "learning_rate"), rich_help_panel=RECIPE
        ),
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Of all weights. " + default_of("recipe", "weight_decay"),
            rich_help_panel=RECIPE,
        ),
    ] = None,
    schedule: Annotated[
        Schedule | None,
        typer.Option(
            help="How the rate falls: cosine, or step, a tenth at each step. "
            + default_of("recipe", "schedule"),
            rich_help_panel=RECIPE,
        ),
    ] = None,
    warmup_epochs: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Over which the rate rises. " + default_of("recipe", "warmup_epochs"),
            rich_help_panel=RECIPE,
        ),
    ] = None,
    label_smoothing: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Share of a target for all classes, such as 0.1.", rich_help_panel=RECIPE
        ),
    ] = None,
    mixup: Annotated[
        float | None,
        typer.Option(
            min=0, help="Mix images by twos: alpha, such as 0.2. [0: don't]", rich_help_panel=RECIPE
        ),
    ] = None,
    cutmix: Annotated[
        float | None,
        typer.Option(
            min=0, help="Paste parts of others: alpha, such as 1. [0: don't]", rich_help_panel=RECIPE
        ),
    ] = None,
    ema: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Test and keep a moving average of the weights: its decay, such as 0.9999. [0: don't]",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**31, help="Of weights, order and augmentation.", rich_help_panel=RECIPE),
    ] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images of one forward pass, which batch norm sees. A batch of more is several passes, "
            "gradients added, or several processes'. " + default_of("recipe", "micro_batch"),
            rich_help_panel=SCALE,
        ),
    ] = None,
    sync_batch_norm: Annotated[
        bool | None,
        typer.Option(
            "--sync-batch-norm", help="Batch norm sees what all GPUs have at the time.", rich_help_panel=SCALE
        ),
    ] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(help="Of autocast; float16 with a scaled loss.", rich_help_panel=SCALE),
    ] = None,
    channels_last: Annotated[
        bool, typer.Option(help="The layout of activations and weights.", rich_help_panel=SCALE)
    ] = True,
    compile: Annotated[
        bool, typer.Option("--compile", help="With torch.compile.", rich_help_panel=SCALE)
    ] = False,
    device: DeviceOption = "auto",
    backend: BackendOption = Backend.auto,
) -> None:
    """Train a ResNeXt, on one device or many, and test it on images that it has not seen.

    Without options: on 4,000 real handwritten digits that come along, in two or three minutes on two cores.
    What is not said, `--data` decides: the paper's recipe for ResNeXt-29 on cifar and for ResNeXt-50 on
    folder, a small network for digits.

    Leaves in OUT/NAME: `checkpoint.pt` (and `previous.pt`, the one before), `config.json`, `summary.csv` (a
    row an epoch), `steps.csv`, `curves.png`, `confusion.png`, `mistakes.png` and `samples/` (images to try
    `predict` on).

    On N GPUs, `torchrun --nproc-per-node=N -m resnext train ...` trains the network that one GPU does, where
    a GPU's share of the batch is whole micro-batches. Ctrl-C and SIGTERM end the step, save and stop;
    `--resume` goes on from there, or after a crash from the last checkpoint, as if nothing had been.
    """
    choices = choices_of(context)
    where = device_of(device)
    with backend_of(backend, where), told_when_interrupted(), join(where) as world:
        folder = _folder(out, name)
        goes_on = world.first_does(lambda: _goes_on(folder, resume, overwrite))

        def read() -> tuple[Checkpoint | None, Settings, Data]:
            saved = checkpoint.load(folder) if goes_on else None
            settings = settings_of(choices, saved)
            return saved, settings, data_of(settings.source)

        saved, settings, images = world.each_does(read)
        steps = (
            (1000 if settings.source.name == "folder" else 0)
            if checkpoint_steps is None
            else checkpoint_steps
        )
        options = Options(
            workers=default_workers(images) if workers is None else workers,
            skip_corrupt=skip_corrupt,
            channels_last=channels_last,
            compile=compile,
            checkpoint_steps=steps,
            tensorboard=tensorboard,
        )
        printer = console if world.first else Console(quiet=True)
        start = time.perf_counter()
        result = run_training(
            settings,
            images,
            folder,
            world,
            printer,
            options=options,
            resumed=saved,
            overwrite=overwrite,
        )
        minutes, seconds = divmod(round(time.perf_counter() - start), 60)
        wrong = int((~result.correct).sum())
        printer.print(
            f"\n{result.accuracy:.2f}% of {len(result.correct):,} held-out images right, "
            f"{wrong:,} wrong, after {minutes} min {seconds} s"
        )
        _print_written(printer, folder)


@contextmanager
def told_when_interrupted() -> Iterator[None]:
    """Says what is kept where a training was interrupted, and ends with the shell's exit code for it."""
    try:
        yield
    except Interrupted as interrupted:
        if rank() == 0:
            console.print(f"interrupted: {interrupted}", soft_wrap=True)
        raise typer.Exit(128 + interrupted.number) from None


def default_workers(data: Data) -> int:
    """Processes that decode images: none where they are in memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, max(1, cores // local_size())) if isinstance(data.train, ImageFiles) else 0


def _folder(out: Path, name: str) -> Path:
    if Path(name).name != name or name in ("", ".."):
        raise UserError(f"--name {name}: not the name of a folder; where the folder is made, --out says")
    return out / name


def _goes_on(folder: Path, resume: bool, overwrite: bool) -> bool:
    """Whether there is something to go on from; else ``folder`` is free, or a run that may be overwritten."""
    if resume and overwrite:
        raise UserError("--resume goes on with a run, --overwrite removes it: choose one")
    if not folder.exists():
        return False
    is_run = (folder / "config.json").is_file()
    if resume:
        if not is_run:
            raise UserError(f"{folder}: not a run, so there is nothing to resume; choose another --name")
        return any((folder / name).exists() for name in (checkpoint.FILE_NAME, checkpoint.PREVIOUS))
    if not overwrite:
        raise UserError(
            f"{folder}: exists already; go on with --resume, choose another --name, or pass --overwrite"
        )
    if not is_run:
        raise UserError(f"{folder}: not a run, so it is not overwritten; choose another --name")
    return False


def _print_written(printer: Console, folder: Path) -> None:
    printer.print(f"written to {shown(folder)}:", soft_wrap=True)
    for name, what in (
        ("curves.png", "training curves"),
        ("confusion.png", "which classes were taken for which"),
        ("mistakes.png", "the held-out images that it got wrong, and what it thought"),
        ("summary.csv", "the table above; steps.csv: loss and rate of each step"),
        ("checkpoint.pt", f"the network: resnext evaluate {quoted(folder)}"),
        ("samples/", f"images to try: resnext predict -c {quoted(folder)} {quoted(folder / 'samples')}"),
    ):
        printer.print(f"  {name:<14} {what}", soft_wrap=True)
