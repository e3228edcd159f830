"""Image files and pixels: reading, scaling, and the image format of a network."""

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
# The side of the center crop for testing, relative to the shorter side of the image: 224 of 256 pixels.
CENTRE = 224 / 256


@dataclass(frozen=True)
class ImageFormat:
    """The format of the images that a network accepts.

    Attributes:
        channels: number of channels: 1 for gray, 3 for red, green and blue.
        size: height and width in pixels.
        mean: mean of each channel over the training images, for pixels from 0 to 1.
        std: standard deviation of each channel over the training images.
        photographs: whether images can have any size, in which case a center crop is scaled to ``size``.
            Defaults to False: images must have ``size``.
    """

    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    photographs: bool = False

    def normalize(self, images: Tensor) -> Tensor:
        """Normalize uint8 images, or float images from 0 to 1, (N, C, H, W): float32 of mean 0 and std 1."""
        mean, std = (_of_channels(values, images.device) for values in (self.mean, self.std))
        return (unit(images) - mean) / std


@cache
def _of_channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return ``values`` as a tensor (C, 1, 1), cached because copying to a GPU makes the host wait."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


def unit(images: Tensor) -> Tensor:
    """Return uint8 images as float32 from 0 to 1, and float images unchanged."""
    return images if images.is_floating_point() else images.float() / 255


def open_image(path: Path, channels: int, ground: str = "black") -> Image.Image:
    """Read an image file with 8 bits per channel, with transparent pixels in the color ``ground``.

    Raises:
        UserError: there is no such file, or it isn't an image that can be read completely.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as file:
            warnings.simplefilter("ignore")  # Pillow warns of unusual metadata
            return _convert(file, "L" if channels == 1 else "RGB", ground)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; pass the path of a PNG or JPEG image") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError):
        raise UserError(f"can't read {path}: it is damaged or not an image; use a PNG or JPEG file") from None


def _convert(file: Image.Image, mode: str, ground: str) -> Image.Image:
    if file.mode.startswith("I;16"):
        return Image.fromarray((np.array(file) // 257).astype(np.uint8)).convert(mode)
    if file.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {file.mode} have an unknown range")
    if file.has_transparency_data:
        image = file.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, ground), image).convert(mode)
    return file.convert(mode)


def centre(image: Image.Image, size: int) -> Image.Image:
    """Return the center crop of ``image``, scaled to ``size`` x ``size``."""
    side = min(image.size) * CENTRE
    left, top = ((length - side) / 2 for length in image.size)
    return cut(image, (left, top, left + side, top + side), size)


def cut(image: Image.Image, box: tuple[float, float, float, float], size: int) -> Image.Image:
    """Return the part in ``box`` (left, top, right, bottom), scaled to ``size`` x ``size``, antialiased."""
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def to_tensor(image: Image.Image) -> Tensor:
    """Return the pixels as a uint8 tensor (C, H, W)."""
    pixels = torch.from_numpy(np.array(image))
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def read_image(path: Path, form: ImageFormat, *, resize: bool = False, invert: bool = False) -> Tensor:
    """Read an image file in the format of a network, not normalized yet: (C, H, W), uint8.

    Args:
        path: image file, in any format that Pillow reads.
        form: format of the images that the network accepts.
        resize: whether to scale the entire image, with black bars if it isn't square. Otherwise the image
            must have the network's size, unless the network accepts photographs. Defaults to False.
        invert: whether to invert light and dark, for dark digits on a light background. Defaults to False.

    Raises:
        UserError: there is no such file, it isn't an image, or its size is wrong.
    """
    image = open_image(path, form.channels, ground="white" if invert else "black")
    size = (form.size, form.size)
    if image.size != size and not resize and not form.photographs:
        wide, high = image.size
        raise UserError(
            f"{path}: this network needs {form.size} x {form.size} pixels, got {wide} x {high}; "
            "pass --resize to scale the image"
        )
    image = ImageOps.invert(image) if invert else image
    if form.photographs and not resize:
        return to_tensor(centre(image, form.size))
    return to_tensor(ImageOps.pad(image, size, Image.Resampling.LANCZOS) if image.size != size else image)


def write_image(path: Path, image: Tensor) -> None:
    """Write a uint8 image (1 or 3, H, W) to a PNG file."""
    pixels = image.squeeze(0) if len(image) == 1 else image.permute(1, 2, 0)
    Image.fromarray(pixels.contiguous().numpy()).save(path)
