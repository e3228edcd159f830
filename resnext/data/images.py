"""Image files and pixels: reading, scaling, and the format that a network takes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from resnext.errors import UserError

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
# What is cut out of an image's middle to test on, of its shorter side: 224 of 256 pixels.
CENTRE = 224 / 256


@dataclass(frozen=True)
class ImageFormat:
    """The images that a network takes.

    Attributes:
        channels: 1, grey, or 3, red, green and blue.
        size: pixels of a side.
        mean, std: of each channel over the training images, for pixels from 0 to 1.
        photographs: whether images have any size, and their middle is scaled; otherwise they have ``size``.
    """

    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    photographs: bool = False

    def normalize(self, images: Tensor) -> Tensor:
        """Turn uint8 images, or float ones from 0 to 1 (N, C, H, W), into float32 of mean 0, deviation 1."""
        mean, std = (_of_channels(values, images.device) for values in (self.mean, self.std))
        return (unit(images) - mean) / std


@cache
def _of_channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return ``values`` (C, 1, 1), cached, since the host waits for a GPU while they are copied to it."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


def unit(images: Tensor) -> Tensor:
    """Return uint8 images as float32 from 0 to 1, and float ones as they are."""
    return images if images.is_floating_point() else images.float() / 255


def open_image(path: Path, channels: int, ground: str = "black") -> Image.Image:
    """Open an image file in 8 bits per channel, with the colour ``ground`` where it is transparent.

    Raises:
        UserError: there is no such file, or no image that can be read to its end.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as file:
            warnings.simplefilter("ignore")  # Pillow's, of odd metadata
            return _convert(file, "L" if channels == 1 else "RGB", ground)
    except FileNotFoundError:
        raise UserError(f"{path}: no such image; give the path of a PNG or JPEG file") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError):
        raise UserError(f"{path}: not an image that can be read; give a PNG or JPEG file") from None


def _convert(file: Image.Image, mode: str, ground: str) -> Image.Image:
    if file.mode.startswith("I;16"):
        return Image.fromarray((np.array(file) // 257).astype(np.uint8)).convert(mode)
    if file.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {file.mode} have no known range")
    if file.has_transparency_data:
        image = file.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, ground), image).convert(mode)
    return file.convert(mode)


def centre(image: Image.Image, size: int) -> Image.Image:
    """Return the middle of ``image``, scaled to ``size`` x ``size``."""
    side = min(image.size) * CENTRE
    left, top = ((length - side) / 2 for length in image.size)
    return cut(image, (left, top, left + side, top + side), size)


def cut(image: Image.Image, box: tuple[float, float, float, float], size: int) -> Image.Image:
    """Return the part in ``box`` (left, top, right, bottom), scaled to ``size`` x ``size``, antialiased."""
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def to_tensor(image: Image.Image) -> Tensor:
    """Return the pixels (C, H, W), uint8."""
    pixels = torch.from_numpy(np.array(image))
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def read_image(path: Path, form: ImageFormat, *, resize: bool = False, invert: bool = False) -> Tensor:
    """Read an image file as the network takes it, except for normalising: (C, H, W), uint8.

    Args:
        path: any format that Pillow reads.
        form: what the network takes.
        resize: whether to scale the whole image, with black bars if it isn't square. Otherwise it must have
            the network's size, unless the network takes photographs.
        invert: whether to swap light and dark, for dark digits on a light background.

    Raises:
        UserError: there is no such file, it is no image, or it has the wrong size.
    """
    image = open_image(path, form.channels, ground="white" if invert else "black")
    size = (form.size, form.size)
    if image.size != size and not resize and not form.photographs:
        wide, high = image.size
        raise UserError(
            f"{path}: {wide} x {high} pixels, but this network takes {form.size} x {form.size}; "
            "scale the image, or pass --resize"
        )
    image = ImageOps.invert(image) if invert else image
    if form.photographs and not resize:
        return to_tensor(centre(image, form.size))
    return to_tensor(ImageOps.pad(image, size, Image.Resampling.LANCZOS) if image.size != size else image)


def write_image(path: Path, image: Tensor) -> None:
    """Write a uint8 image (1 or 3, H, W) as a PNG."""
    pixels = image.squeeze(0) if len(image) == 1 else image.permute(1, 2, 0)
    Image.fromarray(pixels.contiguous().numpy()).save(path)
