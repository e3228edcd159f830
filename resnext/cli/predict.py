"""The command ``resnext predict``."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnext import checkpoint, tables
from resnext.checkpoint import Checkpoint
from resnext.cli.options import DEMO, Parser, add_fields, add_machine, given, number
from resnext.cli.runtime import backend_of, device_of, print_table
from resnext.config import DEFAULT_OPTIONS, Options
from resnext.data.folder import image_files
from resnext.data.images import read_image
from resnext.errors import UserError
from resnext.model import ResNeXt
from resnext.names import shown, to_json

IMAGES_AT_ONCE = 64


def add_arguments(parser: Parser) -> None:
    """Add the options of ``predict``."""
    parser.add_argument(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="image file (PNG, JPEG or another format that Pillow reads), or folder of images",
    )
    parser.add_argument(
        "--checkpoint",
        "-c",
        type=Path,
        default=DEMO,
        metavar="RUN",
        help=f"checkpoint file or folder of a run (default: {DEMO})",
    )
    images = parser.add_argument_group("images")
    images.add_argument(
        "--resize",
        action="store_true",
        help="scale each image to the input size of the network, with black bars if it isn't square",
    )
    images.add_argument(
        "--invert", action="store_true", help="invert light and dark, for dark digits on a light background"
    )
    add_fields(images, Options, "skip_corrupt", defaults={"": DEFAULT_OPTIONS})
    add_machine(parser.add_argument_group("execution"))
    output = parser.add_argument_group("output")
    output.add_argument(
        "--top",
        type=number(int, 1, 100),
        default=2,
        metavar="N",
        help="number of guesses for each image (default: 2)",
    )
    output.add_argument("--json", action="store_true", help="print JSON instead of a table")


def predict(arguments: argparse.Namespace) -> None:
    """Classify images with a trained network, and print the guesses with their probabilities.

    A network trained on --data folder accepts images of any size and looks at the middle of each. Other
    networks accept only the size that they were trained on, as in RUN/samples: light digits on a dark
    background. For a network trained on gray images, colors become gray. Transparent pixels become
    background.

    Examples:
      resnext predict runs/demo/samples
      resnext predict scan.jpg --resize --invert
      resnext predict -c runs/photos photos/val --top 5 --json
    """
    device = device_of(arguments.device)
    saved = checkpoint.load(arguments.checkpoint)
    paths = _image_paths(arguments.images)
    found: list[dict[str, Any]] = []
    with backend_of(arguments.backend, device), torch.inference_mode():
        predictor = _Predictor(saved, saved.network(device), device, arguments)
        for start in range(0, len(paths), IMAGES_AT_ONCE):
            found += predictor.guess(paths[start : start + IMAGES_AT_ONCE])
    if arguments.json:
        print(to_json(found))
        return
    print_table(tables.of_guesses(found, min(arguments.top, len(saved.classes))))


def _image_paths(given: list[Path]) -> list[Path]:
    """Return the files among ``given`` and the images in its folders."""
    paths = []
    for path in given:
        found = image_files(path) if path.is_dir() else [path]
        if not found:
            raise UserError(f"{path}: no images in this folder; pass image files or a folder of them")
        paths += found
    return paths


@dataclass(frozen=True)
class _Predictor:
    """A network, and the options of the command line for images and guesses."""

    saved: Checkpoint
    network: ResNeXt
    device: torch.device
    arguments: argparse.Namespace

    def guess(self, paths: list[Path]) -> list[dict[str, Any]]:
        """Return an entry for each path: guesses, most probable first, or an error if it can't be read."""
        images = [self._read(path) for path in paths]
        readable = [image for image in images if isinstance(image, Tensor)]
        rows = iter(self._shares(torch.stack(readable)) if readable else ())
        return [
            {"image": shown(path), "guesses": [], "error": image}
            if isinstance(image, str)
            else {"image": shown(path), "guesses": self._surest(next(rows))}
            for path, image in zip(paths, images, strict=True)
        ]

    def _read(self, path: Path) -> Tensor | str:
        """Return the pixels of an image, or the error if unreadable images are skipped."""
        resize, invert = self.arguments.resize, self.arguments.invert
        try:
            return read_image(path, self.saved.format, resize=resize, invert=invert)
        except UserError as error:
            if "skip_corrupt" not in given(self.arguments, Options):
                raise
            return str(error)

    def _shares(self, images: Tensor) -> Tensor:
        """Return the probabilities of the classes (N, classes)."""
        return self.network(self.saved.format.normalize(images.to(self.device))).softmax(1).cpu()

    def _surest(self, shares: Tensor) -> list[dict[str, Any]]:
        best = shares.topk(min(self.arguments.top, len(shares)))
        return [
            {"class": self.saved.classes[i], "probability": round(p, 6)}
            for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
