"""Images in folders, as ImageNet's are laid out: train/CLASS/*.jpg and val/CLASS/*.jpg."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from resnext.data.images import SUFFIXES, ImageFormat
from resnext.data.sets import Data, ImageFiles
from resnext.errors import UserError
from resnext.names import shown

HELD_OUT = ("val", "valid", "validation", "test")
# Of ImageNet.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SIZE = 224


def load_folder(path: Path | None, image_size: int = IMAGE_SIZE) -> Data:
    """Load the images in ``path``, which has a folder for training and one for testing, by class.

    Args:
        path: has ``train``, and one of ``val``, ``valid``, ``validation``, ``test``.
        image_size: height and width that each image is scaled to.

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
    names = _folders(train)
    if len(names) < 2:
        raise UserError(f"{train}: {len(names)} classes; a folder for each of at least 2 is expected")
    for name in _folders(held_out):
        if name not in names:
            raise UserError(f"{held_out / name}: a class that {train} does not have")
    classes = tuple(map(shown, names))
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise UserError(f"{train}: two folders whose names are both shown as {twice}; rename one")
    form = ImageFormat(3, image_size, MEAN, STD, photographs=True)
    sets = (_files(folder, names, form) for folder in (train, held_out))
    return Data("folder", classes, form, *sets)


def _folders(folder: Path) -> list[str]:
    """Return the names of the folders in ``folder``, in order."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name))


def is_hidden(name: str) -> bool:
    """Return whether files and folders of that name are ignored, such as ``__MACOSX``."""
    return name.startswith(".") or name == "__MACOSX"


def _files(folder: Path, names: list[str], form: ImageFormat) -> ImageFiles:
    paths, labels = [], []
    for label, name in enumerate(names):
        found = image_files(folder / name)
        if not found:
            raise UserError(f"{folder / name}: a class without an image")
        paths += found
        labels += [label] * len(found)
    return ImageFiles(paths, torch.tensor(labels), form)


def image_files(folder: Path) -> list[Path]:
    """Return the images in ``folder`` and in its folders, in order, without hidden ones."""
    found = []
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        names = (name for name in sorted(files) if not is_hidden(name))
        found += [Path(root, name) for name in names if os.path.splitext(name)[1].lower() in SUFFIXES]
    return found
