"""Measure the speed of memory for programs that each move a piece of a pixel's channels, as strips do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
import triton
import triton.language as tl

from gconv.kernels.device import device_of
from gconv.measure.timing import copy_speed, sets_of_operands, time_together

PIECES = (32, 64, 128, 256)  # bytes of a pixel
WAYS = ("copy", "read")  # copy x to y, or read x and y
COLUMNS = 28  # columns of an image that a program moves at the same time
BATCH, SIDE, CHANNELS = 256, 56, 128


@dataclass(frozen=True)
class PieceRow:
    """The time to move 2 BATCH SIDE^2 CHANNELS numbers of 16 bits.

    Args:
        way, piece: members of ``WAYS`` and ``PIECES``.
        stages: number of rows in the pipeline: one is in use, the others are being loaded.
        waves: number of programs, relative to eight warps per multiprocessor.
        microseconds: the median time.
        of_copy: the speed, relative to that of copying entire tensors.
    """

    way: str
    piece: int
    stages: int
    waves: int
    microseconds: float
    of_copy: float


@triton.jit(do_not_specialize=["packs", "rows", "last"])
def move_kernel(
    p_x, p_y, p_sums, packs, rows, last,
    C: tl.constexpr, SIDE: tl.constexpr, COLUMNS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    COPY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute y = x, or sums of x + y. Each program slides down ``rows`` rows of COLUMNS x BC numbers."""
    i_pack = tl.program_id(0) % packs
    start = tl.program_id(0) // packs * rows
    stop = tl.minimum(start + rows, last)
    PARTS: tl.constexpr = SIDE // COLUMNS
    column, c = tl.arange(0, BM), i_pack * BC + tl.arange(0, BC)
    mask = (column < COLUMNS)[:, None]
    sums = tl.zeros([BM, BC], tl.float32)
    for i_tile in range(start // SIDE, tl.cdiv(stop, SIDE)):
        first, end = tl.maximum(start - i_tile * SIDE, 0), tl.minimum(stop - i_tile * SIDE, SIDE)
        row = (i_tile // PARTS * SIDE + first).to(tl.int64) * SIDE + i_tile % PARTS * COLUMNS
        offset = row * C + column[:, None] * C + c[None, :]
        for _ in tl.range(first, end, num_stages=STAGES):
            x = tl.load(p_x + offset, mask, 0.0)
            if COPY:
                tl.store(p_y + offset, x, mask)
            else:
                sums += x.to(tl.float32) + tl.load(p_y + offset, mask, 0.0).to(tl.float32)
            offset += SIDE * C
    if not COPY:
        at = tl.program_id(0) * BM * BC + column[:, None] * BC + tl.arange(0, BC)[None, :]
        tl.store(p_sums + at, sums)


def move(way: str, piece: int, stages: int, waves: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Run the kernel and return the tensor that it wrote."""
    n, channels, side, _ = x.shape
    width = piece // x.itemsize
    warps, packs, last = max(1, piece // 64), channels // width, n * side * (side // COLUMNS)
    programs = max(1, 8 // warps) * device_of(x.device).processors * waves
    rows = -(-last * packs // programs)
    grid = packs * -(-last // rows)
    block = 1 << (COLUMNS - 1).bit_length()
    sums = torch.empty(grid * block * width if way == "read" else 1, device=x.device)
    move_kernel[(grid,)](
        x, y, sums, packs, rows, last, channels, side, COLUMNS, block, width, way == "copy", stages,
        num_warps=warps,
    )  # fmt: skip
    return y if way == "copy" else sums


def measure(device: torch.device, batch: int = BATCH) -> list[PieceRow]:
    """Time all combinations of ways, pieces, stages and waves, taking turns."""
    size, layout = (batch, CHANNELS, SIDE, SIDE), torch.channels_last
    moved = 2 * batch * CHANNELS * SIDE**2 * 2

    def tensor() -> torch.Tensor:
        return torch.randn(size, device=device, dtype=torch.float16).contiguous(memory_format=layout)

    sets = [(tensor(), tensor()) for _ in range(sets_of_operands(moved, device))]

    def calls(case: tuple) -> list[Callable[[], torch.Tensor]]:
        return [lambda x=x, y=y: move(*case, x, y) for x, y in sets]

    cases = list(product(WAYS, PIECES, (3, 5), (1, 2)))
    whole = moved / copy_speed(device)
    times = time_together({case: calls(case) for case in cases}, device)
    return [PieceRow(*case, round(t.p50 * 1e6, 2), round(whole / t.p50, 3)) for case, t in times.items()]
