"""Which geometries the kernels that slide strips compute, and in tiles of what size, by rule."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from gconv.geometry import ConvGeometry
from gconv.kernels.correlation import Correlation
from gconv.kernels.device import Device
from gconv.kernels.tiles import LANES, SLIDE_LANES, WORKSPACE, Tile, fills, groups_in_pack, lanes

STRIP_LANES = 128  # the most inputs whose weights for eight outputs fit the registers of a warp
BLACKWELL = 100  # its compute capability, times ten
ROOMY = (80, 90, 100, 103)  # compute capabilities with more than 100 KiB of shared memory a processor


def has_strips(correlation: Correlation, dtype: torch.dtype, precision: str, device: Device) -> bool:
    """Whether the strips kernel computes a correlation: 3x3 on tensor cores, the same step both ways."""
    c = correlation
    plain = c.kernel == (3, 3) and c.dilation == c.divisor == (1, 1) and c.step in ((1, 1), (2, 2))
    most = STRIP_LANES if c.step == (1, 1) else STRIP_LANES // 2  # two rows of x at once take registers
    if dtype.itemsize == 4:
        most = SLIDE_LANES if precision == "tf32" else 0
    return plain and max(c.inputs, c.outputs) <= most and device.kind != "hip"


def strip_tile(correlation: Correlation, dtype: torch.dtype, device: Device) -> Tile:
    """As measured on an H200 in 16 bits: eight packs of sixteen lanes on four warps, or 32 lanes on two.

    Two packs are what the registers of a warp hold, in TF32 one. With four rows in shared memory, at stride 2
    with three pairs of rows, eight packs take a fourth of what a GPU for servers has; elsewhere one less.
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
    if wide:
        columns, resident = (1, 6) if slow else (4, 4)
        return replace(tile, columns=min(columns, c.output[1]), resident=resident)
    tile = replace(tile, columns=min(1 if slow else 2, c.output[1]))
    tile = with_packs(tile, c.groups, c.inputs, c.outputs, most=8, a_warp=2)
    if tile.packs == 1:
        return replace(tile, resident=13)
    if tile.packs > 2:  # two programs of eight packs, in 100 KiB as well
        roomy = device.capability in ROOMY
        tile = replace(tile, stages=2 + roomy if slow else 3 + roomy)
    return tile


def wide_strip_tile(correlation: Correlation) -> Tile:
    """Blocks of up to 64 outputs, by all inputs of a group, on as many warps as hold the weights.

    A thread keeps 144 registers of weights: those of a warp's sixteen outputs for up to 64 inputs, of eight
    for more. The warps of a program share the rows of x, so they are as many as the outputs need.
    """
    c = correlation
    inputs, outputs = lanes(c.inputs, STRIP_LANES), lanes(c.outputs, 64)
    warps = outputs // (LANES if inputs <= 64 else 8)
    columns, stages = (min(2, c.output[1]), 3) if c.step == (1, 1) else (1, 2)
    tile = Tile("strips", 1, 16, inputs, outputs, warps, stages, registers=255, columns=columns)
    return replace(tile, resident=8 // warps)


def has_weight_strips(
    geometry: ConvGeometry, dtype: torch.dtype, precision: str, device: Device, norm: bool
) -> bool:
    """Whether strips compute the weight gradient: in TF32, and with batch norm, where the registers allow.

    And where the sums of the tiles that a row of an image takes fit the workspace: each leaves its own.
    """
    narrow = max(geometry.channels_per_group) <= LANES
    if dtype.itemsize == 4 and (geometry.stride == (2, 2) or not narrow):
        return False
    if norm and geometry.stride == (2, 2) and not narrow:
        return False
    if -(-geometry.output_size[3] // LANES) * 4 * math.prod(geometry.weight_size) > WORKSPACE:
        return False
    return has_strips(Correlation.forward(geometry), dtype, precision, device)


def strip_weight_tile(geometry: ConvGeometry, dtype: torch.dtype, device: Device, norm: bool = False) -> Tile:
    """Nine sums [outputs, inputs] in registers: of two packs of sixteen lanes on one warp, or 32 on two.

    In TF32 one pack has the bytes of two. With batch norm inside, its numbers and its arithmetic take the
    registers of the other. Two packs of one column were faster on an H200 than of two columns, whose pieces
    of 64 bytes lie further apart. On Blackwell the same code takes more registers, so strips are narrower.
    """
    cg, kg = geometry.channels_per_group
    groups = groups_in_pack(cg, kg)
    inputs, outputs = lanes(groups * cg, SLIDE_LANES), lanes(groups * kg, SLIDE_LANES)
    warps = max(inputs, outputs) // LANES
    tile = Tile("strips", groups, 16, inputs, outputs, warps, 3, registers=255, resident=8 // warps)
    even = groups * cg == groups * kg == LANES and geometry.groups % (2 * groups) == 0
    slow, packs, columns = geometry.stride == (2, 2), 1, 2
    if even and dtype.itemsize == 2 and not norm:
        packs, columns = 2, 1
    elif norm and warps == 2:
        columns = 1
    elif norm and dtype.itemsize == 2 and fills(tile, geometry.groups, cg, kg):
        columns = 4
    if slow:  # a row of dy meets two of x
        columns = max(1, columns // 2)
    if slow:
        tile = replace(tile, stages=2)
    blackwell = device.capability >= BLACKWELL
    if warps == 2 and not norm and not (slow and blackwell):
        tile = replace(tile, stages=4)
    if slow and blackwell:
        if packs == 2:
            packs, columns = 1, 2
        elif warps == 2 and min(cg, kg) < SLIDE_LANES:  # with masks
            tile, columns = replace(tile, inputs=LANES, outputs=LANES, warps=1, resident=8), 2
    return replace(tile, columns=min(columns, geometry.output_size[3]), packs=packs)


def has_pairs(correlation: Correlation, dtype: torch.dtype, device: Device) -> bool:
    """Whether the pairs kernel computes a correlation: the input gradient of 3x3 at stride 2, in 16 bits."""
    c = correlation
    plain = c.kernel == (3, 3) and c.dilation == (1, 1) and c.divisor == (2, 2)
    return plain and max(c.inputs, c.outputs) <= STRIP_LANES and dtype.itemsize == 2 and device.kind != "hip"


def pair_tile(correlation: Correlation) -> Tile:
    """Eight packs of sixteen lanes on four warps, or 32 lanes on two, as in strips; as wide as registers let.

    Odd numbers of channels are loaded one by one, through registers.
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
    """``tile`` of the pairs kernel with a bias, for which the widest lack the registers on Blackwell."""
    return tile if tile.inputs <= 64 else replace(tile, warps=2 * tile.warps, resident=1)


def norm_strip_tile(tile: Tile, pass_: str, correlation: Correlation) -> Tile:
    """``tile`` of the strips kernel with batch norm inside: a pack on each warp, for want of registers.

    One pack alone has wider strips, which load fewer columns twice. A row more on its way was worth a fifth
    to a third of the time on an H200.
    """
    c = correlation
    slow, wide = c.step == (2, 2), max(tile.inputs, tile.outputs) > LANES
    if not wide:
        tile = with_packs(replace(tile, warps=1), c.groups, c.inputs, c.outputs, most=4)
    columns = 1 if slow else 2
    if tile.packs == 1 and not wide:
        columns = 2 if slow or pass_ == "input_grad" else 3
    return replace(tile, columns=min(columns, c.output[1]), stages=3, resident=8 // tile.warps)


def norm_pair_tile(tile: Tile, correlation: Correlation) -> Tile:
    """Pairs with batch norm: narrow, for more registers; a pack on each warp.

    32 lanes with masks of their channels, or of more inputs than outputs, take twice the warps, whose copies
    are of 8 bytes.
    """
    c = correlation
    if max(tile.inputs, tile.outputs) > LANES:
        full = fills(tile, c.groups, c.inputs, c.outputs)
        warps = tile.warps if full and tile.inputs <= tile.outputs else 2 * tile.warps
        return replace(tile, columns=1, warps=warps, stages=2, resident=8 // warps)
    return with_packs(replace(tile, columns=1, warps=1), c.groups, c.inputs, c.outputs, most=4)


def with_packs(tile: Tile, groups: int, inputs: int, outputs: int, most: int, a_warp: int = 1) -> Tile:
    """``tile`` with as many packs, up to ``most``, as fill it, and ``a_warp`` of them on each warp.

    What counts is how many bytes of a pixel a program moves at once. Of the speed of a whole copy, on an H200
    reads in pieces of 32 bytes reach 62 to 69%, of 64 bytes 67 to 83%, of 128 bytes all; copies in pieces of
    64 bytes 72 to 81%, of 128 bytes 85%, of 256 bytes 90%. Programs that complete each other's pieces drift
    apart, and then memory serves each piece alone.
    """
    fill = tile.groups * inputs == tile.inputs and tile.groups * outputs == tile.outputs
    packs = math.gcd(most, groups // tile.groups) if fill and groups % tile.groups == 0 else 1
    warps = max(tile.warps, tile.warps * packs // a_warp)
    return replace(tile, packs=packs, warps=warps, resident=max(1, 8 // warps))
