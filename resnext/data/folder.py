"""Images in folders, as ImageNet's are laid out: train/CLASS/*.jpg and val/CLASS/*.jpg."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from resnext.data.images import SUFFIXES, ImageFormat
from resnext.data.sets import Data, ImageFiles
from resnext.errors import UserError

HELD_OUT = ("val", "valid", "validation", "test")
# Of ImageNet.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SIZE = 224


def load_folder(path: Path | None, image_size: int = IMAGE_SIZE) -> Data:
    """The images in ``path``: a folder to train on and one to test on, with a folder for each class in both.

    Args:
        path: has ``train``, and one of ``val``, ``valid``, ``validation``, ``test``.
        image_size: what each image is scaled to.

    Raises:
        UserError: a folder is missing, or a class has no image in one of them; it is named.
    """
    if path is None:
        raise UserError("--data folder: needs its folder: resnext train --data folder PATH")
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give one that has train/CLASS/*.jpg and val/CLASS/*.jpg")
    train, held_out = path / "train", next((path / n for n in HELD_OUT if (path / n).is_dir()), path / "val")
    for folder in (train, held_out):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; images are expected in train/CLASS and val/CLASS")
    classes = tuple(sorted(entry.name for entry in os.scandir(train) if entry.is_dir()))
    if len(classes) < 2:
        raise UserError(f"{train}: {len(classes)} classes; a folder for each of at least 2 is expected")
    for entry in sorted(os.scandir(held_out), key=lambda entry: entry.name):
        if entry.is_dir() and entry.name not in classes:
            raise UserError(f"{entry.path}: a class that {train} does not have")
    form = ImageFormat(3, image_size, MEAN, STD, photographs=True)
    sets = (_files(folder, classes, form) for folder in (train, held_out))
    return Data("folder", classes, form, *sets)


def _files(folder: Path, classes: tuple[str, ...], form: ImageFormat) -> ImageFiles:
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = image_files(folder / name)
        if not found:
            raise UserError(f"{folder / name}: a class without an image")
        paths += found
        labels += [label] * len(found)
    return ImageFiles(paths, torch.tensor(labels), form)


def image_files(folder: Path) -> list[Path]:
    """The images in ``folder`` and in the folders in it, in order; what is hidden is left out."""
    found = []
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = (name for name in sorted(files) if not name.startswith("."))
        found += [Path(root, name) for name in names if os.path.splitext(name)[1].lower() in SUFFIXES]
    return found
