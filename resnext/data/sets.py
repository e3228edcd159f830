"""Labeled images in memory or in files, and data sets of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from resnext.data.images import ImageFormat, centre, open_image, to_tensor


@dataclass(frozen=True)
class Images:
    """Images in memory, uint8 (N, C, H, W), and their labels, int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Tensor:
        """Return an image, uint8 (C, H, W)."""
        return self.images[index]


@dataclass(frozen=True)
class ImageFiles:
    """Image files of any size, and their labels, int64 (N,)."""

    paths: Sequence[Path]
    labels: Tensor
    format: ImageFormat

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int, scale: Callable[[Image.Image, int], Image.Image] = centre) -> Tensor:
        """Return an image cropped and scaled by ``scale``, uint8 (C, size, size).

        Args:
            index: position of the image.
            scale: function of an image and a size. Defaults to the center crop.

        Raises:
            UserError: the image can't be read; the error names its path.
        """
        image = open_image(self.paths[index], self.format.channels)
        return to_tensor(scale(image, self.format.size))


@dataclass(frozen=True)
class Data:
    """A data set: training and held-out images.

    Attributes:
        name: name of the data set on the command line.
        classes: name of each class, as `resnext.names.shown` returns it.
        format: format of the images that a network accepts.
        train: training images.
        test: held-out images.
    """

    name: str
    classes: tuple[str, ...]
    format: ImageFormat
    train: Images | ImageFiles
    test: Images | ImageFiles

    @property
    def fingerprint(self) -> dict[str, int]:
        """Numbers that must be the same when a run is resumed."""
        return {
            "training images": len(self.train),
            "held-out images": len(self.test),
            "classes": len(self.classes),
            "sum of labels times places": _checksum(self.train.labels),
        }


def _checksum(labels: Tensor) -> int:
    return int((labels * torch.arange(1, len(labels) + 1)).sum())
