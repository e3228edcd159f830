"""3x3 weight gradient: slides strips of adjacent columns down the rows of dy and x together."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gconv.kernels.packing import (
    COUNTS,
    STRIDES,
    WALK,
    as_mask,
    dot,
    load_tile,
    locate_channels,
    locate_strips,
)
from gconv.kernels.prologue import load_norm, normalise


class Row(NamedTuple):
    """Where a row of strips is.

    Args:
        p: pointer to the row.
        offset: offsets of the strips' first column from there, a tile.
        step: distance from one column to the next.
        masks: which columns are in the image, one mask for each column.
    """

    p: Any
    offset: Any
    step: Any
    masks: Any


@triton.jit
def load_gradient(
    row, inside, m_k, identity, bias, BIAS: tl.constexpr, PRECISION: tl.constexpr, FULL: tl.constexpr
):
    """Load a row of dy in strips, transposed, as a product's left operand in registers, each  # [B BO, BM]

    Also return ``bias``, the running sums of dy  # [B BO, 4], to which each thread adds what it has of a
    channel.

    Three rows of x meet each row of dy. But a loop keeps what it passes to its next turn in registers as it
    was loaded, and Triton would bring it to the product's layout through shared memory each time. The sums of
    a product already have the layout of the next product's left operand. So a single product with the
    identity creates this layout. It changes no finite number, except for the rounding to TF32 that the next
    product would make anyway.
    """
    columns = ()
    for t in tl.static_range(len(row.masks)):
        m = as_mask(row.masks[t] & inside)[None, :]
        dy = tl.load(row.p + t * row.step + row.offset, m if FULL else m & m_k[:, None], 0.0)
        laid = dot(dy, identity, tl.zeros([dy.shape[0], identity.shape[1]], tl.float32), PRECISION)
        if BIAS:
            exact = laid if dy.dtype.primitive_bitwidth == 16 else dy  # the product rounds to TF32
            bias += tl.sum(tl.sum(exact.reshape(dy.shape[0], dy.shape[1] // 8, 4, 2), 3), 1)
        columns = columns + (laid.to(dy.dtype),)
    return columns, bias


@triton.jit
def load_inputs(row, inside, norm, m_c, PROLOGUE: tl.constexpr, FULL: tl.constexpr):
    """Load the columns of a row of x that a strip's kernels meet, through the norm, each  # [BM, B BI]"""
    columns = ()
    for u in tl.static_range(len(row.masks)):
        m = as_mask(row.masks[u] & inside)
        x = load_tile(row.p + u * row.step, row.offset, m, m_c, FULL)
        columns = columns + (normalise(x, norm, m, PROLOGUE),)
    return columns


@triton.jit
def add_columns(sums, dy, x, STRIDE: tl.constexpr, PRECISION: tl.constexpr):
    """Return the sums of a kernel row's three taps, plus a row of dy times the row of x that it meets."""
    s0, s1, s2 = sums
    for t in tl.static_range(len(dy)):
        s0 = dot(dy[t], x[t * STRIDE], s0, PRECISION)
        s1 = dot(dy[t], x[t * STRIDE + 1], s1, PRECISION)
        s2 = dot(dy[t], x[t * STRIDE + 2], s2, PRECISION)
    return s0, s1, s2


@triton.jit
def renew(row):
    """Return ``row`` unchanged. Triton loads ahead only in loops that don't pass on what they were passed."""
    columns = ()
    bits: tl.constexpr = tl.int16 if row[0].dtype.primitive_bitwidth == 16 else tl.int32
    for t in tl.static_range(len(row)):
        columns = columns + (row[t].to(bits, bitcast=True).to(row[t].dtype, bitcast=True),)
    return columns


@triton.jit
def own_inputs(sums, B: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr):
    """Return the part of each pack's sums that belongs to its own inputs  # [B BO, BI]

    This takes no instruction: the splits rename registers, and products whose sums are dropped here are never
    compiled.
    """
    if B == 2:
        left, right = tl.split(sums.reshape(2, BO, 2, BI).permute(1, 3, 0, 2))
        first, _ = tl.split(left)
        _, second = tl.split(right)
        sums = tl.join(first, second).permute(2, 0, 1).reshape(2 * BO, BI)
    return sums


@triton.jit
def store_taps(p, step, sums, offset, mask, B: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr):
    """Store the diagonal blocks of a kernel row's three taps, ``step`` numbers apart."""
    for s in tl.static_range(3):
        tl.store(p + s * step + offset, own_inputs(sums[s], B, BI, BO), mask)


@triton.jit(do_not_specialize=[*COUNTS, *WALK, *STRIDES, "dy_n", "dy_h", "dy_w"])
def strips_weight_kernel(
    p_dy, p_x, p_sums, p_norm,
    packs, groups, images, strips, group, parts, turns, H, W, P, Q, rows, top, left,
    dy_n, dy_h, dy_w, x_n, x_h, x_w,
    CI: tl.constexpr, CO: tl.constexpr, G: tl.constexpr, STRIDE: tl.constexpr,
    BIAS: tl.constexpr, PROLOGUE: tl.constexpr, PRECISION: tl.constexpr,
    FULL: tl.constexpr, WIDE: tl.constexpr, X_UNIT: tl.constexpr, DY_UNIT: tl.constexpr,
    T: tl.constexpr, B: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Partial sums for 3x3 at stride 1 or 2: slide BM strips of T columns of dy down the rows.

        sums[split, r, s] = sum over the split's n, p, q of dy[n, p, q] x[n, h, w]
        where  h = p STRIDE - top + r,  w = q STRIDE - left + s

    Column t of a strip of dy meets columns t STRIDE + s of x: T loads of dy and (T - 1) STRIDE + 3 of x.

    Turn t of an image loads row t of dy and row t STRIDE - top of x, at stride 2 also the row below. The last
    rows of dy meet x in the LAG turns that follow, in which no more of dy is loaded.

    Grid: batches of B packs, fastest; blocks of a pack's outputs, then inputs; parts of a group of images;
    splits of ``rows`` turns each (``walk.py``). Two packs are one tile of twice as many channels, so that a
    load moves 64 bytes of a pixel. Nothing uses the products of one pack's dy with the other pack's x, so the
    compiler removes them.

    In registers: the sums of the nine taps [B BO, B BI], and the rows of dy that meet a row of x: three at
    stride 1, which move up as the rows move down, two at stride 2. In shared memory: the rows in flight.
    """
    OUTPUT_BLOCKS: tl.constexpr = (G * CO + BO - 1) // BO
    INPUT_BLOCKS: tl.constexpr = (G * CI + BI - 1) // BI
    LAG: tl.constexpr = 2 if STRIDE == 1 else 1
    i_pack = tl.program_id(0) % packs
    i_o = tl.program_id(0) // packs % OUTPUT_BLOCKS
    i_i = tl.program_id(0) // packs // OUTPUT_BLOCKS % INPUT_BLOCKS
    i_tile = tl.program_id(0) // packs // (OUTPUT_BLOCKS * INPUT_BLOCKS)
    start = i_tile // parts * rows
    stop = tl.minimum(start + rows, tl.cdiv(images, group) * turns)

    # If channels don't fill the last block, it begins earlier, in the previous block, to avoid masked lanes.
    first_i = tl.minimum(i_i * BI, max(G * CI - BI, 0))
    first_o = tl.minimum(i_o * BO, max(G * CO - BO, 0))
    c, m_c = locate_channels(i_pack, 0, groups, CI, B * G, B * BI)
    k, m_k = locate_channels(i_pack, 0, groups, CO, B * G, B * BO)
    c, k = c + first_i, k + first_o
    norm = load_norm(p_norm, groups * CI, c, m_c, PROLOGUE)
    same = tl.arange(0, BM)[:, None] == tl.arange(0, BM)[None, :]
    identity = tl.where(same, 1.0, 0.0).to(p_dy.dtype.element_ty)
    zero = tl.zeros([B * BO, B * BI], tl.float32)
    none = tl.zeros([B * BO, BM], p_dy.dtype.element_ty)
    sums0, sums1, sums2 = (zero, zero, zero), (zero, zero, zero), (zero, zero, zero)
    bias = tl.zeros([B * BO, 4], tl.float32)
    step_x, step_dy = x_w * X_UNIT, dy_w * DY_UNIT
    image, strip, m_strip = locate_strips(i_tile % parts, group, strips, BM, WIDE)
    q = strip * T
    j = q * STRIDE - left
    o_x = ((image * x_n + j * x_w) * X_UNIT)[:, None] + c[None, :]
    o_dy = ((image * dy_n + q * dy_w) * DY_UNIT)[None, :] + k[:, None]
    m_x, m_dy = (), ()
    for u in tl.static_range((T - 1) * STRIDE + 3):
        m_x = m_x + (m_strip & (j + u >= 0) & (j + u < W),)
    for t in tl.static_range(T):
        m_dy = m_dy + (m_strip & (q + t < Q),)

    turn = start % turns
    left_over = images - start // turns * group
    n = (start // turns * group).to(tl.int64)
    p_row = p_x + (n * x_n + (turn * STRIDE - top).to(tl.int64) * x_h) * X_UNIT
    p_grad = p_dy + (n * dy_n + turn.to(tl.int64) * dy_h) * DY_UNIT
    next_x = (
        group.to(tl.int64) * x_n - (turns - 1).to(tl.int64) * STRIDE * x_h
    ) * X_UNIT  # from an image's last turn
    next_dy = (group.to(tl.int64) * dy_n - (turns - 1).to(tl.int64) * dy_h) * DY_UNIT
    dy1, dy2 = (none,) * T, (none,) * T
    for i in range(start, stop + LAG):
        h = turn * STRIDE - top
        inside = image < tl.where((h >= 0) & (h < H), left_over, 0)
        x = load_inputs(Row(p_row, o_x, step_x, m_x), inside, norm, m_c, PROLOGUE, FULL)
        sums2 = add_columns(sums2, dy2 if STRIDE == 1 else dy1, x, STRIDE, PRECISION)
        if STRIDE == 1:
            sums1 = add_columns(sums1, dy1, x, STRIDE, PRECISION)
            dy2 = renew(dy1)
        row = Row(p_grad, o_dy, step_dy, m_dy)
        inside = image < tl.where((turn < P) & (i < stop), left_over, 0)
        dy1, bias = load_gradient(row, inside, m_k, identity, bias, BIAS, PRECISION, FULL)
        sums0 = add_columns(sums0, dy1, x, STRIDE, PRECISION)
        if STRIDE == 2:
            inside = image < tl.where((h + 1 >= 0) & (h + 1 < H), left_over, 0)
            row = Row(p_row + x_h * X_UNIT, o_x, step_x, m_x)
            x = load_inputs(row, inside, norm, m_c, PROLOGUE, FULL)
            sums1 = add_columns(sums1, dy1, x, STRIDE, PRECISION)
        ends = turn == turns - 1
        p_row += tl.where(ends, next_x, STRIDE * x_h * X_UNIT)
        p_grad += tl.where(ends, next_dy, dy_h * DY_UNIT)
        left_over -= tl.where(ends, group, 0)
        turn = tl.where(ends, 0, turn + 1)

    i, o = first_i + tl.arange(0, BI), first_o + tl.arange(0, B * BO) % BO
    own_o = m_k
    mask = ((o // CO)[:, None] == (i // CI)[None, :]) & own_o[:, None]
    if OUTPUT_BLOCKS * INPUT_BLOCKS > 1:
        own_i, own_o = i >= i_i * BI, m_k & (o >= i_o * BO)
        mask = mask & own_i[None, :] & own_o[:, None]
    offset = (k * CI)[:, None] + (i % CI)[None, :]
    size = groups * CO * CI
    p_sums += i_tile.to(tl.int64) * (9 * size + BIAS * groups * CO)
    store_taps(p_sums, size, sums0, offset, mask, B, BI, BO)
    store_taps(p_sums + 3 * size, size, sums1, offset, mask, B, BI, BO)
    store_taps(p_sums + 6 * size, size, sums2, offset, mask, B, BI, BO)
    if BIAS:
        tl.store(p_sums + 9 * size + k, tl.sum(bias, 1), as_mask(own_o & (i_i == 0)))
