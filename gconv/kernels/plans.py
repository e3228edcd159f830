"""Plan the launches of all kernels: grid and arguments, from a geometry and a tile.

``plan_correlation`` plans forward passes and input gradients, ``plan_weight_sums`` weight gradients.
Each kernel has a planner; the planners for depthwise kernels are in ``depthwise_plans.py``.
"""

from __future__ import annotations

from functools import lru_cache

from gconv.geometry import ConvGeometry
from gconv.kernels import tiles
from gconv.kernels.correlation import Correlation, pairs_of
from gconv.kernels.depthwise_plans import plan_depthwise, plan_depthwise_blocks, plan_depthwise_weight
from gconv.kernels.launch import PLANS_KEPT, Fusion, Launch, OperandLayout
from gconv.kernels.launch_arguments import (
    correlation_arguments,
    pack_arguments,
    pair_arguments,
    walk_arguments,
    weight_arguments,
    weight_grad_arguments,
)
from gconv.kernels.pairs import pairs_kernel
from gconv.kernels.slide import residue_kernel, slide_kernel, slide_weight_kernel
from gconv.kernels.strips import PACKING, QUAD, pack_kernel, strips_kernel
from gconv.kernels.strips_weight import strips_weight_kernel
from gconv.kernels.taps import taps_kernel, taps_weight_kernel
from gconv.kernels.tiles import Tile
from gconv.kernels.walk import Walk


def plan_correlation(c: Correlation, tile: Tile, operands: OperandLayout, fusion: Fusion) -> Launch:
    """Plan a forward pass or an input gradient in ``tile``."""
    tile = tiles.with_whole_packs(tile, c.groups, c.inputs, c.outputs)
    return CORRELATIONS[tile.kernel](c, tile, operands, fusion)


def plan_weight_sums(
    geometry: ConvGeometry, tile: Tile, operands: OperandLayout, fusion: Fusion, sums_a_split: int
) -> tuple[Launch, int]:
    """Plan the partial sums of a weight gradient in ``tile``.

    Args:
        geometry, tile, operands, fusion: the pass.
        sums_a_split: number of float32 numbers that each split writes.

    Returns:
        The launch and the number of splits.
    """
    tile = tiles.with_whole_packs(tile, geometry.groups, *geometry.channels_per_group)
    return WEIGHT_SUMS[tile.kernel](geometry, tile, operands, fusion, 4 * sums_a_split)


def plan_strips(c: Correlation, tile: Tile, operands: OperandLayout, fusion: Fusion) -> Launch:
    """Plan ``strips_kernel``: 3x3 at stride 1 or 2."""
    (n, h, _), (p, q), stride = c.size, c.output, c.step[0]
    shared = correlation_arguments(c, tile, operands, fusion)
    programs = shared["packs"] * tiles.blocks_of(tile, c.outputs)
    begins = int(stride == 1 and c.top > 0 and p + 1 - c.top >= h)
    turns = p + (2 if stride == 1 else 1) - begins
    walk = Walk.of(n, -(-q // tile.columns), turns, programs, 0, tile, operands.device)
    own = {
        "begins": begins,
        "quad": QUAD,
        "STRIDE": stride,
        "ACTIVATION": fusion.activation or "",
        "PROLOGUE": fusion.prologue,
        "PRECISION": operands.precision,
    }
    arguments = shared | own | pack_arguments(c.inputs, c.outputs, tile) | walk_arguments(walk, tile)
    return Launch.of(strips_kernel, programs * walk.parts * walk.splits, arguments, tile, fusion.absent)


def plan_pairs(c: Correlation, tile: Tile, operands: OperandLayout, fusion: Fusion) -> Launch:
    """Plan ``pairs_kernel``: the input gradient of 3x3 at stride 2."""
    (n, h, _), (_, q) = c.size, c.output
    shared = correlation_arguments(c, tile, operands, fusion)
    above, pairs_h = pairs_of(c.output[0], c.top)
    begins = int(above < 0 and above + pairs_h >= h)
    programs = shared["packs"] * tiles.blocks_of(tile, c.outputs)
    strips, turns = -(-q // (2 * tile.columns)), pairs_h + 1 - begins
    walk = Walk.of(n, strips, turns, programs, 0, tile, operands.device)
    own = {
        "above": above,
        "begins": begins,
        "quad": QUAD,
        "ODD": c.left % 2,
        "ACTIVATION": fusion.activation or "",
        "STAGES": tile.stages,
    }
    arguments = shared | own | pack_arguments(c.inputs, c.outputs, tile) | walk_arguments(walk, tile)
    return Launch.of(pairs_kernel, programs * walk.parts * walk.splits, arguments, tile, fusion.absent)


def plan_slide(c: Correlation, tile: Tile, operands: OperandLayout, fusion: Fusion) -> Launch:
    """Plan ``slide_kernel``: 3x3 at vertical stride 1 or 2."""
    columns = c.size[0] * c.output[1]
    shared = correlation_arguments(c, tile, operands, fusion)
    packed_tiles = shared["packs"] * -(-columns // tile.pixels)
    rows = tiles.rows_in_chunk(c.output[0], packed_tiles, tile, operands.device)
    own = {
        "columns": columns,
        "rows": rows,
        "step_w": c.step[1],
        "tap_w": c.dilation[1],
        "STRIDE": c.step[0],
        "ACTIVATION": fusion.activation or "",
        "PROLOGUE": fusion.prologue,
        "PRECISION": operands.precision,
    }
    weights = pack_arguments(c.inputs, c.outputs, tile) | weight_arguments(c, operands.second)
    programs = packed_tiles * -(-c.output[0] // rows)
    return Launch.of(slide_kernel, programs, shared | own | weights, tile, fusion.absent)


def plan_residue(c: Correlation, tile: Tile, operands: OperandLayout, fusion: Fusion) -> Launch:
    """Plan ``residue_kernel``: the input gradient of 3x3 at stride 2."""
    above, pairs_h = pairs_of(c.output[0], c.top)
    before, pairs_w = pairs_of(c.output[1], c.left)
    columns = c.size[0] * pairs_w
    shared = correlation_arguments(c, tile, operands, fusion)
    packed_tiles = shared["packs"] * -(-columns // tile.pixels)
    rows = tiles.rows_in_chunk(pairs_h, packed_tiles, tile, operands.device)
    own = {
        "columns": columns,
        "rows": rows,
        "above": above,
        "pairs_h": pairs_h,
        "before": before,
        "pairs_w": pairs_w,
        "ACTIVATION": fusion.activation or "",
        "PRECISION": operands.precision,
    }
    weights = pack_arguments(c.inputs, c.outputs, tile) | weight_arguments(c, operands.second)
    programs = packed_tiles * -(-pairs_h // rows)
    return Launch.of(residue_kernel, programs, shared | own | weights, tile, fusion.absent)


def plan_taps(c: Correlation, tile: Tile, operands: OperandLayout, fusion: Fusion) -> Launch:
    """Plan ``taps_kernel``: any geometry."""
    columns = c.size[0] * c.output[0] * c.output[1]
    shared = correlation_arguments(c, tile, operands, fusion)
    own = {
        "columns": columns,
        "R": c.kernel[0],
        "S": c.kernel[1],
        **pair_arguments("STEP", c.step),
        **pair_arguments("DIVISOR", c.divisor),
        **pair_arguments("TAP", c.dilation),
        "ACTIVATION": fusion.activation or "",
        "PROLOGUE": fusion.prologue,
        "PRECISION": operands.precision,
    }
    weights = pack_arguments(c.inputs, c.outputs, tile) | weight_arguments(c, operands.second)
    programs = shared["packs"] * tiles.blocks_of(tile, c.outputs) * -(-columns // tile.pixels)
    return Launch.of(taps_kernel, programs, shared | own | weights, tile, fusion.absent)


def plan_strips_weight(
    geometry: ConvGeometry, tile: Tile, operands: OperandLayout, fusion: Fusion, bytes_a_split: int
) -> tuple[Launch, int]:
    """Plan ``strips_weight_kernel``: 3x3 at stride 1 or 2. Return the launch and the number of splits."""
    cg, kg = geometry.channels_per_group
    programs = tiles.programs_a_split(tile, geometry.groups, cg, kg)
    walk = Walk.of_weights(geometry, tile, programs, bytes_a_split, operands.device)
    own = {
        "STRIDE": geometry.stride[0],
        "PROLOGUE": fusion.prologue,
        "PRECISION": operands.precision,
        "BLOCK": tiles.side_of_blocks(tile),
    }
    shared = weight_grad_arguments(geometry, tile, operands, fusion) | pack_arguments(cg, kg, tile)
    arguments, splits = shared | own | walk_arguments(walk, tile), walk.parts * walk.splits
    return Launch.of(strips_weight_kernel, programs * splits, arguments, tile, _no_norm(fusion)), splits


def plan_slide_weight(
    geometry: ConvGeometry, tile: Tile, operands: OperandLayout, fusion: Fusion, bytes_a_split: int
) -> tuple[Launch, int]:
    """Plan ``slide_weight_kernel``: 3x3, vertical stride 1 or 2. Return the launch and the splits."""
    cg, kg = geometry.channels_per_group
    n, _, p, q = geometry.output_size
    programs = tiles.programs_a_split(tile, geometry.groups, cg, kg)
    all_rows = -(-n * q // tile.pixels) * p
    rows, splits = tiles.rows_of_split(all_rows, programs, bytes_a_split, tile, operands.device)
    own = {
        "columns": n * q,
        "rows": rows,
        "step_w": geometry.stride[1],
        "tap_w": geometry.dilation[1],
        "STRIDE": geometry.stride[0],
        "PROLOGUE": fusion.prologue,
        "PRECISION": operands.precision,
    }
    shared = weight_grad_arguments(geometry, tile, operands, fusion) | pack_arguments(cg, kg, tile)
    return Launch.of(slide_weight_kernel, programs * splits, shared | own, tile, _no_norm(fusion)), splits


def plan_taps_weight(
    geometry: ConvGeometry, tile: Tile, operands: OperandLayout, fusion: Fusion, bytes_a_split: int
) -> tuple[Launch, int]:
    """Plan ``taps_weight_kernel``: any geometry. Return the launch and the number of splits."""
    cg, kg = geometry.channels_per_group
    n, _, p, q = geometry.output_size
    _, _, r, s = geometry.weight_size
    programs = tiles.programs_a_split(tile, geometry.groups, cg, kg) * r * s
    items = -(-n * p * q // tile.pixels)
    splits = tiles.splits_of(items, programs, bytes_a_split, tile, operands.device)
    own = {
        "columns": n * p * q,
        "splits": splits,
        "R": r,
        "S": s,
        **pair_arguments("STEP", geometry.stride),
        **pair_arguments("TAP", geometry.dilation),
        "PROLOGUE": fusion.prologue,
        "PRECISION": operands.precision,
    }
    shared = weight_grad_arguments(geometry, tile, operands, fusion) | pack_arguments(cg, kg, tile)
    return Launch.of(taps_weight_kernel, programs * splits, shared | own, tile, _no_norm(fusion)), splits


@lru_cache(PLANS_KEPT)
def plan_pack(
    geometry: ConvGeometry, transposed: bool, strides: tuple[int, ...], tile: Tile
) -> tuple[Launch, int]:
    """Plan how weights of ``strides`` are packed. Return the launch and the size of the packed weights."""
    c = Correlation.of("input_grad" if transposed else "forward", geometry)
    values = weight_arguments(c, strides) | pack_arguments(c.inputs, c.outputs, tile)
    values |= {"groups": c.groups, "BO": tile.outputs}
    programs = -(-c.groups // tile.groups) * tiles.blocks_of(tile, c.outputs) * 9
    return Launch.of(pack_kernel, programs, values, PACKING), programs * tile.inputs * tile.outputs


def _no_norm(fusion: Fusion) -> tuple[str, ...]:
    """Return the names of the tensors that weight gradient kernels get None for."""
    return () if fusion.prologue else ("p_norm",)


CORRELATIONS = {
    "strips": plan_strips,
    "pairs": plan_pairs,
    "slide": plan_slide,
    "residue": plan_residue,
    "taps": plan_taps,
    "depthwise-slide": plan_depthwise,
    "depthwise-blocks": plan_depthwise_blocks,
    "depthwise": plan_depthwise,
}
WEIGHT_SUMS = {
    "strips": plan_strips_weight,
    "slide": plan_slide_weight,
    "taps": plan_taps_weight,
    "depthwise-slide": plan_depthwise_weight,
    "depthwise": plan_depthwise_weight,
}
