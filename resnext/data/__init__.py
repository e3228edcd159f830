"""Data sets (digits from installed packages, CIFAR archives, folders of images) and their batches."""

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
    """Load a data set.

    Args:
        name: one of ``DATA_SETS``. "mnist5k" and "digits" come with installed packages; the others are read
            from ``path``.
        path: a CIFAR archive or its folder, or a folder of images. Defaults to None.
        image_size: height and width that images are scaled to, for "folder" only. Defaults to 224.

    Raises:
        UserError: there is nothing at ``path``, the data is damaged, or an argument doesn't apply to
            ``name``.
    """
    if name in ("mnist5k", "digits") and path is not None:
        raise UserError(
            f"unexpected path {path}: the images of --data {name} come with an installed package; "
            "drop the path; only cifar10, cifar100 and folder need one"
        )
    if name != "folder" and image_size is not None:
        raise UserError(
            f"--image-size needs --data folder, got --data {name}, whose images have a fixed size"
        )
    if name == "folder":
        return load_folder(path) if image_size is None else load_folder(path, image_size)
    if name == "mnist5k":
        return load_mnist5k()
    return load_digits() if name == "digits" else load_cifar(name, path)
