"""Which geometries the strip kernels compute, and their tiles, by rule."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from gconv.geometry import ConvGeometry
from gconv.kernels.correlation import Correlation
from gconv.kernels.device import Device
from gconv.kernels.tiles import LANES, SLIDE_LANES, WORKSPACE, Tile, fills, groups_in_pack, lanes

STRIP_LANES = 128  # most inputs whose weights for eight outputs fit the registers of a warp
BLACKWELL = 100  # compute capability times ten
ROOMY = (80, 90, 100, 103)  # compute capabilities with more than 100 KiB of shared memory per processor


def narrowed(tile: Tile, groups: int, inputs: int, outputs: int) -> Tile:
    """Return ``tile`` with strips of half as many columns if channels are loaded one or two at a time.

    Such loads go through registers, or take more of them for addresses.
    """
    wide = groups * inputs % 4 == groups * outputs % 4 == 0
    return tile if wide else replace(tile, columns=max(1, tile.columns // 2))


def has_strips(correlation: Correlation, dtype: torch.dtype, precision: str, device: Device) -> bool:
    """Return whether the strips kernel computes a correlation: 3x3 on tensor cores, with equal steps."""
    c = correlation
    plain = c.kernel == (3, 3) and c.dilation == c.divisor == (1, 1) and c.step in ((1, 1), (2, 2))
    most = STRIP_LANES if c.step == (1, 1) else STRIP_LANES // 2  # two rows of x take more registers
    if dtype.itemsize == 4:
        most = SLIDE_LANES if precision == "tf32" else 0
    return plain and max(c.inputs, c.outputs) <= most and device.kind != "hip"


def strip_tile(correlation: Correlation, dtype: torch.dtype, device: Device) -> Tile:
    """Return the tile of the strips kernel."""
    c = correlation
    return narrowed(full_strip_tile(c, dtype, device), c.groups, c.inputs, c.outputs)


def full_strip_tile(correlation: Correlation, dtype: torch.dtype, device: Device) -> Tile:
    """Return the tile for wide loads: in 16 bits eight packs of sixteen lanes, or 32 lanes on two warps.

    A pack has a warp, whose registers then hold strips of four columns. At stride 2, strips of one column
    with two packs on each warp reached 96% of the memory floor on an H200.
    """
    c = correlation
    if max(c.inputs, c.outputs) > SLIDE_LANES:
        return wide_strip_tile(c)
    groups = groups_in_pack(c.inputs, c.outputs)
    inputs, outputs = lanes(groups * c.inputs, SLIDE_LANES), lanes(groups * c.outputs, SLIDE_LANES)
    slow, wide = c.step == (2, 2), max(inputs, outputs) > LANES
    tile = Tile(
        "strips", groups, 16, inputs, outputs, outputs // LANES, stages=2 if slow else 3, registers=255
    )
    if dtype.itemsize == 4:
        tile = replace(tile, columns=min(2 if wide or slow else 3, c.output[1]))
        if wide:
            return replace(tile, warps=4, columns=1 if slow else tile.columns, resident=2)
        return with_packs(tile, c.groups, c.inputs, c.outputs, most=4)
    columns = 1 if slow else 4
    tile = replace(tile, columns=min(columns, c.output[1]))
    if wide:
        return replace(tile, resident=6 if slow else 4)
    tile = with_packs(tile, c.groups, c.inputs, c.outputs, most=8, a_warp=2 if slow else 1)
    if tile.packs > 2 and (not slow or device.capability in ROOMY):
        tile = replace(tile, stages=tile.stages + 1)
    return replace(tile, resident=13 if slow else 10) if tile.packs == 1 else tile


def wide_strip_tile(correlation: Correlation) -> Tile:
    """Return a tile of up to 64 outputs and all inputs of a group, on as many warps as hold the weights.

    A thread keeps 144 registers of weights: those of a warp's sixteen outputs for up to 64 inputs, or of
    eight outputs for more. The warps of a program share the rows of x, so there are as many as the outputs
    need.
    """
    c = correlation
    inputs, outputs = lanes(c.inputs, STRIP_LANES), lanes(c.outputs, 64)
    warps = outputs // (LANES if inputs <= 64 else 8)
    columns, stages = (min(2, c.output[1]), 3) if c.step == (1, 1) else (1, 2)
    tile = Tile("strips", 1, 16, inputs, outputs, warps, stages, registers=255, columns=columns)
    return replace(tile, resident=8 // warps)


def has_weight_strips(geometry: ConvGeometry, dtype: torch.dtype, precision: str, device: Device) -> bool:
    """Return whether strips compute the weight gradient.

    Each tile of strips in a row of an image stores its own sums, and these must fit the workspace.
    """
    if dtype.itemsize == 4 and geometry.stride == (2, 2):
        return False
    if -(-geometry.output_size[3] // LANES) * 4 * math.prod(geometry.weight_size) > WORKSPACE:
        return False
    return has_strips(Correlation.forward(geometry), dtype, precision, device)


def strip_weight_tile(geometry: ConvGeometry, dtype: torch.dtype, device: Device, norm: bool = False) -> Tile:
    """Return a tile with nine sums [outputs, inputs] in registers: four packs of sixteen lanes, or 32 lanes.

    Each block of 16 x 16 sums has a warp, whose registers then hold strips of four columns, or of two if a
    row of dy meets two rows of x or the type has 32 bits (with batch norm, of one).

    Warps whose blocks have the same outputs lay out the same dy, and with the same inputs the same x, which
    takes time of the tensor cores. So a tile of 32 x 32 in 16 bits is one block on two warps, if their
    registers suffice: not with batch norm, nor at stride 2 on Blackwell, where the same code needs more.
    """
    cg, kg = geometry.channels_per_group
    groups, slow, tf32 = groups_in_pack(cg, kg), geometry.stride == (2, 2), dtype.itemsize == 4
    inputs, outputs = lanes(groups * cg, SLIDE_LANES), lanes(groups * kg, SLIDE_LANES)
    blocks = inputs * outputs // LANES**2
    tile = Tile("strips", groups, 16, inputs, outputs, blocks, stages=3, registers=255)
    if blocks == 4 and not (tf32 or norm or (slow and device.capability >= BLACKWELL)):
        tile = replace(tile, warps=2, stages=4, columns=1 if slow else 2, resident=4)
    else:
        tile = with_packs(tile, geometry.groups, cg, kg, most=4 if blocks == 1 else 2)
        columns = 1 if tf32 and norm else 2 if slow or tf32 else 4
        stages = 2 if (slow or tf32) and device.capability not in ROOMY else 3
        tile = replace(tile, columns=columns, stages=stages)
    tile = replace(tile, columns=min(tile.columns, geometry.output_size[3]))
    return narrowed(tile, geometry.groups, cg, kg)


def has_pairs(correlation: Correlation, dtype: torch.dtype, device: Device) -> bool:
    """Return whether the pairs kernel computes a correlation: 16-bit input gradients of 3x3 at stride 2."""
    c = correlation
    plain = c.kernel == (3, 3) and c.dilation == (1, 1) and c.divisor == (2, 2)
    return plain and max(c.inputs, c.outputs) <= STRIP_LANES and dtype.itemsize == 2 and device.kind != "hip"


def pair_tile(correlation: Correlation) -> Tile:
    """Return the tile of the pairs kernel: eight packs of sixteen lanes on four warps, or 32 lanes on two.

    Strips are as wide as the registers allow. Odd numbers of channels are loaded one by one, through
    registers.
    """
    c = correlation
    if max(c.inputs, c.outputs) > SLIDE_LANES:
        inputs = lanes(c.inputs, STRIP_LANES)
        return Tile("pairs", 1, 16, inputs, SLIDE_LANES, warps=4, stages=2, registers=255, resident=2)
    groups = groups_in_pack(c.inputs, c.outputs)
    inputs, outputs = lanes(groups * c.inputs, SLIDE_LANES), lanes(groups * c.outputs, SLIDE_LANES)
    tile = Tile("pairs", groups, 16, inputs, outputs, outputs // LANES, stages=3, registers=255)
    wide, pairs = max(inputs, outputs) > LANES, -(-c.output[1] // 2)
    if not wide and (packed := with_packs(tile, c.groups, c.inputs, c.outputs, most=8, a_warp=2)).packs > 1:
        return replace(packed, columns=min(2, pairs))
    columns = 1 if c.groups * c.inputs % 2 or c.groups * c.outputs % 2 else 4
    return replace(tile, columns=min(columns, pairs), resident=4 if wide else 8)


def bias_pair_tile(tile: Tile) -> Tile:
    """Return ``tile`` of the pairs kernel for a bias; on Blackwell the widest tiles lack registers for it."""
    return tile if tile.inputs <= 64 else replace(tile, warps=2 * tile.warps, resident=1)


def norm_strip_tile(tile: Tile, correlation: Correlation, device: Device) -> Tile:
    """Return ``tile`` of the strips kernel for batch norm: four packs on four warps, or 32 lanes on two.

    One more row in flight saved a fifth to a third of the time on an H200.
    """
    c = correlation
    slow, wide = c.step == (2, 2), max(tile.inputs, tile.outputs) > LANES
    if not wide:
        tile = with_packs(replace(tile, warps=1), c.groups, c.inputs, c.outputs, most=4)
    # GPUs with 100 KiB get less: on sm_120 wide strips also lack registers.
    columns = 1 if slow and wide else 2 if slow or wide or device.capability not in ROOMY else 4
    tile = replace(tile, columns=min(columns, c.output[1]), stages=3, resident=8 // tile.warps)
    return narrowed(tile, c.groups, c.inputs, c.outputs)


def norm_pair_tile(tile: Tile, correlation: Correlation) -> Tile:
    """Return ``tile`` of the pairs kernel for batch norm: narrow, to save registers, a pack on each warp.

    With 32 lanes, if channels are masked or there are more inputs than outputs, it uses twice the warps,
    whose copies are 8 bytes wide.
    """
    c = correlation
    if max(tile.inputs, tile.outputs) > LANES:
        full = fills(tile, c.groups, c.inputs, c.outputs)
        warps = tile.warps if full and tile.inputs <= tile.outputs else 2 * tile.warps
        return replace(tile, columns=1, warps=warps, stages=2, resident=8 // warps)
    return with_packs(replace(tile, columns=1, warps=1), c.groups, c.inputs, c.outputs, most=4)


def with_packs(tile: Tile, groups: int, inputs: int, outputs: int, most: int, a_warp: int = 1) -> Tile:
    """Return ``tile`` with as many packs, up to ``most``, as the groups fill, and ``a_warp`` packs per warp.

    What counts is how many bytes of a pixel a program moves together. On an H200, as a fraction of the speed
    of a whole copy, reads in pieces of 32 bytes reach 62 to 69%, of 64 bytes 67 to 83%, of 128 bytes 100%;
    copies in pieces of 64 bytes 72 to 81%, of 128 bytes 85%, of 256 bytes 90%. Programs that complete each
    other's pieces drift apart, and then memory serves each piece separately.
    """
    fill = tile.groups * inputs == tile.inputs and tile.groups * outputs == tile.outputs
    packs = math.gcd(most, groups // tile.groups) if fill and groups % tile.groups == 0 else 1
    warps = max(tile.warps, tile.warps * packs // a_warp)
    return replace(tile, packs=packs, warps=warps, resident=max(1, 8 // warps))
