"""Choose the tiles that are worth measuring for a pass: the tile of the rules, and tiles near it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch

from gconv.geometry import ConvGeometry
from gconv.kernels import rules, tiles
from gconv.kernels.correlation import Correlation
from gconv.kernels.device import Device
from gconv.kernels.tiles import Tile

SPLITS = (0.5, 1, 2)  # numbers of programs to try, relative to that of the tile
SUMS_A_THREAD = {"slide": 32, "residue": 32, "taps": 64}  # accumulators per thread; more would spill
STRIPS_A_WARP = 4  # columns times packs, each of which needs registers
PACKS_ON_WARPS = ((1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4), (8, 8))
LEAST_A_THREAD = 4  # elements of a tile per thread; with fewer, a program has more threads than work


def candidates(
    pass_: str, geometry: ConvGeometry, dtype: torch.dtype, precision: str, device: Device
) -> list[Tile]:
    """Return the tiles to measure for a pass.

    Args:
        pass_: "forward", "input_grad" or "weight_grad".
        geometry: the convolution's sizes and settings.
        dtype: dtype of the tensors.
        precision: how float32 is multiplied, "tf32" or "ieee".
        device: the GPU to tune for.

    Returns:
        Distinct tiles. The first is the one that the rules choose.
    """
    rule = rules.tile_by_rule(pass_, geometry, dtype, precision, device)
    return list(dict.fromkeys([rule, *_around(rule, pass_, geometry, dtype, precision, device)]))


def splits(tile: Tile) -> list[Tile]:
    """Return ``tile`` with its work split among fewer, the same number of, and more programs."""
    return [replace(tile, resident=max(1, round(tile.resident * times))) for times in SPLITS]


def _around(
    rule: Tile, pass_: str, geometry: ConvGeometry, dtype: torch.dtype, precision: str, device: Device
) -> Iterator[Tile]:
    """Yield tiles near ``rule``, and tiles of other kernels that could be faster."""
    if rule.depthwise:
        yield from _depthwise(rule, pass_, geometry, device)
        return
    inputs, outputs = geometry.channels_per_group
    if pass_ == "input_grad":
        inputs, outputs = outputs, inputs
    if rule.kernel in ("strips", "pairs"):
        yield from _weight_strips(rule, geometry) if pass_ == "weight_grad" else _strips(rule)
        if max(inputs, outputs) <= tiles.SLIDE_LANES:
            yield _older(rule, pass_, geometry, dtype, device)
        make = rules.taps_weight_tile if pass_ == "weight_grad" else rules.taps_tile
        yield make(inputs, outputs, dtype, precision, device)
    elif rule.kernel in ("slide", "residue"):
        yield from _in_flight(rule, device, 2, 4)
        if pass_ == "weight_grad":
            yield from _slide_weight(rule, inputs, outputs, geometry.groups)
            yield rules.taps_weight_tile(inputs, outputs, dtype, precision, device)
        else:
            yield from _slide(rule, inputs, outputs, geometry.groups, device)
            yield rules.taps_tile(inputs, outputs, dtype, precision, device)
    elif tiles.uses_tensor_cores(dtype, precision, device):
        yield from _taps(rule, pass_, dtype)


def _strips(rule: Tile) -> Iterator[Tile]:
    """Yield strips with other widths, other numbers of packs, and other numbers of rows in flight."""
    narrow = max(rule.inputs, rule.outputs) <= tiles.LANES
    least, most = rule.packs // 2, rule.packs  # fewer move too few bytes of a pixel together
    together = [shape for shape in PACKS_ON_WARPS if least <= shape[0] <= most] if narrow else []
    widths = (1, 2, 4) if together else (1, 2, 3, 4)
    for (packs, warps), columns in product(together or [(rule.packs, rule.warps)], widths):
        if columns * packs // warps <= STRIPS_A_WARP:
            for stages in (3, 4, 2):
                resident = max(1, 8 // warps)
                yield replace(
                    rule, columns=columns, packs=packs, warps=warps, stages=stages, resident=resident
                )
    if rule.packs == 1 and max(rule.inputs, rule.outputs) <= tiles.SLIDE_LANES:
        for columns in (1, 2):
            yield replace(rule, pixels=2 * rule.pixels, columns=columns)


def _weight_strips(rule: Tile, geometry: ConvGeometry) -> Iterator[Tile]:
    """Yield weight gradients with a warp for each block of sums, and with 32 x 32 sums as one product."""
    blocks = rule.inputs * rule.outputs // tiles.LANES**2
    least = rule.packs // 2  # fewer move too few bytes of a pixel together
    shapes = [(packs, packs * blocks) for packs in (1, 2, 4, 8) if least <= packs and packs * blocks <= 8]
    if blocks == 4:
        shapes.append((1, 2))
    for (packs, warps), columns, stages in product(shapes, (1, 2, 4), (3, 4, 2)):
        resident = max(1, 8 // warps)
        tile = replace(rule, columns=columns, packs=packs, warps=warps, stages=stages, resident=resident)
        if tile == tiles.with_whole_packs(tile, geometry.groups, *geometry.channels_per_group):
            yield tile
    if rule.packs == 1:
        for columns in (1, 2):
            yield replace(rule, pixels=2 * rule.pixels, columns=columns)


def _older(rule: Tile, pass_: str, geometry: ConvGeometry, dtype: torch.dtype, device: Device) -> Tile:
    """Return the tile of the kernel that strips and pairs replaced."""
    if pass_ == "weight_grad":
        return rules.slide_weight_tile(*geometry.channels_per_group, geometry.stride[0], dtype, device)
    kernel = "residue" if rule.kernel == "pairs" else "slide"
    return rules.slide_tile(kernel, Correlation.of(pass_, geometry), dtype, device)


def _in_flight(rule: Tile, device: Device, *stages: int) -> list[Tile]:
    """Return ``rule`` with each number of rows in shared memory.

    Loads through registers aren't tried on NVIDIA GPUs: they were the slowest on an H200.
    """
    return [rule] if device.kind == "hip" else [replace(rule, stages=s) for s in stages]


def _slide(rule: Tile, inputs: int, outputs: int, groups: int, device: Device) -> Iterator[Tile]:
    """Yield tiles with other heights, more warps, and packs of twice as many groups."""
    for pack in _packs(rule.groups, max(inputs, outputs), groups):
        side_i, side_o = (tiles.lanes(pack * side, tiles.SLIDE_LANES) for side in (inputs, outputs))
        for pixels, warps, registers in product(
            (32, 64, 128), (1, 2, 4), (None, tiles.all_registers(device))
        ):
            if LEAST_A_THREAD <= pixels * side_o / (32 * warps) <= SUMS_A_THREAD[rule.kernel]:
                tile = replace(rule, groups=pack, pixels=pixels, inputs=side_i, outputs=side_o)
                yield replace(tile, warps=warps, registers=registers)


def _slide_weight(rule: Tile, inputs: int, outputs: int, groups: int) -> Iterator[Tile]:
    """Yield tiles with other heights and numbers of warps, and with sums of twice as many outputs."""
    for pack in _packs(rule.groups, max(inputs, outputs), groups):
        side_o = tiles.lanes(pack * outputs, tiles.SLIDE_LANES)
        for pixels, warps, wide in product((16, 32, 64), (1, 2, 4), (16, 32)):
            if wide <= side_o and wide * tiles.LANES / (32 * warps) in (4, 8):  # for each of nine sums
                yield replace(rule, groups=pack, pixels=pixels, outputs=wide, warps=warps)


def _taps(rule: Tile, pass_: str, dtype: torch.dtype) -> Iterator[Tile]:
    """Yield the usual tile sizes of a matrix product, up to the width of the group."""
    most = 128 if dtype.itemsize == 2 else 64
    sides = [side for side in (16, 32, 64, 128) if side <= most]
    heights = (32, 64) if pass_ == "weight_grad" else (64, 128)
    for pixels, side_i, side_o, warps in product(heights, sides, sides, (4, 8)):
        fits = side_i <= 2 * rule.inputs and side_o <= 2 * rule.outputs
        numbers = side_i * side_o if pass_ == "weight_grad" else pixels * side_o
        if fits and 8 <= numbers / (32 * warps) <= SUMS_A_THREAD["taps"]:
            yield replace(rule, pixels=pixels, inputs=side_i, outputs=side_o, warps=warps, stages=3)


def _depthwise(rule: Tile, pass_: str, geometry: ConvGeometry, device: Device) -> Iterator[Tile]:
    """Yield tiles with other heights and widths, with as many elements per thread as ``rule`` or half."""
    if rule.kernel == "depthwise-blocks":
        yield from _depthwise_blocks(rule, pass_, geometry)
        return
    a_thread = rule.pixels * rule.outputs // (32 * rule.warps)
    widest = tiles.power_of_two(geometry.groups)
    for pixels, channels, warps in product((1, 2, 4, 8, 16, 32), (16, 32, 64, 128), (1, 2, 4, 8)):
        numbers = pixels * channels // (32 * warps)
        if channels <= max(widest, 16) and max(1, a_thread // 2) <= numbers <= a_thread:
            yield replace(rule, pixels=pixels, inputs=channels, outputs=channels, warps=warps)


def _depthwise_blocks(rule: Tile, pass_: str, geometry: ConvGeometry) -> Iterator[Tile]:
    """Yield blocks with other numbers of rows and columns of outputs, and of warps."""
    *_, height, width = geometry.output_size if pass_ == "forward" else geometry.input_size
    for rows, columns, warps in product((1, 4, 7, 8, 14, 16), (2, 4, 7, 8, 14, 16, 28, 32), (1, 2, 4, 8)):
        pixels = warps * 64 // rule.outputs
        if pixels and 24 <= rows * columns <= 32 and rows <= height and columns <= width:
            yield replace(rule, pixels=pixels, rows=rows, columns=columns, warps=warps)


def _packs(pack: int, widest: int, groups: int) -> list[int]:
    """Return the rule's pack, and one of twice as many groups if it fits in 32 lanes."""
    twice = 2 * pack
    return [pack, twice] if twice * widest <= tiles.SLIDE_LANES and twice <= groups else [pack]
