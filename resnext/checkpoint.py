"""Checkpoints: the network and everything a training needs to continue as if it had never stopped."""

from __future__ import annotations

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
from resnext.files import replacing
from resnext.model import ResNeXt
from resnext.names import quoted, shown

FORMAT = "resnext checkpoint 2"
FILE_NAME = "checkpoint.pt"
PREVIOUS = "previous.pt"


@dataclass(frozen=True)
class Checkpoint:
    """A saved run.

    Attributes:
        path: path of the file.
        settings: settings of the run.
        classes: names of the classes, one for each output of the network.
        format: format of the images that the network accepts.
        weights: state dict of the network, or of its moving average if there is one.
        epochs: number of epochs trained so far, with a fraction in the middle of an epoch.
        training: state that `resnext.run.Run` continues from.
    """

    path: Path
    settings: Settings
    classes: tuple[str, ...]
    format: ImageFormat
    weights: dict[str, Tensor]
    epochs: float
    training: dict[str, Any]

    def network(self, device: torch.device | str = "cpu") -> ResNeXt:
        """Return the network on ``device`` in evaluation mode."""
        model = build(self.settings.network, len(self.classes), self.format.channels)
        model.load_state_dict(self.weights)
        return model.to(device).eval()


def save(checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically.

    If the process dies at any moment, the path has either the old checkpoint or the new one, intact. The
    replaced checkpoint is kept next to it as ``PREVIOUS``.

    Raises:
        OSError: the checkpoint can't be written. The error names the path, and the old checkpoint is
            unchanged.
    """
    content = {
        "format": FORMAT,
        "settings": checkpoint.settings.to_dict(),
        "classes": list(checkpoint.classes),
        "images": asdict(checkpoint.format),
        "weights": checkpoint.weights,
        "epochs": checkpoint.epochs,
        "training": checkpoint.training,
    }
    path = checkpoint.path
    with replacing(path, previous=path.with_name(PREVIOUS)) as part, part.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            raise _system_error(error) or error from None


def _system_error(error: BaseException | None) -> OSError | None:
    """Return the first error of the system: torch.save continues after it and raises a later one."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def load(path: Path) -> Checkpoint:
    """Read a checkpoint without running code from the file.

    Args:
        path: path of a checkpoint, or of the folder of a run.

    Raises:
        UserError: the checkpoint is missing, truncated, damaged or from another program. If the previous
            checkpoint is intact, the error explains how to go back to it.
    """
    path = path / FILE_NAME if path.is_dir() else path
    try:
        return _read(path)
    except UserError as error:
        raise UserError(f"{error}; {_instead(path)}") from None


def _instead(path: Path) -> str:
    """Return advice for a checkpoint that can't be read."""
    previous = path.with_name(PREVIOUS)
    if path.name == FILE_NAME:
        with suppress(UserError):
            epochs = _read(previous).epochs
            back = f"mv {quoted(previous)} {quoted(path)}"
            return f"the previous checkpoint is intact ({epochs:.3g} epochs): to go back to it, run `{back}`"
    return "train a network with `resnext train`, or pass the path of another checkpoint"


def _read(path: Path) -> Checkpoint:
    if not path.is_file():
        raise UserError(f"{path}: no checkpoint found")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load doesn't verify checksums
                raise zipfile.BadZipFile
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch.load raises a different type for each kind of damage
        raise UserError(f"can't read {path}: it is truncated, damaged or not a checkpoint") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"can't read {path}: it isn't a checkpoint of this version of resnext")
    try:
        images = content["images"]
        read = Checkpoint(
            path,
            Settings.from_dict(content["settings"]),
            tuple(map(shown, content["classes"])),
            ImageFormat(**images | {"mean": tuple(images["mean"]), "std": tuple(images["std"])}),
            content["weights"],
            content["epochs"],
            content["training"],
        )
        with torch.device("meta"):
            build(read.settings.network, len(read.classes), read.format.channels).load_state_dict(
                read.weights, assign=True
            )
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, UserError):
        raise UserError(f"can't read {path}: its weights don't fit its network") from None
    return read
