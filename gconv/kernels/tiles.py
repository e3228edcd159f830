"""What a kernel works in: tiles, how channels fill them, and how the work is shared among programs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from gconv.kernels.device import Device

LANES = 16  # the least inner length of a product of 16-bit tiles on tensor cores
SLIDE_LANES = 32  # from here up nine weight tiles no longer fit the registers of one warp or two
WORKSPACE = 32 * 2**20  # bytes that the weight gradient's partial sums may take
WIDEST = 16  # bytes of a load


@dataclass(frozen=True, slots=True)
class Tile:
    """A kernel's tile.

    Args:
        kernel: "strips", "pairs", "slide", "residue", "taps", "depthwise-slide", "depthwise-blocks" or
            "depthwise".
        groups: groups in a pack, which share a tile.
        pixels, inputs, outputs: the tile's sides, powers of two; pixels are strips of ``columns`` each.
        warps: warps of a program.
        stages: tiles of a load that shared memory holds: one in use, the others on their way, which hides the
            memory's latency and costs no registers. 1: loads go through registers, when they are needed.
        registers: the most that a thread may use. Given, ptxas doesn't spill a few to fit one more program.
        resident: programs that a processor should have at least, for which work is split; about as many as it
            keeps at once.
        load: bytes of x that a thread loads at once, at most. On NVIDIA's GPUs copies of sixteen bytes to
            shared memory bypass L1; those of eight go through it, but take twice the instructions and
            conflict in its banks: on an H200 sixteen were faster for every kernel.
        columns: neighbouring columns of outputs in a strip, or pairs of columns.
        packs: packs that a program computes side by side.
        rows: rows of outputs that a program sums up at a time.
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
        """Whether its channels are groups of one."""
        return self.kernel.startswith("depthwise")

    @property
    def options(self) -> dict[str, int | bool]:
        """For Triton's compiler. ``maxnreg`` is known on NVIDIA's alone."""
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
    """Groups that share a tile: as many as its sixteen lanes hold, one where a group fills them."""
    return max(1, LANES // max(inputs, outputs))


def lanes(channels: int, most: int) -> int:
    """Lanes for ``channels`` channels: a power of two, sixteen at least."""
    return min(most, max(LANES, power_of_two(channels)))


def fills(tile: Tile, groups: int, inputs: int, outputs: int) -> bool:
    """Whether every lane of every tile is a channel, so that kernels need no masks along channels."""
    if tile.depthwise:
        return groups % tile.outputs == 0
    whole = tile.groups * inputs % tile.inputs == 0 and tile.groups * outputs % tile.outputs == 0
    return whole and groups % tile.groups == 0


def with_whole_packs(tile: Tile, groups: int, inputs: int, outputs: int) -> Tile:
    """``tile``, of fewer packs where they don't fill it: a tile of the nearest layer may hold more."""
    fill = tile.groups * inputs == tile.inputs and tile.groups * outputs == tile.outputs
    while tile.packs > 1 and not (fill and groups % (tile.groups * tile.packs) == 0):
        tile = replace(tile, packs=tile.packs // 2, warps=max(1, tile.warps // 2), resident=2 * tile.resident)
    return tile


def overlaps(tile: Tile, inputs: int, outputs: int) -> bool:
    """Whether blocks that a group's channels don't fill share lanes with others, instead of masking some."""
    return tile.kernel == "strips" and tile.groups == 1 and tile.inputs <= inputs and tile.outputs <= outputs


def packs_of(tile: Tile, groups: int) -> int:
    """How many times a program's channels fit ``groups`` groups, the last time perhaps not whole."""
    return -(-groups // (tile.outputs if tile.depthwise else tile.groups * tile.packs))


def blocks_of(tile: Tile, outputs: int) -> int:
    """How many blocks of a tile's outputs a pack has, of ``outputs`` channels in each group."""
    return -(-tile.groups * outputs // tile.outputs)


def programs_a_split(tile: Tile, groups: int, inputs: int, outputs: int) -> int:
    """Programs that the weight gradient takes for all channels: packs, by blocks of outputs and of inputs."""
    of_inputs = -(-tile.groups * inputs // tile.inputs)
    return packs_of(tile, groups) * blocks_of(tile, outputs) * of_inputs


def all_registers(device: Device) -> int | None:
    """The most registers of a thread, where the compiler can be told."""
    return 255 if device.kind == "cuda" else None


def common_unit(load: int, dtype: torch.dtype, *strides: int) -> int:
    """What divides all ``strides``, up to the numbers in ``load`` bytes.

    In such units kernels get them, which tells the compiler how loads align, and so how wide they are.
    """
    return math.gcd(load // dtype.itemsize, *strides)


def is_wide(tile: Tile, columns: int, images: tuple[int, ...], extents: tuple[int, ...]) -> bool:
    """Whether offsets within a tile may pass 2^31.

    Args:
        tile: whose pixels may be pairs of columns.
        columns: of an image.
        images: strides from one image to the next.
        extents: of an image along each axis.
    """
    in_groups = tile.kernel in ("strips", "pairs")  # of up to as many images as a tile has strips
    spanned = tile.pixels if in_groups else 2 * tile.pixels // columns + 2
    return max(spanned * max(images), *extents) >= 2**31


def power_of_two(number: int) -> int:
    """The least power of two that is no less than ``number``."""
    return 1 << (number - 1).bit_length()


def uses_tensor_cores(dtype: torch.dtype, precision: str, device: Device) -> bool:
    """Full float32 products run on AMD's matrix cores; on NVIDIA's multiply-add units they cost registers."""
    return dtype.itemsize == 2 or precision == "tf32" or device.kind == "hip"


def rows_in_chunk(rows: int, programs_a_chunk: int, tile: Tile, device: Device, reach: int = 3) -> int:
    """Output rows that a program slides over: all, unless that leaves processors idle.

    A chunk loads ``reach`` - 1 rows more than it has, so it has no fewer than these, and at least four.
    """
    chunks = -(-tile.resident * device.processors // programs_a_chunk)
    return max(min(rows, max(4, reach - 1)), -(-rows // chunks))


def rows_of_split(
    rows: int, programs_a_split: int, bytes_a_split: int, tile: Tile, device: Device
) -> tuple[int, int]:
    """How many of ``rows`` rows a program slides over, and how many splits that makes.

    Sharing rows evenly keeps processors from waiting for the last ones: as many programs as they hold at
    once, within the workspace. A program loads two rows more than it has, so it has at least four.
    """
    most = tile.resident * device.processors // programs_a_split
    splits = max(1, min(most, WORKSPACE // max(bytes_a_split, 1)))
    each = max(min(rows, 4), -(-rows // splits))
    return each, -(-rows // each)


def splits_of(items: int, programs_a_split: int, bytes_a_split: int, tile: Tile, device: Device) -> int:
    """Into how many partial sums the weight gradient splits ``items`` pieces of work.

    As many programs as the processors hold at once, within the workspace, each with about as many items: the
    rest of a second wave would leave most of them idle, and every split writes its sums.
    """
    wanted = tile.resident * device.processors // programs_a_split
    splits = max(1, min(items, wanted, WORKSPACE // bytes_a_split))
    return -(-items // -(-items // splits))
