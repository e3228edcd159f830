"""Which kernel runs a geometry, and in tiles of what size, by rule.

The rules come from register counts, which ``python -m gconv.kernels`` prints: the largest tile that keeps its
weights and sums in registers, with enough of them left that other programs hide the latency of memory. Where
a GPU was measured, :mod:`~gconv.kernels.choice` knows better.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from gconv.geometry import ConvGeometry
from gconv.kernels.correlation import Correlation
from gconv.kernels.device import Device

LANES = 16  # the least inner length of a product of 16-bit tiles on tensor cores
SLIDE_LANES = 32  # from here up nine weight tiles no longer fit the registers of one warp or two
STRIP_LANES = 128  # the most inputs whose weights for eight outputs fit the registers of a warp
DEPTHWISE_TAPS = 49  # 7x7: as many weights, or sums, as the registers of a thread hold for two channels
WORKSPACE = 32 * 2**20  # bytes that the weight gradient's partial sums may take
WIDEST = 16  # bytes of a load
BLACKWELL = 100  # its compute capability, times ten


@dataclass(frozen=True, slots=True)
class Tile:
    """A kernel's tile.

    Args:
        kernel: "strips", "pairs", "slide", "residue", "taps", "depthwise-slide" or "depthwise".
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
        pixels = f"{self.pixels} x {self.columns}" if self.columns > 1 else f"{self.pixels}"
        warps = "1 warp" if self.warps == 1 else f"{self.warps} warps"
        stages = f", {self.stages} stages" if self.stages > 1 else ""
        return f"{self.kernel}, {pixels} pixels x {lanes} channels{packed}, {warps}{stages}"


def tile_by_rule(
    pass_: str, geometry: ConvGeometry, dtype: torch.dtype, precision: str, device: Device
) -> Tile:
    """The tile of "forward", "input_grad" or "weight_grad"."""
    if pass_ == "weight_grad":
        return weight_grad_tile(geometry, dtype, precision, device)
    make = Correlation.forward if pass_ == "forward" else Correlation.input_grad
    return correlation_tile(make(geometry), dtype, precision, device)


def norm_tile(pass_: str, geometry: ConvGeometry, dtype: torch.dtype, precision: str, device: Device) -> Tile:
    """The tile where batch norm runs inside the kernel: smaller, where that takes registers.

    Groups of one channel, and of more than 32, go as matrix products: their kernels know no batch norm.
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
    correlation = (Correlation.forward if pass_ == "forward" else Correlation.input_grad)(geometry)
    tile = correlation_tile(correlation, dtype, precision, device, norm=True)
    if tile.kernel == "strips":
        return norm_strip_tile(tile, pass_, correlation)
    if tile.kernel == "pairs":
        return norm_pair_tile(tile, fills(tile, geometry.groups, outputs, inputs))
    if tile.kernel not in ("slide", "residue"):
        return tile
    if precision == "tf32" and tile.outputs > LANES:  # twice the bits, which no registers are left for
        sides = (inputs, outputs) if pass_ == "forward" else (outputs, inputs)
        return taps_tile(*sides, dtype, precision, device)
    crowded = precision == "tf32" or tile.outputs > LANES or tile.kernel == "residue"
    registers = all_registers(device) if crowded else None
    if pass_ == "forward":  # its prologue's instructions are its limit, to which copying ahead adds
        tile = replace(tile, stages=1)
    return replace(tile, pixels=tile.pixels // 2, warps=2, registers=registers)


def correlation_tile(
    correlation: Correlation, dtype: torch.dtype, precision: str, device: Device, norm: bool = False
) -> Tile:
    """The tile of the forward pass, or of the input gradient."""
    if correlation.inputs == correlation.outputs == 1:
        return depthwise_tile(correlation)
    slides = correlation.kernel == (3, 3) and correlation.dilation[0] == 1
    if has_strips(correlation, dtype, precision, device) and not (norm and dtype.itemsize == 4):
        return strip_tile(correlation, dtype)
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
    """The tile of the weight gradient: ``inputs`` and ``outputs`` are the sides of its sums."""
    cg, kg = geometry.channels_per_group
    if cg == kg == 1:
        return depthwise_weight_tile(geometry, device)
    if has_weight_strips(geometry, dtype, precision, device, norm):
        return strip_weight_tile(geometry, dtype, device, norm)
    slides = geometry.weight_size[2:] == (3, 3) and geometry.stride[0] in (1, 2) and geometry.dilation[0] == 1
    if slides and fits_registers(cg, kg, dtype, precision, device):
        return slide_weight_tile(cg, kg, geometry.stride[0], dtype, device)
    return taps_weight_tile(cg, kg, dtype, precision, device)


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
    """``tile``, of one pack where packs don't fill it: a tile of the nearest layer may hold more."""
    fill = tile.groups * inputs == tile.inputs and tile.groups * outputs == tile.outputs
    whole = groups % (tile.groups * tile.packs) == 0
    return tile if tile.packs == 1 or (fill and whole) else replace(tile, packs=1)


def overlaps(tile: Tile, inputs: int, outputs: int) -> bool:
    """Whether blocks that a group's channels don't fill share lanes with others, instead of masking some."""
    return tile.kernel == "strips" and tile.groups == 1 and tile.inputs <= inputs and tile.outputs <= outputs


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
    return max((2 * tile.pixels // columns + 2) * max(images), *extents) >= 2**31


def power_of_two(number: int) -> int:
    """The least power of two that is no less than ``number``."""
    return 1 << (number - 1).bit_length()


def uses_tensor_cores(dtype: torch.dtype, precision: str, device: Device) -> bool:
    """Full float32 products run on AMD's matrix cores; on NVIDIA's multiply-add units they cost registers."""
    return dtype.itemsize == 2 or precision == "tf32" or device.kind == "hip"


def fits_registers(inputs: int, outputs: int, dtype: torch.dtype, precision: str, device: Device) -> bool:
    """Whether the nine taps' tiles stay in registers, as the kernels that slide over rows need it."""
    return max(inputs, outputs) <= SLIDE_LANES and uses_tensor_cores(dtype, precision, device)


def slide_tile(kernel: str, correlation: Correlation, dtype: torch.dtype, device: Device) -> Tile:
    """One warp or two, so that Triton keeps to mma.sync, which beats wgmma on tiles this narrow.

    Each warp reads the weights from shared memory for each row, which is what limits these kernels next to
    the memory. So one is better than two where it has the registers for it: for sixteen lanes of 16 bits.
    """
    inputs, outputs = correlation.inputs, correlation.outputs
    groups = groups_in_pack(inputs, outputs)
    side_i, side_o = lanes(groups * inputs, SLIDE_LANES), lanes(groups * outputs, SLIDE_LANES)
    narrow = max(side_i, side_o) == LANES
    tile = Tile(kernel, groups, 64 if narrow else 32, side_i, side_o, warps=2)
    if device.kind == "hip" or (dtype.itemsize == 4 and not narrow):
        return tile
    if dtype.itemsize == 4:  # a row of as many bytes as two of 16 bits
        return replace(tile, stages=2)
    one = {"warps": 1, "registers": all_registers(device)}
    alone = narrow and kernel == "slide" and correlation.step[0] == 1
    return replace(tile, stages=3, **(one if alone else {}))


def has_strips(correlation: Correlation, dtype: torch.dtype, precision: str, device: Device) -> bool:
    """Whether the strips kernel computes a correlation: 3x3 on tensor cores, the same step both ways."""
    c = correlation
    plain = c.kernel == (3, 3) and c.dilation == c.divisor == (1, 1) and c.step in ((1, 1), (2, 2))
    most = STRIP_LANES if c.step == (1, 1) else STRIP_LANES // 2  # two rows of x at once take registers
    if dtype.itemsize == 4:
        most = SLIDE_LANES if precision == "tf32" else 0
    return plain and max(c.inputs, c.outputs) <= most and device.kind != "hip"


def strip_tile(correlation: Correlation, dtype: torch.dtype) -> Tile:
    """As measured on an H200 in 16 bits: two packs of sixteen lanes on one warp, or 32 lanes on two.

    What limits is how many cache lines the loads and stores of a row touch in L1 and L2, so two packs move
    64 bytes of a pixel at once, as one of TF32 does; wider strips load fewer columns twice. Registers limit
    both.
    """
    c = correlation
    if max(c.inputs, c.outputs) > SLIDE_LANES:
        return wide_strip_tile(c)
    groups = groups_in_pack(c.inputs, c.outputs)
    inputs, outputs = lanes(groups * c.inputs, SLIDE_LANES), lanes(groups * c.outputs, SLIDE_LANES)
    stages = 3 if c.step == (1, 1) else 2
    tile = Tile("strips", groups, 16, inputs, outputs, outputs // LANES, stages, registers=255)
    if dtype.itemsize == 4:
        warps, columns = (4, 2) if max(inputs, outputs) > LANES else (1, 3)
        columns -= c.step == (2, 2)
        return replace(tile, warps=warps, columns=min(columns, c.output[1]), resident=8 // warps)
    if max(inputs, outputs) > LANES:
        columns, resident = (4, 4) if c.step == (1, 1) else (1, 6)
        return replace(tile, columns=min(columns, c.output[1]), resident=resident)
    columns = min(2, c.output[1]) if c.step == (1, 1) else 1
    if groups * c.inputs == groups * c.outputs == LANES and c.groups % (2 * groups) == 0:
        return replace(tile, columns=columns, packs=2, resident=8)
    return replace(tile, columns=columns, resident=13)


def has_weight_strips(
    geometry: ConvGeometry, dtype: torch.dtype, precision: str, device: Device, norm: bool
) -> bool:
    """Whether strips compute the weight gradient: in TF32, and with batch norm, where the registers allow."""
    narrow = max(geometry.channels_per_group) <= LANES
    if dtype.itemsize == 4 and (geometry.stride == (2, 2) or not narrow):
        return False
    if norm and geometry.stride == (2, 2) and not narrow:
        return False
    return has_strips(Correlation.forward(geometry), dtype, precision, device)


def strip_weight_tile(geometry: ConvGeometry, dtype: torch.dtype, device: Device, norm: bool = False) -> Tile:
    """Nine sums [outputs, inputs] in registers: of two packs of sixteen lanes on one warp, or 32 on two.

    In TF32 one pack has the bytes of two. With batch norm inside, its numbers and its arithmetic take the
    registers of the other. On Blackwell the same code takes some registers more, so strips are narrower.
    """
    cg, kg = geometry.channels_per_group
    groups = groups_in_pack(cg, kg)
    inputs, outputs = lanes(groups * cg, SLIDE_LANES), lanes(groups * kg, SLIDE_LANES)
    warps = max(inputs, outputs) // LANES
    tile = Tile("strips", groups, 16, inputs, outputs, warps, 3, registers=255, resident=8 // warps)
    even = groups * cg == groups * kg == LANES and geometry.groups % (2 * groups) == 0
    packs = 2 if even and dtype.itemsize == 2 and not norm else 1
    if norm and warps == 2:
        columns = 1
    elif norm and dtype.itemsize == 2 and fills(tile, geometry.groups, cg, kg):
        columns = 4
    else:
        columns = 2
    if geometry.stride == (2, 2):  # a row of dy meets two of x
        tile, columns = replace(tile, stages=2), max(1, columns // 2)
    if device.capability >= BLACKWELL:
        if packs == 2:
            packs, columns = (2, 1) if geometry.stride == (1, 1) else (1, 2)
        elif warps == 2 and geometry.stride == (2, 2) and min(cg, kg) < SLIDE_LANES:  # with masks
            tile, columns = replace(tile, inputs=LANES, outputs=LANES, warps=1, resident=8), 2
    return replace(tile, columns=min(columns, geometry.output_size[3]), packs=packs)


def has_pairs(correlation: Correlation, dtype: torch.dtype, device: Device) -> bool:
    """Whether the pairs kernel computes a correlation: the input gradient of 3x3 at stride 2, in 16 bits."""
    c = correlation
    plain = c.kernel == (3, 3) and c.dilation == (1, 1) and c.divisor == (2, 2)
    return plain and max(c.inputs, c.outputs) <= STRIP_LANES and dtype.itemsize == 2 and device.kind != "hip"


def pair_tile(correlation: Correlation) -> Tile:
    """Two packs of sixteen lanes on one warp, or 32 lanes on two, as in strips; as wide as registers let.

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
    if groups * c.inputs == groups * c.outputs == LANES and c.groups % (2 * groups) == 0:
        return replace(tile, columns=min(2, pairs), packs=2, resident=8)
    columns = 1 if c.groups * c.inputs % 2 or c.groups * c.outputs % 2 else 4
    return replace(tile, columns=min(columns, pairs), resident=4 if wide else 8)


def norm_pair_tile(tile: Tile, full: bool) -> Tile:
    """Pairs with batch norm: narrow, for more registers; two packs on a warp each.

    32 lanes with masks of their channels, or of more inputs than outputs, take twice the warps, whose copies
    are of 8 bytes.
    """
    warps, stages = max(tile.warps, tile.packs), tile.stages
    if max(tile.inputs, tile.outputs) > LANES:
        warps, stages = warps if full and tile.inputs <= tile.outputs else 2 * warps, 2
    return replace(tile, columns=1, warps=warps, stages=stages, resident=8 // warps)


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


def norm_strip_tile(tile: Tile, pass_: str, correlation: Correlation) -> Tile:
    """``tile`` of the strips kernel with batch norm inside: the widest strips that spill on no GPU.

    One pack of three columns loads x 5/3 times, two packs of one column three times, in 3/4 of the requests.
    The forward pass takes the former. The input gradient also loads the x that was normalised, and has
    registers for two columns of one pack only, so it takes the latter. A row takes so many instructions that
    one row on its way is far enough ahead.
    """
    wide = max(tile.inputs, tile.outputs) > LANES
    packs = tile.packs if pass_ == "input_grad" else 1
    if correlation.step == (2, 2):
        columns = 1 if wide else 2
    elif pass_ == "forward":
        columns = 2 if wide else 3
    else:
        columns = 2 // packs
    columns = min(columns, correlation.output[1])
    return replace(tile, columns=columns, packs=packs, stages=2, resident=8 // tile.warps)


def taps_tile(inputs: int, outputs: int, dtype: torch.dtype, precision: str, device: Device) -> Tile:
    """A matrix product's tile, as large as the group allows; smaller where it runs on multiply-add units."""
    groups = groups_in_pack(inputs, outputs)
    if not uses_tensor_cores(dtype, precision, device):
        return Tile("taps", groups, 64, LANES, lanes(groups * outputs, 32), warps=4, stages=2)
    side_i, side_o = lanes(groups * inputs, 64 // dtype.itemsize), lanes(groups * outputs, 64)
    return Tile("taps", groups, 64, side_i, side_o, warps=4, stages=2, registers=all_registers(device))


def slide_weight_tile(inputs: int, outputs: int, step: int, dtype: torch.dtype, device: Device) -> Tile:
    """Nine sums [outputs, inputs] in the registers of a warp or two; a pack's blocks share rows in L2.

    At a step of 2, which has two rows of x in hand, the bias gradient's sums would not fit beside them.
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
    """One tap's sums, as large as the group allows."""
    groups = groups_in_pack(inputs, outputs)
    most = 64 if uses_tensor_cores(dtype, precision, device) else 32
    side_i, side_o = lanes(groups * inputs, most), lanes(groups * outputs, most)
    pixels = 128 // dtype.itemsize
    registers = all_registers(device)
    return Tile("taps", groups, pixels, side_i, side_o, warps=4, stages=2, registers=registers, resident=16)


def depthwise_lanes(groups: int) -> int:
    """Channels of a tile: 64, or fewer where they divide all: masked channels are loaded one by one."""
    divisor = math.gcd(64, groups)
    return divisor if divisor >= LANES else min(64, power_of_two(groups))


def depthwise_tile(correlation: Correlation) -> Tile:
    """Multiply-adds, no product of tiles. Where it slides, so few pixels that all taps' weights fit."""
    channels, taps = depthwise_lanes(correlation.groups), math.prod(correlation.kernel)
    slides = correlation.step[0] == correlation.dilation[0] == 1 and correlation.divisor == (1, 1)
    if slides and taps <= DEPTHWISE_TAPS:
        pixels = (1024 if taps <= 25 else 512) // channels
        return Tile("depthwise-slide", 1, pixels, channels, channels, warps=4)
    return Tile("depthwise", 1, 1024 // channels, channels, channels, warps=4)


def depthwise_weight_tile(geometry: ConvGeometry, device: Device) -> Tile:
    """Where it slides, so few pixels that all taps' sums fit. Else the taps are a third axis of the tile."""
    taps = math.prod(geometry.weight_size[2:])
    registers, split = all_registers(device), {"warps": 4, "resident": 16}
    if geometry.stride[0] == geometry.dilation[0] == 1 and taps <= DEPTHWISE_TAPS:
        channels = depthwise_lanes(geometry.groups)
        pixels = (512 if taps <= 25 else 256) // channels
        return Tile("depthwise-slide", 1, pixels, channels, channels, registers=registers, **split)
    channels = max(1, min(32, power_of_two(geometry.groups), 2048 // power_of_two(taps)))
    pixels = max(1, 2048 // channels // power_of_two(taps))
    return Tile("depthwise", 1, pixels, channels, channels, registers=registers, **split)


def rows_in_chunk(rows: int, programs_a_chunk: int, tile: Tile, device: Device) -> int:
    """Output rows that a program slides over: all, unless that leaves processors idle.

    A chunk loads two rows more than it has, so it has at least four.
    """
    chunks = -(-tile.resident * device.processors // programs_a_chunk)
    return max(min(rows, 4), -(-rows // chunks))


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
