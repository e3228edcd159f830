"""Choose the kernel and tile of a geometry by rule.

The rules are based on register counts, which ``python -m gconv kernels`` prints: they choose the largest tile
that keeps its weights and sums in registers and leaves enough of them for other programs, which hide the
latency of memory. On GPUs that were measured, the tables of ``choice.py`` take precedence.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from gconv.geometry import ConvGeometry
from gconv.kernels.correlation import Correlation
from gconv.kernels.depthwise_rules import depthwise_tile, depthwise_weight_tile
from gconv.kernels.device import Device
from gconv.kernels.strip_rules import (
    bias_pair_tile,
    has_pairs,
    has_strips,
    has_weight_strips,
    norm_pair_tile,
    norm_strip_tile,
    pair_tile,
    strip_tile,
    strip_weight_tile,
)
from gconv.kernels.tiles import (
    LANES,
    SLIDE_LANES,
    Tile,
    all_registers,
    groups_in_pack,
    lanes,
    uses_tensor_cores,
)


def tile_by_rule(
    pass_: str, geometry: ConvGeometry, dtype: torch.dtype, precision: str, device: Device
) -> Tile:
    """Return the tile of "forward", "input_grad" or "weight_grad"."""
    if pass_ == "weight_grad":
        return weight_grad_tile(geometry, dtype, precision, device)
    return correlation_tile(Correlation.of(pass_, geometry), dtype, precision, device)


def norm_tile(pass_: str, geometry: ConvGeometry, dtype: torch.dtype, precision: str, device: Device) -> Tile:
    """Return the tile for batch norm inside the kernel, which is smaller if batch norm needs the registers.

    Depthwise groups, and groups of more than 32 channels, run as matrix products: their own kernels don't
    support batch norm.
    """
    inputs, outputs = geometry.channels_per_group
    if inputs == outputs == 1 or max(inputs, outputs) > SLIDE_LANES:
        make = taps_weight_tile if pass_ == "weight_grad" else taps_tile
        sides = (outputs, inputs) if pass_ == "input_grad" else (inputs, outputs)
        return make(*sides, dtype, precision, device)
    if pass_ == "weight_grad":
        tile = weight_grad_tile(geometry, dtype, precision, device, norm=True)
        crowded = tile.kernel == "slide" and geometry.stride[0] == 2
        return replace(tile, stages=min(tile.stages, 2)) if crowded else tile
    correlation = Correlation.of(pass_, geometry)
    tile = correlation_tile(correlation, dtype, precision, device, norm=True)
    if tile.kernel == "strips":
        return norm_strip_tile(tile, correlation, device)
    if tile.kernel == "pairs":
        return norm_pair_tile(tile, correlation)
    if tile.kernel not in ("slide", "residue"):
        return tile
    if precision == "tf32" and tile.outputs > LANES:  # twice the bits, which don't fit the registers
        sides = (inputs, outputs) if pass_ == "forward" else (outputs, inputs)
        return taps_tile(*sides, dtype, precision, device)
    crowded = precision == "tf32" or tile.outputs > LANES or tile.kernel == "residue"
    registers = all_registers(device) if crowded else None
    if pass_ == "forward":  # limited by the prologue's instructions, and copying ahead adds more
        tile = replace(tile, stages=1)
    return replace(tile, pixels=tile.pixels // 2, warps=2, registers=registers)


def residual_tile(tile: Tile) -> Tile:
    """Return ``tile`` with registers left for a residual."""
    if tile.kernel == "residue":  # in TF32
        return replace(tile, pixels=tile.pixels // 2)
    if tile.kernel == "slide" and tile.warps == 1:
        return replace(tile, warps=2, registers=None)
    if tile.kernel == "strips":
        most = 4 if tile.inputs <= LANES else 2 if tile.inputs <= SLIDE_LANES else 1
        return replace(tile, columns=min(tile.columns, most))
    if tile.kernel == "pairs":
        return replace(bias_pair_tile(tile), columns=max(1, tile.columns // 2))
    return tile


def correlation_tile(
    correlation: Correlation, dtype: torch.dtype, precision: str, device: Device, norm: bool = False
) -> Tile:
    """Return the tile of a forward pass or an input gradient."""
    if correlation.inputs == correlation.outputs == 1:
        return depthwise_tile(correlation, device)
    slides = correlation.kernel == (3, 3) and correlation.dilation[0] == 1
    if has_strips(correlation, dtype, precision, device) and not (norm and dtype.itemsize == 4):
        return strip_tile(correlation, dtype, device)
    if has_pairs(correlation, dtype, device):
        return pair_tile(correlation)
    if fits_registers(correlation.inputs, correlation.outputs, dtype, precision, device) and slides:
        if correlation.divisor == (1, 1) and correlation.step[0] in (1, 2):
            return slide_tile("slide", correlation, dtype, device)
        if correlation.divisor == (2, 2) and correlation.dilation == (1, 1):
            return slide_tile("residue", correlation, dtype, device)
    return taps_tile(correlation.inputs, correlation.outputs, dtype, precision, device)


def weight_grad_tile(
    geometry: ConvGeometry, dtype: torch.dtype, precision: str, device: Device, norm: bool = False
) -> Tile:
    """Return the tile of the weight gradient. Its ``inputs`` and ``outputs`` are the sides of the sums."""
    cg, kg = geometry.channels_per_group
    if cg == kg == 1:
        return depthwise_weight_tile(geometry, device)
    if has_weight_strips(geometry, dtype, precision, device):
        return strip_weight_tile(geometry, dtype, device, norm)
    slides = geometry.weight_size[2:] == (3, 3) and geometry.stride[0] in (1, 2) and geometry.dilation[0] == 1
    if slides and fits_registers(cg, kg, dtype, precision, device):
        return slide_weight_tile(cg, kg, geometry.stride[0], dtype, device)
    return taps_weight_tile(cg, kg, dtype, precision, device)


def fits_registers(inputs: int, outputs: int, dtype: torch.dtype, precision: str, device: Device) -> bool:
    """Return whether the tiles of nine taps fit the registers, which kernels that slide over rows need."""
    return max(inputs, outputs) <= SLIDE_LANES and uses_tensor_cores(dtype, precision, device)


def slide_tile(kernel: str, correlation: Correlation, dtype: torch.dtype, device: Device) -> Tile:
    """Return a tile of one or two warps, so that Triton uses mma.sync, which beats wgmma on narrow tiles.

    Each warp reads the weights from shared memory for each row. Next to memory, this is what limits these
    kernels, so one warp is better than two if its registers suffice: for sixteen lanes of 16 bits.
    """
    inputs, outputs = correlation.inputs, correlation.outputs
    groups = groups_in_pack(inputs, outputs)
    side_i, side_o = lanes(groups * inputs, SLIDE_LANES), lanes(groups * outputs, SLIDE_LANES)
    narrow = max(side_i, side_o) == LANES
    tile = Tile(kernel, groups, 64 if narrow else 32, side_i, side_o, warps=2)
    if device.kind == "hip" or (dtype.itemsize == 4 and not narrow):
        return tile
    if dtype.itemsize == 4:  # a row has as many bytes as two rows of 16 bits
        return replace(tile, stages=2)
    if narrow and kernel == "slide" and correlation.step[0] == 1:
        tile = replace(tile, warps=1, registers=all_registers(device))
    return replace(tile, stages=3)


def taps_tile(inputs: int, outputs: int, dtype: torch.dtype, precision: str, device: Device) -> Tile:
    """Return the tile of a matrix product: as large as the group allows, smaller on multiply-add units."""
    groups = groups_in_pack(inputs, outputs)
    if not uses_tensor_cores(dtype, precision, device):
        return Tile("taps", groups, 64, LANES, lanes(groups * outputs, 32), warps=4, stages=2)
    side_i, side_o = lanes(groups * inputs, 64 // dtype.itemsize), lanes(groups * outputs, 64)
    return Tile("taps", groups, 64, side_i, side_o, warps=4, stages=2, registers=all_registers(device))


def slide_weight_tile(inputs: int, outputs: int, step: int, dtype: torch.dtype, device: Device) -> Tile:
    """Return a tile with nine sums [outputs, inputs] in the registers of one or two warps.

    A pack's blocks share rows in L2. At a step of 2, two rows of x are in registers, so the bias gradient's
    sums need a smaller tile.
    """
    groups = groups_in_pack(inputs, outputs)
    side_o = lanes(groups * outputs, 32)
    pixels, warps = 64 // dtype.itemsize, side_o // LANES
    if step == 2 and dtype.itemsize == 2 and side_o == LANES:
        pixels //= 2
    tile = Tile(
        "slide", groups, pixels, LANES, side_o, warps, registers=all_registers(device), resident=8 // warps
    )
    return tile if device.kind == "hip" else replace(tile, stages=3)


def taps_weight_tile(inputs: int, outputs: int, dtype: torch.dtype, precision: str, device: Device) -> Tile:
    """Return a tile with the sums of one tap, as large as the group allows."""
    groups = groups_in_pack(inputs, outputs)
    most = 64 if uses_tensor_cores(dtype, precision, device) else 32
    side_i, side_o = lanes(groups * inputs, most), lanes(groups * outputs, most)
    pixels = 128 // dtype.itemsize
    registers = all_registers(device)
    return Tile("taps", groups, pixels, side_i, side_o, warps=4, stages=2, registers=registers, resident=16)
