"""Labelled images, in memory or in files, and a whole data set of them."""

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
    """Images in memory (N, C, H, W), uint8, and their labels (N,), int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Tensor:
        """Return an image (C, H, W), uint8."""
        return self.images[index]


@dataclass(frozen=True)
class ImageFiles:
    """Files of images of any size, and their labels (N,), int64."""

    paths: Sequence[Path]
    labels: Tensor
    format: ImageFormat

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int, scale: Callable[[Image.Image, int], Image.Image] = centre) -> Tensor:
        """Return the part of an image that ``scale`` takes, by default the middle (C, size, size), uint8.

        Raises:
            UserError: the image cannot be read; the error has its path.
        """
        image = open_image(self.paths[index], self.format.channels)
        return to_tensor(scale(image, self.format.size))


@dataclass(frozen=True)
class Data:
    """Images to train on and to test on.

    Attributes:
        name: as the command line calls it.
        classes: a name for each label, as :func:`resnext.names.shown` puts it.
        format: what a network takes.
        train, test: the images; none is in both.
    """

    name: str
    classes: tuple[str, ...]
    format: ImageFormat
    train: Images | ImageFiles
    test: Images | ImageFiles

    @property
    def fingerprint(self) -> dict[str, int]:
        """Numbers that must not change between a run and its resumption."""
        return {
            "training images": len(self.train),
            "held-out images": len(self.test),
            "classes": len(self.classes),
            "sum of labels times places": _checksum(self.train.labels),
        }


def _checksum(labels: Tensor) -> int:
    return int((labels * torch.arange(1, len(labels) + 1)).sum())
