"""Geometries at the edges of tiles, and comparisons of kernels with given tiles with float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from families import check, every_other, geometry_of, inside_nan
from norms import norm_results
from oracle import Case, bounds, expected

from gconv import kernels
from gconv.kernels import launch, tiles
from gconv.kernels.correlation import Correlation
from gconv.kernels.device import Device
from gconv.kernels.tiles import Tile

HALF = torch.float16
OPERANDS = launch.OperandLayout((1, 1, 1, 1), (1, 1, 1, 1), HALF, "ieee", Device("cpu", "interpreter", 2))
Processors = Callable[[int], Device]


def layer(
    size: tuple[int, int],
    inputs: int = 4,
    outputs: int = 4,
    groups: int = 4,
    images: int = 2,
    **settings: Any,
) -> Case:
    """Return a 3x3 layer with padding 1; ``inputs`` and ``outputs`` are channels per group."""
    weight = (groups * outputs, inputs, 3, 3)
    return Case("", (images, groups * inputs, *size), weight, {"padding": 1, "groups": groups, **settings})


def strips(case: Case, transposed: bool = False, **changes: int) -> Tile:
    """Return a tile for a pass of ``case``: strips of one column or pair, one pack, with ``changes``."""
    make = Correlation.input_grad if transposed else Correlation.forward
    c = make(geometry_of(case))
    kernel = "strips" if c.divisor == (1, 1) else "pairs"
    groups = tiles.groups_in_pack(c.inputs, c.outputs)
    inputs, outputs = tiles.lanes(groups * c.inputs, 128), tiles.lanes(groups * c.outputs, 64)
    return replace(Tile(kernel, groups, 16, inputs, outputs, warps=1), **changes)


def check_strips(case: Case, dtype: torch.dtype = HALF, **changes: int) -> None:
    """Compare all passes with float64; at stride 2 the input gradient uses pairs, only in 16 bits."""
    tensors, geometry = case.tensors(dtype), geometry_of(case)
    x, w, bias = (t.detach() for t in tensors)
    x, w, bias = inside_nan(x), inside_nan(w), every_other(bias)
    dy = torch.randn(geometry.output_size).to(dtype)
    truth = expected(case, tensors, dy)
    limits = bounds(case, truth, dtype)
    results = [kernels.forward(x, w, bias, geometry, None, tile=strips(case, **changes))]
    if geometry.stride == (1, 1) or dtype == HALF:
        tile = strips(case, True, **changes)
        results.append(kernels.input_grad(inside_nan(dy), w, None, geometry, tile=tile))
    check(dict(zip(("output", "input gradient"), zip(results, truth, limits, strict=False), strict=False)))
    check_weight_grad(case, strips(case, **changes), dtype)


def check_weight_grad(case: Case, tile: Tile, dtype: torch.dtype = HALF) -> None:
    """Compare the weight gradient with tile ``tile`` and the bias gradient with float64."""
    tensors, geometry = case.tensors(dtype), geometry_of(case)
    x, dy = tensors[0].detach(), torch.randn(geometry.output_size).to(dtype)
    truth = expected(case, tensors, dy)
    limits = bounds(case, truth, dtype)[2:]
    results = kernels.weight_grad(inside_nan(dy), inside_nan(x), geometry, True, tile)
    names = ("weight gradient", "bias gradient")
    check(dict(zip(names, zip(results, truth[2:], limits, strict=True), strict=True)))


def seven_rows(images: int, stride: int, padding: int) -> Case:
    """Return a layer with outputs of 7 x 6 pixels, whatever the padding."""
    height, width = (stride * outputs + 2 - 2 * padding for outputs in (7, 6))
    return layer((height, width), images=images, padding=padding, stride=stride)


def rows_of(turns: int, count: int) -> int:
    """Return the turns per program if ``count`` programs share those of two groups of images."""
    return max(4, -(-2 * turns // count))


def check_norm_strips(case: Case, dtype: torch.dtype = HALF, **changes: int) -> None:
    """Compare the passes with batch norm inside, and the sums that they compute, with float64."""
    given = {"forward": strips(case, **changes), "input_grad": strips(case, True, **changes)}
    check(norm_results(case, dtype, tiles=given))
