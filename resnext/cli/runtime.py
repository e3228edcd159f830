"""The device, backend, data and console of a command."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import gconv
from resnext.checkpoint import Checkpoint
from resnext.config import Source
from resnext.data import Data, load_data
from resnext.errors import UserError
from resnext.world import local_rank

# No markup and no emoji codes, because names may contain brackets and colons.
console = Console(highlight=False, markup=False, emoji=False)


def say(text: str) -> None:
    """Print a line without line breaks from rich, so that paths stay in one piece."""
    console.print(text, soft_wrap=True)


def print_table(table: Table) -> None:
    """Print a table. If it is too wide, cells continue in the next line instead of being cut off."""
    for column in table.columns:
        column.overflow = "fold"
    console.print(table)


def device_of(name: str) -> torch.device:
    """Return the device called ``name``.

    "auto" is the accelerator if there is one, otherwise the CPU. "cuda" is the GPU of this process.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        name = accelerator.type if accelerator else "cpu"
    try:
        device = torch.device(f"cuda:{local_rank()}" if name == "cuda" else name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = re.split(r"\n|\. ", str(error))[0]
        raise UserError(f"--device {name}: {reason}; try --device auto") from None
    return device


@contextmanager
def backend_of(name: str, device: torch.device) -> Iterator[None]:
    """Run grouped convolutions inside on the backend ``name``.

    Checks first that the backend works, by a call with an empty batch. Since shapes stay the same, cuDNN
    benchmarks its algorithms and picks the fastest.

    Raises:
        UserError: the backend doesn't run on ``device``.
    """
    images, weight = torch.zeros(0, 2, 3, 3, device=device), torch.zeros(2, 1, 3, 3, device=device)
    try:
        gconv.group_conv2d(images, weight, groups=2, backend=name)
    except RuntimeError as error:
        raise UserError(f"--backend {name}: {str(error).partition(': ')[2]}") from None
    with gconv.backend(name), torch.backends.cudnn.flags(enabled=True, benchmark=True):
        yield


def data_of(source: Source) -> Data:
    """Load the data set of ``source``."""
    return load_data(source.name, Path(source.path) if source.path else None, source.image_size)


def data_of_run(saved: Checkpoint, path: Path | None) -> Data:
    """Load the data that a run was trained on, from ``path`` if given.

    Raises:
        UserError: the data isn't there or has other classes.
    """
    source = saved.settings.source
    before = Path(source.path) if source.path else None
    try:
        data = load_data(source.name, path or before, source.image_size)
    except UserError as error:
        if path is None and before is not None and not before.exists():
            raise UserError(
                f"{before}: the images of this run are no longer there; pass their new location with --path"
            ) from None
        raise error
    if data.classes != saved.classes:
        raise UserError(
            f"{path or before}: its classes aren't the {len(saved.classes)} that the network was trained on; "
            "pass the images of this run with --path"
        )
    return data
