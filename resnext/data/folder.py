"""Image folders in ImageNet's layout: train/CLASS/*.jpg and val/CLASS/*.jpg."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from resnext.data.images import SUFFIXES, ImageFormat
from resnext.data.sets import Data, ImageFiles
from resnext.errors import UserError
from resnext.names import shown

HELD_OUT = ("val", "valid", "validation", "test")
# Mean and deviation of ImageNet.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SIZE = 224


def load_folder(path: Path | None, image_size: int = IMAGE_SIZE) -> Data:
    """Load a folder of images with training and held-out images of each class.

    Args:
        path: folder with a folder ``train`` and one of ``val``, ``valid``, ``validation`` and ``test``, each
            of which has a folder for each class.
        image_size: height and width that images are scaled to. Defaults to 224.

    Raises:
        UserError: a folder is missing, or a class has no images in one of them. The error names the
            folder.
    """
    if path is None:
        raise UserError("--data folder needs a path: a folder with train/CLASS/*.jpg and val/CLASS/*.jpg")
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; pass one with train/CLASS/*.jpg and val/CLASS/*.jpg")
    train, held_out = path / "train", next((path / n for n in HELD_OUT if (path / n).is_dir()), path / "val")
    for folder in (train, held_out):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; put images into train/CLASS and val/CLASS")
    names = _folders(train)
    if len(names) < 2:
        raise UserError(f"{train} must have a folder for each of at least 2 classes, got {len(names)}")
    for name in _folders(held_out):
        if name not in names:
            raise UserError(
                f"{held_out / name}: no such class in {train}; add training images or remove the folder"
            )
    classes = tuple(map(shown, names))
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise UserError(f"{train}: the names of two folders are both shown as {twice}; rename one")
    form = ImageFormat(3, image_size, MEAN, STD, photographs=True)
    sets = (_files(folder, names, form) for folder in (train, held_out))
    return Data("folder", classes, form, *sets)


def _folders(folder: Path) -> list[str]:
    """Return the names of the folders in ``folder``, sorted, without hidden ones."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name))


def is_hidden(name: str) -> bool:
    """Return whether files and folders of this name are ignored, such as ``__MACOSX``."""
    return name.startswith(".") or name == "__MACOSX"


def _files(folder: Path, names: list[str], form: ImageFormat) -> ImageFiles:
    paths, labels = [], []
    for label, name in enumerate(names):
        found = image_files(folder / name)
        if not found:
            raise UserError(
                f"{folder / name}: no images found; each class needs at least one for training and testing"
            )
        paths += found
        labels += [label] * len(found)
    return ImageFiles(paths, torch.tensor(labels), form)


def image_files(folder: Path) -> list[Path]:
    """Return the image files in ``folder`` and all folders in it, sorted, without hidden ones."""
    found = []
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        names = (name for name in sorted(files) if not is_hidden(name))
        found += [Path(root, name) for name in names if os.path.splitext(name)[1].lower() in SUFFIXES]
    return found
