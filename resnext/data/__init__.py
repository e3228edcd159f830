"""Data sets: digits that packages carry, CIFAR's archives, folders of images; and batches of them."""

from __future__ import annotations

from pathlib import Path

from resnext.data.cifar import load_cifar
from resnext.data.embedded import load_digits, load_mnist5k
from resnext.data.folder import load_folder
from resnext.data.images import ImageFormat
from resnext.data.sets import Data, ImageFiles, Images
from resnext.errors import UserError

DATA_SETS = ("mnist5k", "digits", "cifar10", "cifar100", "folder")

__all__ = ["DATA_SETS", "Data", "ImageFiles", "ImageFormat", "Images", "load_data"]


def load_data(name: str, path: Path | None = None, image_size: int | None = None) -> Data:
    """Load the data set ``name``, one of ``DATA_SETS``.

    Args:
        name: "mnist5k" and "digits" come with installed packages; the others are read from ``path``.
        path: an archive of CIFAR or its folder, or a folder of images.
        image_size: for "folder" only: height and width that images are scaled to. Defaults to 224.

    Raises:
        UserError: nothing is at ``path``, or it is damaged, or an argument does not go with ``name``.
    """
    if name in ("mnist5k", "digits") and path is not None:
        raise UserError(f"{path}: --data {name} comes with gconv and takes no path; choose another --data")
    if name != "folder" and image_size is not None:
        raise UserError(
            f"--image-size: the images of --data {name} have one size; it goes with --data folder"
        )
    if name == "folder":
        return load_folder(path) if image_size is None else load_folder(path, image_size)
    if name == "mnist5k":
        return load_mnist5k()
    return load_digits() if name == "digits" else load_cifar(name, path)
