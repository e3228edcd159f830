"""Plan the launches of depthwise kernels, for groups of one channel."""

from __future__ import annotations

from typing import Any

from gconv.geometry import ConvGeometry
from gconv.kernels import tiles
from gconv.kernels.correlation import Correlation, stands_upright, upright_geometry
from gconv.kernels.depthwise import (
    OWN_WEIGHTS,
    depthwise_kernel,
    depthwise_slide_kernel,
    depthwise_slide_weight_kernel,
    depthwise_weight_kernel,
)
from gconv.kernels.depthwise_blocks import depthwise_blocks_kernel
from gconv.kernels.depthwise_rules import rows_in_turn, tap_block, weight_tap_block
from gconv.kernels.launch import Fusion, Launch, OperandLayout
from gconv.kernels.launch_arguments import (
    correlation_arguments,
    pair_arguments,
    weight_arguments,
    weight_grad_arguments,
)
from gconv.kernels.tiles import Tile


def plan_depthwise(c: Correlation, tile: Tile, operands: OperandLayout, fusion: Fusion) -> Launch:
    """Plan ``depthwise_kernel`` or ``depthwise_slide_kernel``.

    Raises:
        ValueError: if ``fusion`` has a batch norm, which these kernels don't support.
    """
    _refuse_norm(fusion)
    slides = tile.kernel == "depthwise-slide"
    if slides and c.lies_flat:
        c, operands = c.upright(), operands.upright()
    columns = c.size[0] * c.output[1]
    shared = correlation_arguments(c, tile, operands, fusion)
    packed_tiles = shared["packs"] * -(-columns // tile.pixels)
    reach = c.kernel[0] if slides else 1
    rows = tiles.rows_in_chunk(c.output[0], packed_tiles, tile, operands.device, reach)
    own: dict[str, Any] = {"columns": columns, "rows": rows, "R": c.kernel[0], "S": c.kernel[1]}
    if slides:
        own |= {"step_w": c.step[1], "tap_w": c.dilation[1]}
    else:
        own |= pair_arguments("STEP", c.step) | pair_arguments("DIVISOR", c.divisor)
        own |= pair_arguments("TAP", c.dilation)
    strides = weight_arguments(c, operands.second)
    own |= {name: strides[name] for name in OWN_WEIGHTS}
    own |= {"ACTIVATION": fusion.activation or ""}
    kernel = depthwise_slide_kernel if slides else depthwise_kernel
    programs = packed_tiles * -(-c.output[0] // rows)
    return Launch.of(kernel, programs, shared | own, tile, fusion.absent)


def plan_depthwise_blocks(c: Correlation, tile: Tile, operands: OperandLayout, fusion: Fusion) -> Launch:
    """Plan ``depthwise_blocks_kernel``: stride and dilation 1.

    Raises:
        ValueError: if ``fusion`` has a batch norm, which this kernel doesn't support.
    """
    _refuse_norm(fusion)
    shared = correlation_arguments(c, tile, operands, fusion)
    columns = c.size[0] * -(-c.output[1] // tile.columns)
    block = tap_block(c.kernel, tile, operands.dtype)
    own = {
        "columns": columns,
        "R": c.kernel[0],
        "S": c.kernel[1],
        "STEP": shared.pop("x_w") * shared["X_UNIT"],
        "FLIP": c.transposed,
        "ACTIVATION": fusion.activation or "",
        "PB": tile.rows,
        "T": tile.columns,
        "BR": block[0],
        "BS": block[1],
    }
    programs = shared["packs"] * -(-columns // tile.pixels) * -(-c.output[0] // tile.rows)
    return Launch.of(depthwise_blocks_kernel, programs, shared | own, tile, fusion.absent)


def plan_depthwise_weight(
    geometry: ConvGeometry, tile: Tile, operands: OperandLayout, fusion: Fusion, bytes_a_split: int
) -> tuple[Launch, int]:
    """Plan ``depthwise_weight_kernel`` or ``depthwise_slide_weight_kernel``. Return launch and splits."""
    slides = tile.kernel == "depthwise-slide"
    if slides and stands_upright(geometry):
        geometry, operands = upright_geometry(geometry), operands.upright()
    (n, _, p, q), (_, _, r, s) = geometry.output_size, geometry.weight_size
    block = weight_tap_block((r, s), min(p, 128), operands.dtype) if slides else (r, s)
    shared = weight_grad_arguments(geometry, tile, operands, fusion)
    column_tiles = -(-n * q // tile.pixels)
    programs = shared["packs"] * -(-r // block[0]) * -(-s // block[1])
    rows = tiles.rows_in_chunk(p, programs * column_tiles, tile, operands.device, block[0] if slides else 1)
    items = column_tiles * -(-p // rows)
    splits = tiles.splits_of(items, programs, bytes_a_split, tile, operands.device)
    own = {"columns": n * q, "rows": rows, "splits": splits, "R": r, "S": s}
    if slides:
        own |= {"step_w": geometry.stride[1], "tap_w": geometry.dilation[1], "BR": block[0], "BS": block[1]}
        own |= {"TURNS": rows_in_turn((r, s), block)}
    else:
        own |= pair_arguments("STEP", geometry.stride) | pair_arguments("TAP", geometry.dilation)
        own |= {"BT": tiles.power_of_two(r * s)}
    kernel = depthwise_slide_weight_kernel if slides else depthwise_weight_kernel
    return Launch.of(kernel, programs * splits, shared | own, tile), splits


def _refuse_norm(fusion: Fusion) -> None:
    if fusion.has_norm:
        raise ValueError("depthwise kernels don't support batch norm: pass a tile of the taps kernel")
