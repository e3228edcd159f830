"""``resnext summary``, ``complexity`` and ``traffic``: networks, counted."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.table import Table

from resnext import complexity as counted
from resnext import measured, tables
from resnext.cli.options import DeviceOption, console, device_of, print_table
from resnext.errors import UserError
from resnext.model import VARIANTS, ResNeXt


def summary(
    variants: Annotated[
        list[str] | None, typer.Argument(help=f"Any of: {', '.join(VARIANTS)}.", metavar="VARIANT")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, max=2**16, help="Pixels of a side; by default 224, 32 for the CIFAR networks."),
    ] = None,
) -> None:
    """Lay networks side by side, stage by stage: output size, blocks, parameters, FLOPs.

    Without a VARIANT it is table 1 of the ResNeXt paper: ResNet-50 beside ResNeXt-50 (32 x 4d). FLOPs are
    multiply-adds for one image. All is counted on the networks themselves.
    """
    names = _variants(variants, ["resnet50", "resnext50_32x4d"])
    groups: dict[tuple, dict[str, list[counted.Stage]]] = {}
    for name in names:
        with torch.device("meta"):
            model = VARIANTS[name]()
        size = image_size or (224 if model.stem == "imagenet" else 32)
        stages = counted.stages(model, size)
        key = (size, *((stage.name, tables.side(stage)) for stage in stages))
        groups.setdefault(key, {})[name] = stages
    for (size, *_), networks in groups.items():
        print_table(tables.of_structure(size, networks))


def complexity(
    cardinality: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Another cardinality to find the width of; can be repeated."),
    ] = None,
) -> None:
    """Cardinality against width at equal complexity: tables 2 and 3 of the ResNeXt paper.

    For each cardinality C, the width d at which a conv2 block is as complex as that of ResNeXt-50 (32 x 4d);
    the block's parameters and FLOPs (multiply-adds), the 50-layer network's, and the ImageNet top-1 errors
    that the paper reports. All but the errors is counted on the modules themselves.
    """
    pairs = dict(counted.EQUAL_COMPLEXITY)
    try:
        pairs |= {c: counted.matching_width(c) for c in cardinality or () if c not in pairs}
    except ValueError as error:
        raise UserError(f"--cardinality: {error}, for a block as complex as 32 x 4d") from None
    table = Table(title="cardinality against width, at the complexity of ResNeXt-50 (32 x 4d)")
    headings = (
        "C",
        "d",
        "width",
        "block params",
        "block GFLOPs",
        "net params",
        "net GFLOPs",
        "error 50",
        "error 101",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for c, d in sorted(pairs.items()):
        block_parameters, block_flops = counted.block_complexity(c, d)
        with torch.device("meta"):
            stages = counted.stages(ResNeXt((3, 4, 6, 3), c, d))
        errors = counted.PAPER_ERRORS.get(c)
        table.add_row(
            str(c),
            str(d),
            str(c * d),
            f"{block_parameters:,}",
            f"{block_flops / 1e9:.3f}",
            f"{sum(s.parameters for s in stages) / 1e6:.1f} M",
            f"{sum(s.flops for s in stages) / 1e9:.2f}",
            *(f"{error}%" for error in errors or ()),
        )
    print_table(table)
    console.print(
        "error 50, error 101: ImageNet top-1 errors at 50 and 101 layers, from the paper, not measured here"
    )


def traffic(
    variants: Annotated[
        list[str] | None, typer.Argument(help=f"Any of: {', '.join(VARIANTS)}.", metavar="VARIANT")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=32, max=2**12, help="Pixels of a side; by default 224, 32 for the CIFAR networks."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=2, help="Images in a step that a GPU is measured with.")
    ] = 256,
    device: DeviceOption = "auto",
) -> None:
    """Count the bytes that networks move, unfused and fused, beside the time that a GPU takes for them.

    Megabytes of activations read and written for one image in 16 bits, in a forward pass in evaluation, and
    in a training step. "Fused" is what `gconv.fuse` makes, and `ResNeXt(..., fused=True)`. Without a VARIANT:
    ResNet-50, and ResNeXt-50 (32 x 4d).

    Where there is a GPU, each stage is run on it, in bfloat16 autocast: the profiler's device time stands
    beside the time that a copy of as many bytes takes.
    """
    where = device_of(device)
    for name in _variants(variants, ["resnet50", "resnext50_32x4d"]):
        build = VARIANTS[name]
        with torch.device("meta"):
            model = build()
        size = image_size or (224 if model.stem == "imagenet" else 32)
        rows = counted.traffic(model, size)
        print_table(tables.of_traffic(f"{name}, {size} x {size} pixels: MB an image", rows))
        if where.type == "cuda":
            times = measured.measure(build, batch_size, size, where)
            for table in tables.of_times(f"{name}, batch {batch_size}", rows, times, where):
                print_table(table)
    if where.type != "cuda":
        console.print("no GPU here: nothing was measured")


def _variants(names: list[str] | None, default: list[str]) -> list[str]:
    """Names of networks that there are."""
    for name in names or ():
        if name not in VARIANTS:
            raise UserError(f"{name}: no such variant; choose from {', '.join(VARIANTS)}")
    return names or default
