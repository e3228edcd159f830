"""The commands ``resnext summary``, ``complexity`` and ``traffic``: the cost of networks."""

from __future__ import annotations

import argparse

import torch

from resnext import complexity as counted
from resnext import measured, tables
from resnext.cli.options import Parser, add_device, number
from resnext.cli.runtime import console, device_of, print_table
from resnext.errors import UserError
from resnext.model import VARIANTS, ResNeXt

COMPARED = ("resnet50", "resnext50_32x4d")  # the default variants
IMAGE_SIZES = {"imagenet": 224, "small": 32}  # by stem


def _add_variants(parser: Parser, least: int, most: int) -> None:
    """Add VARIANT and ``--image-size``, from ``least`` to ``most``."""
    text = f"networks to show: {', '.join(VARIANTS)} (default: {' '.join(COMPARED)})"
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=text)
    text = "height and width of the images (default: 224, or 32 for the CIFAR networks)"
    parser.add_argument("--image-size", type=number(int, least, most), metavar="N", help=text)


def add_summary_arguments(parser: Parser) -> None:
    """Add the options of ``summary``."""
    _add_variants(parser, 1, 2**16)


def summary(arguments: argparse.Namespace) -> None:
    """Show networks side by side, stage by stage: output sizes, layers, parameters and FLOPs.

    By default this is table 1 of the ResNeXt paper: ResNet-50 next to ResNeXt-50 (32 x 4d). FLOPs are
    multiply-adds for one image. All numbers are counted on the networks themselves.

    Examples:
      resnext summary
      resnext summary resnext101_32x8d resnext101_64x4d --image-size 320
    """
    groups: dict[tuple, dict[str, list[counted.Stage]]] = {}
    for name in _variants(arguments):
        with torch.device("meta"):
            model = VARIANTS[name]()
        size = arguments.image_size or IMAGE_SIZES[model.stem]
        stages = counted.stages(model, size)
        key = (size, *((stage.name, tables.side(stage)) for stage in stages))
        groups.setdefault(key, {})[name] = stages
    for (size, *_), networks in groups.items():
        print_table(tables.of_structure(size, networks))


def add_complexity_arguments(parser: Parser) -> None:
    """Add the options of ``complexity``."""
    text = "another cardinality to find the matching width of; can be repeated"
    parser.add_argument("--cardinality", action="append", type=number(int, 1), metavar="C", help=text)


def complexity(arguments: argparse.Namespace) -> None:
    """Show cardinality against width at equal complexity: tables 2 and 3 of the ResNeXt paper.

    For each cardinality C, the table shows the width d at which a conv2 block is as complex as that of
    ResNeXt-50 (32 x 4d), the parameters and FLOPs (multiply-adds) of the block and of the 50-layer network,
    and the ImageNet top-1 errors that the paper reports. Everything except the errors is counted here.

    Examples:
      resnext complexity --cardinality 16 --cardinality 64
    """
    pairs = dict(counted.EQUAL_COMPLEXITY)
    try:
        pairs |= {c: counted.matching_width(c) for c in arguments.cardinality or () if c not in pairs}
    except ValueError as error:
        raise UserError(
            f"--{error}; with more groups, even one channel each makes a block more complex than 32 x 4d"
        ) from None
    networks = {}
    for c, d in sorted(pairs.items()):
        with torch.device("meta"):
            networks[c, d] = counted.stages(ResNeXt((3, 4, 6, 3), c, d))
    print_table(tables.of_complexity(networks))
    console.print("error 50, error 101: ImageNet top-1 errors at 50 and 101 layers as the paper reports them")


def add_traffic_arguments(parser: Parser) -> None:
    """Add the options of ``traffic``."""
    _add_variants(parser, 32, 2**12)
    text = "batch size of the timing on a GPU (default: 256)"
    parser.add_argument("--batch-size", type=number(int, 2), default=256, metavar="N", help=text)
    add_device(parser)


def traffic(arguments: argparse.Namespace) -> None:
    """Show the memory traffic of networks, unfused and fused, and on a GPU the time of each stage.

    The table shows how many megabytes of 16-bit activations are read and written for one image, in a forward
    pass in evaluation mode and in a training step. "Fused" means `gconv.fuse` for inference and
    `ResNeXt(..., fused=True)` for training.

    On a CUDA GPU, each stage is also timed in bfloat16 autocast. The tables show its device time next to the
    time of a copy that moves as many bytes.

    Examples:
      resnext traffic resnext50_32x4d --batch-size 128
    """
    device = device_of(arguments.device)
    for name in _variants(arguments):
        build = VARIANTS[name]
        with torch.device("meta"):
            model = build()
        size = arguments.image_size or IMAGE_SIZES[model.stem]
        rows = counted.traffic(model, size)
        print_table(tables.of_traffic(f"{name}, {size} x {size} pixels: MB per image", rows))
        if device.type == "cuda":
            times = measured.measure(build, arguments.batch_size, size, device)
            for table in tables.of_times(f"{name}, batch {arguments.batch_size}", rows, times, device):
                print_table(table)
    if device.type != "cuda":
        console.print("stages weren't timed: that needs a CUDA GPU")


def _variants(arguments: argparse.Namespace) -> list[str]:
    """Return the variants on the command line, or the default ones."""
    for name in arguments.variants:
        if name not in VARIANTS:
            raise UserError(f"unknown variant '{name}': choose from {', '.join(VARIANTS)}")
    return arguments.variants or list(COMPARED)
