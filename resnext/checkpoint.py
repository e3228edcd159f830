"""Trained networks on disk: weights, and the configuration that rebuilds the network around them."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resnext.errors import UserError
from resnext.model import ResNeXt

FORMAT = "resnext checkpoint 1"
FILE_NAME = "checkpoint.pt"


@dataclass(frozen=True)
class Checkpoint:
    """A network as it was saved.

    Attributes:
        model: in evaluation mode.
        network: the arguments of :class:`resnext.ResNeXt` that built it.
        epochs: epochs it was trained for; a fraction where training was interrupted.
    """

    model: ResNeXt
    network: dict[str, Any]
    epochs: float


def save(path: Path, model: ResNeXt, network: dict[str, Any], epochs: float) -> None:
    """Writes a checkpoint so that ``path`` holds the old one or the new one, whenever the process dies."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(
            {"format": FORMAT, "network": network, "epochs": epochs, "weights": model.state_dict()}, file
        )
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load(path: Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Reads the checkpoint at ``path``, a file or the folder of a run. Runs no code that the file may hold.

    Raises:
        UserError: missing, cut short, damaged, or of another program.
    """
    path = path / FILE_NAME if path.is_dir() else path
    train_first = "train one with `resnext train`, or give the path of another"
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; {train_first}")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load does not look at the checksums
                raise zipfile.BadZipFile
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception:  # torch.load raises half a dozen types for as many kinds of damage
        raise UserError(f"{path}: cut short, damaged, or no checkpoint at all; {train_first}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of this program; {train_first}")
    try:
        model = ResNeXt(**content["network"])
        model.load_state_dict(content["weights"])
        return Checkpoint(model.to(device).eval(), content["network"], content["epochs"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
        raise UserError(f"{path}: its weights and its network do not fit together; {train_first}") from None
