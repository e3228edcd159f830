"""Tiles: what a kernel works in, how channels fill a tile, and how programs share the work."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from gconv.kernels.device import Device

LANES = 16  # the smallest inner dimension of a product of 16-bit tiles on tensor cores
SLIDE_LANES = 32  # nine weight tiles that are wider don't fit the registers of one warp or two
WORKSPACE = 32 * 2**20  # most bytes for the weight gradient's partial sums
WIDEST = 16  # bytes of the widest load


@dataclass(frozen=True, slots=True)
class Tile:
    """A kernel's tile.

    Args:
        kernel: "strips", "pairs", "slide", "residue", "taps", "depthwise-slide", "depthwise-blocks" or
            "depthwise".
        groups: number of groups in a pack. A pack shares a tile.
        pixels, inputs, outputs: the tile's sides, powers of two. A pixel is a strip of ``columns`` columns.
        warps: number of warps of a program.
        stages: number of tiles of a load that shared memory holds: one in use, the others in flight. This
            hides the memory's latency and costs no registers. 1: loads go through registers, when they are
            needed.
        registers: most registers that a thread may use. If set, ptxas doesn't spill a few to fit one more
            program.
        resident: number of programs per processor for which the work is split: about as many as it runs at a
            time.
        load: most bytes of x that a thread loads at a time. On NVIDIA GPUs, 16-byte copies to shared memory
            bypass L1. 8-byte copies go through L1, take twice the instructions and conflict in its banks: on
            an H200, 16 bytes were faster for every kernel.
        columns: number of adjacent columns of outputs, or pairs of columns, in a strip.
        packs: number of packs that a program computes side by side.
        rows: number of output rows that a program sums up at a time.
    """

    kernel: str
    groups: int
    pixels: int
    inputs: int
    outputs: int
    warps: int
    stages: int = 1
    registers: int | None = None
    resident: int = 8
    load: int = WIDEST
    columns: int = 1
    packs: int = 1
    rows: int = 1

    @property
    def depthwise(self) -> bool:
        """Whether each group has one channel."""
        return self.kernel.startswith("depthwise")

    @property
    def options(self) -> dict[str, int | bool]:
        """Options for Triton's compiler. Only NVIDIA GPUs have ``maxnreg``."""
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        return options if self.registers is None else options | {"maxnreg": self.registers}

    def __str__(self) -> str:
        lanes = f"{self.inputs}" if self.depthwise else f"{self.inputs} -> {self.outputs}"
        packed = f", {self.groups} groups a tile" if self.groups > 1 else ""
        packed += f", {self.packs} packs" if self.packs > 1 else ""
        sides = (self.pixels, *(side for side in (self.rows, self.columns) if side > 1))
        pixels = " x ".join(map(str, sides))
        warps = "1 warp" if self.warps == 1 else f"{self.warps} warps"
        stages = f", {self.stages} stages" if self.stages > 1 else ""
        return f"{self.kernel}, {pixels} pixels x {lanes} channels{packed}, {warps}{stages}"


def groups_in_pack(inputs: int, outputs: int) -> int:
    """Return how many groups share a tile: as many as fit its sixteen lanes, at least one."""
    return max(1, LANES // max(inputs, outputs))


def lanes(channels: int, most: int) -> int:
    """Return the number of lanes for ``channels`` channels: a power of two from sixteen to ``most``."""
    return min(most, max(LANES, power_of_two(channels)))


def fills(tile: Tile, groups: int, inputs: int, outputs: int) -> bool:
    """Return whether every lane of every tile is a channel, so that kernels need no masks along channels."""
    if tile.depthwise:
        return groups % tile.outputs == 0
    whole = tile.groups * inputs % tile.inputs == 0 and tile.groups * outputs % tile.outputs == 0
    return whole and groups % tile.groups == 0


def with_whole_packs(tile: Tile, groups: int, inputs: int, outputs: int) -> Tile:
    """Return ``tile`` with fewer packs if groups don't fill them: the nearest layer's tile may have more."""
    fill = tile.groups * inputs == tile.inputs and tile.groups * outputs == tile.outputs
    while tile.packs > 1 and not (fill and groups % (tile.groups * tile.packs) == 0):
        tile = replace(tile, packs=tile.packs // 2, warps=max(1, tile.warps // 2), resident=2 * tile.resident)
    return tile


def overlaps(tile: Tile, inputs: int, outputs: int) -> bool:
    """Return whether blocks that channels don't fill overlap other blocks instead of masking lanes."""
    return tile.kernel == "strips" and tile.groups == 1 and tile.inputs <= inputs and tile.outputs <= outputs


def side_of_blocks(tile: Tile) -> int:
    """Return the side of the blocks of a weight gradient's sums that are one product each.

    Sixteen, so that warps share the blocks. Only a single pack with fewer warps than blocks is one product
    on all warps.
    """
    blocks = tile.packs * tile.inputs * tile.outputs // LANES**2
    return LANES if tile.packs > 1 or tile.warps >= blocks else max(tile.inputs, tile.outputs)


def packs_of(tile: Tile, groups: int) -> int:
    """Return how many programs side by side cover ``groups`` groups. The last one may be partly empty."""
    return -(-groups // (tile.outputs if tile.depthwise else tile.groups * tile.packs))


def blocks_of(tile: Tile, outputs: int) -> int:
    """Return how many blocks of a tile's outputs a pack needs, for ``outputs`` channels in each group."""
    return -(-tile.groups * outputs // tile.outputs)


def programs_a_split(tile: Tile, groups: int, inputs: int, outputs: int) -> int:
    """Return how many programs a split of the weight gradient needs: one per pack, output and input block."""
    of_inputs = -(-tile.groups * inputs // tile.inputs)
    return packs_of(tile, groups) * blocks_of(tile, outputs) * of_inputs


def all_registers(device: Device) -> int | None:
    """Return the most registers a thread can have; None if the compiler has no such option."""
    return 255 if device.kind == "cuda" else None


def common_unit(load: int, dtype: torch.dtype, *strides: int) -> int:
    """Return the largest number that divides all ``strides``, up to the count of numbers in ``load`` bytes.

    Kernels get their strides in this unit. It tells the compiler how loads are aligned and how wide they can
    be.
    """
    return math.gcd(load // dtype.itemsize, *strides)


def is_wide(tile: Tile, columns: int, images: tuple[int, ...], extents: tuple[int, ...]) -> bool:
    """Return whether offsets within a tile may reach 2^31.

    Args:
        tile: the tile; its pixels may be pairs of columns.
        columns: number of columns in an image.
        images: strides from one image to the next.
        extents: extent of an image along each axis.
    """
    in_groups = tile.kernel in ("strips", "pairs")  # a group has at most as many images as a tile has strips
    spanned = tile.pixels if in_groups else 2 * tile.pixels // columns + 2
    return max(spanned * max(images), *extents) >= 2**31


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least ``number``."""
    return 1 << (number - 1).bit_length()


def uses_tensor_cores(dtype: torch.dtype, precision: str, device: Device) -> bool:
    """Return whether products run on tensor cores, or on AMD's matrix cores, which also do full float32.

    On NVIDIA GPUs, full float32 products run on multiply-add units, where they cost registers.
    """
    return dtype.itemsize == 2 or precision == "tf32" or device.kind == "hip"


def rows_in_chunk(rows: int, programs_a_chunk: int, tile: Tile, device: Device, reach: int = 3) -> int:
    """Return how many output rows a program slides over: all, unless that leaves processors idle.

    A chunk loads ``reach`` - 1 more rows than it has. So it has at least that many, and at least four.
    """
    chunks = -(-tile.resident * device.processors // programs_a_chunk)
    return max(min(rows, max(4, reach - 1)), -(-rows // chunks))


def rows_of_split(
    rows: int, programs_a_split: int, bytes_a_split: int, tile: Tile, device: Device
) -> tuple[int, int]:
    """Return how many of ``rows`` rows a program slides over, and the number of splits that result.

    The rows are shared evenly among as many programs as the processors hold at a time, within the workspace,
    so that processors don't wait for the last ones. A program loads two more rows than it has, so it has at
    least four.
    """
    most = tile.resident * device.processors // programs_a_split
    splits = max(1, min(most, WORKSPACE // max(bytes_a_split, 1)))
    each = max(min(rows, 4), -(-rows // splits))
    return each, -(-rows // each)


def splits_of(items: int, programs_a_split: int, bytes_a_split: int, tile: Tile, device: Device) -> int:
    """Return into how many partial sums the weight gradient splits ``items`` pieces of work.

    There are as many programs as the processors hold at a time, within the workspace, each with about as many
    items. A second, partial wave would leave most processors idle, and every split writes its sums.
    """
    wanted = tile.resident * device.processors // programs_a_split
    splits = max(1, min(items, wanted, WORKSPACE // bytes_a_split))
    return -(-items // -(-items // splits))
