"""Tiles by rule for depthwise kernels, and how many taps their programs take at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import torch

from gconv.geometry import ConvGeometry
from gconv.kernels.correlation import Correlation, stands_upright
from gconv.kernels.device import Device
from gconv.kernels.tiles import LANES, Tile, all_registers, power_of_two

DEPTHWISE_TAPS = 49  # 7x7: the registers of a thread hold this many weights, or sums, for two channels
UPRIGHT_TAPS = 4  # in a row that slides along its length; more sums can't move up in each turn
SUMS = 32  # outputs of a block that a thread holds, each for two channels
A_WARP = 64  # numbers of a tile for a warp: two for each thread
A_LOAD, A_WEIGHT = 5.5, 5  # instructions for two channels, in addition to two multiply-adds per product


def depthwise_lanes(groups: int) -> int:
    """Return a tile's channels: 64, or fewer if these divide the groups. Masked channels load one by one."""
    divisor = math.gcd(64, groups)
    return divisor if divisor >= LANES else min(64, power_of_two(groups))


def depthwise_tile(correlation: Correlation, device: Device) -> Tile:
    """Return a tile for multiply-adds. If it slides, it has few enough pixels for the weights of all taps."""
    c = correlation
    channels, taps = depthwise_lanes(c.groups), math.prod(c.kernel)
    if c.lies_flat and taps <= UPRIGHT_TAPS:
        return upright_tile(c.size[0], channels, 4)
    blocks = device.kind != "hip"  # the compiler for AMD takes minutes and 14 GB for a block's masked loads
    if blocks and c.step == c.dilation == c.divisor == (1, 1) and (taps > DEPTHWISE_TAPS or c.lies_flat):
        return blocks_tile(c, channels, device)
    slides = c.step[0] == c.dilation[0] == 1 and c.divisor == (1, 1)
    if slides and taps <= DEPTHWISE_TAPS:
        pixels = (1024 if taps <= 25 else 512) // channels
        return Tile("depthwise-slide", 1, pixels, channels, channels, warps=4)
    return Tile("depthwise", 1, 1024 // channels, channels, channels, warps=4)


def upright_tile(images: int, channels: int, a_thread: int) -> Tile:
    """Return the tile for rows that slide along their length; its pixels are images, perhaps few.

    Args:
        images: number of images.
        channels: channels of the tile.
        a_thread: most numbers of a thread, each with a sum for every tap.
    """
    warps = max(1, min(4, power_of_two(images) * channels // A_WARP))
    pixels = min(power_of_two(images), a_thread * 32 * warps // channels)
    return Tile("depthwise-slide", 1, max(1, pixels), channels, channels, warps, resident=4)


def blocks_tile(correlation: Correlation, channels: int, device: Device) -> Tile:
    """Return a tile with as many outputs as registers hold, in rows and columns that fill the image evenly.

    A kernel of one row or column doesn't reuse pixels across it.
    """
    c = correlation
    rows = evenly(c.output[0], 1 if c.kernel[0] == 1 else SUMS // 2 if c.kernel[1] == 1 else 8)
    columns = evenly(c.output[1], SUMS // rows)
    strips = c.size[0] * -(-c.output[1] // columns)
    pixels = max(1, min(power_of_two(strips), 4 * A_WARP // channels))
    tile = Tile("depthwise-blocks", 1, pixels, channels, channels, max(1, pixels * channels // A_WARP))
    return replace(tile, registers=all_registers(device), columns=columns, rows=rows, resident=2)


def evenly(length: int, most: int) -> int:
    """Return the length of the most even pieces of ``length``, none longer than ``most``."""
    return -(-length // -(-length // most))


def depthwise_weight_tile(geometry: ConvGeometry, device: Device) -> Tile:
    """Return the weight gradient's tile.

    If it slides, it has few enough pixels for the sums of a block of taps. Otherwise taps are its third axis.
    """
    taps = math.prod(geometry.weight_size[2:])
    registers, split = all_registers(device), {"warps": 4, "resident": 16}
    channels = depthwise_lanes(geometry.groups)
    if stands_upright(geometry):
        tile = upright_tile(geometry.input_size[0] * geometry.output_size[2], channels, 2)
        return replace(tile, registers=registers)
    if geometry.stride[0] == geometry.dilation[0] == 1:
        pixels = (512 if taps <= 25 else 256) // channels
        return Tile("depthwise-slide", 1, pixels, channels, channels, registers=registers, **split)
    channels = max(1, min(32, power_of_two(geometry.groups), 2048 // power_of_two(taps)))
    pixels = max(1, 2048 // channels // power_of_two(taps))
    return Tile("depthwise", 1, pixels, channels, channels, registers=registers, **split)


def tap_block(kernel: tuple[int, int], tile: Tile, dtype: torch.dtype) -> tuple[int, int]:
    """Return the block of taps (rows, columns) for a block of outputs that takes the fewest instructions."""

    def cost(block: tuple[int, int]) -> float:
        taps = math.prod(block)
        loads = (tile.rows + block[0] - 1) * (tile.columns + block[1] - 1)
        return 2 * taps * tile.rows * tile.columns + A_LOAD * loads + A_WEIGHT * taps

    return cheapest_block(kernel, cost, 26 if dtype.itemsize == 2 else 12)


def weight_tap_block(kernel: tuple[int, int], rows: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the block of taps that a program of the weight gradient sums: as many as fit its registers.

    A program holds a sum for each tap of the block, and as many rows of dy as the block has. For each row it
    loads a column of x for each column of the block, and one column of dy. It slides over the ``rows`` rows
    of dy, and over as many more as the block has. In float32, thirteen columns of x spill on Blackwell.
    """
    if math.prod(kernel) <= DEPTHWISE_TAPS and kernel[0] <= 7:
        return kernel
    widest = 12 if dtype.itemsize == 4 else kernel[1]

    def cost(block: tuple[int, int]) -> float:
        if math.prod(block) + block[0] > DEPTHWISE_TAPS + 7 or block[0] > LANES or block[1] > widest:
            return math.inf
        turns = -(-(rows + block[0] - 1) // block[0]) * block[0]
        return turns * (2 * math.prod(block) + A_LOAD * (block[1] + 1) + 2)

    return cheapest_block(kernel, cost, DEPTHWISE_TAPS)


def rows_in_turn(kernel: tuple[int, int], block: tuple[int, int]) -> int:
    """Return how many rows a turn of the weight gradient's loop takes: one, or all rows of a large block.

    With all rows in a turn, rows of dy don't move between registers, but the code is long.
    """
    return block[0] if block != kernel or block[0] > 7 else 1


def cheapest_block(
    kernel: tuple[int, int], cost: Callable[[tuple[int, int]], float], most: int
) -> tuple[int, int]:
    """Return the block of up to ``most`` taps that covers ``kernel`` at the least total ``cost``."""
    r, s = kernel
    blocks = [(br, bs) for br, bs in product(range(1, r + 1), range(1, s + 1)) if br * bs <= most]
    return min(blocks, key=lambda block: cost(block) * -(-r // block[0]) * -(-s // block[1]))
