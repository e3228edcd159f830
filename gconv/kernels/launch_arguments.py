"""The arguments that many kernels share: sizes, strides, sides of tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gconv.geometry import ConvGeometry
from gconv.kernels import tiles
from gconv.kernels.correlation import Correlation
from gconv.kernels.launch import Fusion, OperandLayout
from gconv.kernels.packing import WALK, WEIGHTS
from gconv.kernels.tiles import Tile
from gconv.kernels.walk import Walk


def correlation_arguments(
    c: Correlation, tile: Tile, operands: OperandLayout, fusion: Fusion
) -> dict[str, Any]:
    """Return the arguments of every forward and input gradient kernel: sizes, strides, sides of tiles."""
    (_, h, w), (p, q), channels = c.size, c.output, c.groups * c.outputs
    x_n, _, x_h, x_w = operands.first
    x_unit = tiles.common_unit(tile.load, operands.dtype, x_n, x_h, x_w)
    y_unit = tiles.common_unit(tiles.WIDEST, operands.dtype, channels)
    strips = -(-q // tile.columns)
    return {
        "packs": tiles.packs_of(tile, c.groups),
        "groups": c.groups,
        "H": h,
        "W": w,
        "P": p,
        "Q": q,
        "top": c.top,
        "left": c.left,
        "x_n": x_n // x_unit,
        "x_h": x_h // x_unit,
        "x_w": x_w // x_unit,
        "y_w": channels // y_unit,
        "EPILOGUE": fusion.epilogue,
        "FULL": tiles.fills(tile, c.groups, c.inputs, c.outputs),
        "WIDE": tiles.is_wide(tile, strips, (x_n, p * q * channels), (h * x_h, w * x_w)),
        "X_UNIT": x_unit,
        "Y_UNIT": y_unit,
        "BM": tile.pixels,
        "BO": tile.outputs,
    }


def weight_grad_arguments(
    geometry: ConvGeometry, tile: Tile, operands: OperandLayout, fusion: Fusion
) -> dict[str, Any]:
    """Return the arguments of every weight gradient kernel: sizes, strides, sides of tiles."""
    (_, _, h, w), (_, _, p, q) = geometry.input_size, geometry.output_size
    (dy_n, _, dy_h, dy_w), (x_n, _, x_h, x_w) = operands.first, operands.second
    dy_unit = tiles.common_unit(tiles.WIDEST, operands.dtype, dy_n, dy_h, dy_w)
    x_unit = tiles.common_unit(tile.load, operands.dtype, x_n, x_h, x_w)
    sides, strips = geometry.channels_per_group, -(-q // tile.columns)
    return {
        "packs": tiles.packs_of(tile, geometry.groups),
        "groups": geometry.groups,
        "H": h,
        "W": w,
        "P": p,
        "Q": q,
        "top": geometry.padding.top,
        "left": geometry.padding.left,
        "dy_n": dy_n // dy_unit,
        "dy_h": dy_h // dy_unit,
        "dy_w": dy_w // dy_unit,
        "x_n": x_n // x_unit,
        "x_h": x_h // x_unit,
        "x_w": x_w // x_unit,
        "BIAS": fusion.bias,
        "FULL": tiles.fills(tile, geometry.groups, *sides) or tiles.overlaps(tile, *sides),
        "WIDE": tiles.is_wide(tile, strips, (x_n, dy_n), (h * x_h, w * x_w, p * dy_h, q * dy_w)),
        "X_UNIT": x_unit,
        "DY_UNIT": dy_unit,
        "BM": tile.pixels,
        "BO": tile.outputs,
    }


def pack_arguments(inputs: int, outputs: int, tile: Tile) -> dict[str, int]:
    """Return how the groups of a pack are laid out in a tile, for kernels that multiply matrices."""
    return {"CI": inputs, "CO": outputs, "G": tile.groups, "BI": tile.inputs}


def weight_arguments(c: Correlation, strides: Sequence[int]) -> dict[str, int]:
    """Return where weight[g, i, o, r, s] is in a tensor of ``strides``."""
    return dict(zip(WEIGHTS, c.weight_strides(strides), strict=True))


def walk_arguments(walk: Walk, tile: Tile) -> dict[str, int]:
    """Return how the programs share the rows of all images."""
    return {name: getattr(walk, name) for name in WALK} | {"T": tile.columns, "B": tile.packs}


def pair_arguments(name: str, pair: tuple[int, int]) -> dict[str, int]:
    """Return a (vertical, horizontal) pair as two arguments, such as STEP_H and STEP_W."""
    return {f"{name}_H": pair[0], f"{name}_W": pair[1]}
