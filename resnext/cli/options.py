"""What several commands take, and how they print."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import gconv
from resnext.checkpoint import Checkpoint
from resnext.config import Source
from resnext.data import DATA_SETS, Data, load_data
from resnext.errors import UserError
from resnext.world import local_rank

# No markup, no codes of emoji: a name may hold brackets and colons.
console = Console(highlight=False, markup=False, emoji=False)

RUNS = Path("runs")
DEMO = RUNS / "demo"

Backend = StrEnum("Backend", ["auto", "triton", "aten", "reference"])
DataName = StrEnum("DataName", list(DATA_SETS))

DeviceOption = Annotated[
    str, typer.Option(help="Where to run: auto (a GPU where there is one), cpu, cuda, cuda:1, mps.")
]
BackendOption = Annotated[
    Backend,
    typer.Option(
        help="Who runs the grouped convolutions: the fastest, Triton kernels, PyTorch, or readable PyTorch."
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(min=0, help="Processes that decode images. By default one a core, 8 at most, for files."),
]
SkipCorruptOption = Annotated[
    bool, typer.Option("--skip-corrupt", help="Count images that cannot be read, and go on without them.")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A checkpoint, or the folder of a run.")]


def device_of(name: str) -> torch.device:
    """The device of that name, "auto" for an accelerator where there is one; of GPUs, this process's own."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        name = accelerator.type if accelerator else "cpu"
    name = f"cuda:{local_rank()}" if name == "cuda" else name
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = re.split(r"\n|\. ", str(error))[0]
        raise UserError(f"--device {name}: {reason}; try --device auto") from None
    return device


@contextmanager
def backend_of(name: str, device: torch.device) -> Iterator[None]:
    """``gconv.backend(name)``, once it is known to run on ``device``: shown on a batch of no images.

    Of the convolutions that are cuDNN's, each takes the fastest algorithm: their shapes stay the same.
    """
    images, weight = torch.zeros(0, 2, 3, 3, device=device), torch.zeros(2, 1, 3, 3, device=device)
    try:
        gconv.group_conv2d(images, weight, groups=2, backend=name)
    except RuntimeError as error:
        raise UserError(f"--backend {name}: {str(error).partition(': ')[2]}") from None
    with gconv.backend(name), torch.backends.cudnn.flags(enabled=True, benchmark=True):
        yield


def data_of(source: Source) -> Data:
    """The data set that ``source`` names."""
    return load_data(source.name, Path(source.path) if source.path else None, source.image_size)


def data_of_run(saved: Checkpoint, path: Path | None) -> Data:
    """What a run was trained on, at ``path`` if it has moved.

    Raises:
        UserError: it is not there, or has other classes.
    """
    source = saved.settings.source
    kept = Path(source.path) if source.path else None
    try:
        data = load_data(source.name, path or kept, source.image_size)
    except UserError as error:
        if path is None and kept is not None and not kept.exists():
            raise UserError(
                f"{kept}: the images of this run are no longer there; --path says where"
            ) from None
        raise error
    if data.classes != saved.classes:
        raise UserError(f"{path or kept}: other classes than the network's {len(saved.classes)}")
    return data


def print_table(table: Table) -> None:
    """On a narrow terminal, and in a file, numbers and paths go on in the next line rather than be cut."""
    for column in table.columns:
        column.overflow = "fold"
    console.print(table)
