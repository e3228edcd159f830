"""Checkpoints: the network, and everything that a training needs to continue as if it had never stopped."""

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
    """A run as it is saved.

    Attributes:
        path: the file.
        settings: of the run.
        classes: a name for each output of the network.
        format: the images that the network takes.
        weights: the state dict of the network, or of its moving average if there is one.
        epochs: number of epochs that it was trained for; a fraction inside an epoch.
        training: what :class:`resnext.run.Run` continues from.
    """

    path: Path
    settings: Settings
    classes: tuple[str, ...]
    format: ImageFormat
    weights: dict[str, Tensor]
    epochs: float
    training: dict[str, Any]

    def network(self, device: torch.device | str = "cpu") -> ResNeXt:
        """Return the network on ``device``, in evaluation mode."""
        model = build(self.settings.network, len(self.classes), self.format.channels)
        model.load_state_dict(self.weights)
        return model.to(device).eval()


def save(checkpoint: Checkpoint) -> None:
    """Write a checkpoint. Whenever the process dies, its path holds the old one or the new one, whole.

    The one that it replaces stays next to it, as ``PREVIOUS``.

    Raises:
        OSError: it cannot be written, with the path in the error; the old one is still there.
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
    """Return what the system said: torch.save goes on writing after a failure, and raises about that."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def load(path: Path) -> Checkpoint:
    """Read the checkpoint at ``path``, a file or the folder of a run, without running code from it.

    Raises:
        UserError: it is missing, cut short, damaged, or of another program. If the one before it is whole,
            the error says how to go back to it.
    """
    path = path / FILE_NAME if path.is_dir() else path
    try:
        return _read(path)
    except UserError as error:
        raise UserError(f"{error}; {_instead(path)}") from None


def _instead(path: Path) -> str:
    """Return what to do about a checkpoint that cannot be read."""
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
        raise UserError(f"{path}: its weights and its network do not fit together") from None
    return read
