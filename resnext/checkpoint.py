"""Runs on disk: the network, and all that training needs to go on as if it had never stopped."""

from __future__ import annotations

import os
import shutil
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnext.config import Settings, build
from resnext.data import ImageFormat
from resnext.errors import UserError
from resnext.model import ResNeXt
from resnext.names import quoted, shown

FORMAT = "resnext checkpoint 2"
FILE_NAME = "checkpoint.pt"
PREVIOUS = "previous.pt"
PART = "checkpoint.part"  # what is being written


@dataclass(frozen=True)
class Checkpoint:
    """A run as it was kept.

    Attributes:
        path: of the file.
        settings: of the run.
        classes: a name for each output of the network.
        format: what it takes.
        weights: its state dict; the moving average's, where there is one.
        epochs: that it was trained for; a fraction inside an epoch.
        training: what :class:`resnext.training.Training` goes on from.
    """

    path: Path
    settings: Settings
    classes: tuple[str, ...]
    format: ImageFormat
    weights: dict[str, Tensor]
    epochs: float
    training: dict[str, Any]

    def network(self, device: torch.device | str = "cpu") -> ResNeXt:
        """The network, in evaluation mode."""
        model = build(self.settings.network, len(self.classes), self.format.channels)
        model.load_state_dict(self.weights)
        return model.to(device).eval()


def save(
    path: Path,
    settings: Settings,
    classes: tuple[str, ...],
    form: ImageFormat,
    weights: dict[str, Tensor],
    epochs: float,
    training: dict[str, Any],
) -> None:
    """Writes a checkpoint. Whenever the process dies, ``path`` holds the old one or the new one, whole.

    The one that it replaces stays beside it, as ``PREVIOUS``.

    Raises:
        OSError: it cannot be written, with ``path`` in it; the old one is still there.
    """
    content = {
        "format": FORMAT,
        "settings": settings.to_dict(),
        "classes": list(classes),
        "images": asdict(form),
        "weights": weights,
        "epochs": epochs,
        "training": training,
    }
    part = path.with_name(PART)
    try:
        with part.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            _keep(path)
        part.replace(path)
        _sync(path.parent)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        cause = _system_error(error)
        if cause is None:
            raise
        raise OSError(cause.errno, cause.strerror or str(cause), str(path)) from None


def _system_error(error: BaseException | None) -> OSError | None:
    """What the system said: torch.save goes on writing after a failure, and raises about that."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _keep(path: Path) -> None:
    """Gives the file a second name, of which one of the two is there at any time."""
    other = path.with_name(f"{PREVIOUS}.part")
    other.unlink(missing_ok=True)
    try:
        os.link(path, other)
    except OSError:  # a file system without links
        shutil.copyfile(path, other)
    other.replace(path.with_name(PREVIOUS))


def _sync(folder: Path) -> None:
    """Makes names in ``folder`` last, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load(path: Path) -> Checkpoint:
    """Reads the checkpoint at ``path``, a file or the folder of a run. Runs no code that the file may hold.

    Raises:
        UserError: missing, cut short, damaged, or of another program. Where the one before it is whole, that
            is offered.
    """
    path = path / FILE_NAME if path.is_dir() else path
    try:
        return _read(path)
    except UserError as error:
        raise UserError(f"{error}; {_instead(path)}") from None


def _instead(path: Path) -> str:
    """What to do about a checkpoint that cannot be read."""
    previous = path.with_name(PREVIOUS)
    if previous != path:
        with suppress(UserError):
            epochs = _read(previous).epochs
            back = f"mv {quoted(previous)} {quoted(path)}"
            return f"the one before it is whole ({epochs:.3g} epochs): `{back}` goes back to it"
    return "train one with `resnext train`, or give the path of another"


def _read(path: Path) -> Checkpoint:
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load does not look at the checksums
                raise zipfile.BadZipFile
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch.load raises half a dozen types for as many kinds of damage
        raise UserError(f"{path}: cut short, damaged, or no checkpoint at all") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of this program")
    try:
        images = {k: tuple(v) if isinstance(v, list) else v for k, v in content["images"].items()}
        read = Checkpoint(
            path,
            Settings.from_dict(content["settings"]),
            tuple(map(shown, content["classes"])),
            ImageFormat(**images),
            content["weights"],
            content["epochs"],
            content["training"],
        )
        with torch.device("meta"):
            build(read.settings.network, len(read.classes), read.format.channels).load_state_dict(
                read.weights, assign=True
            )
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, UserError):
        raise UserError(f"{path}: its weights and its network do not fit together") from None
    return read
