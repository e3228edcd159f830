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
    identity,
    load_tile,
    locate_channels,
    locate_strips,
)
from gconv.kernels.prologue import load_norm, normalise, scale_and_rectify
from gconv.kernels.tiles import LANES

SIDE = tl.constexpr(LANES)  # of the blocks of sums that a warp computes on its own


class Row(NamedTuple):
    """Where a row of strips is.

    Args:
        p: pointer to the row.
        offset: offsets of the strips' first column from there, a tile.
        step: distance from one column to the next.
        masks: which columns are in the image, one mask for each column.
        m_channel: which channels exist.
    """

    p: Any
    offset: Any
    step: Any
    masks: Any
    m_channel: Any


@triton.jit
def load_columns(row, inside, FULL: tl.constexpr):
    """Load the columns of a row of strips, each  # [BM, channels]"""
    columns = ()
    for u in tl.static_range(len(row.masks)):
        x = load_tile(row.p + u * row.step, row.offset, row.masks[u] & inside, row.m_channel, FULL)
        columns = columns + (x,)
    return columns


@triton.jit
def cut(tile, B: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, BLOCK: tl.constexpr):
    """Return a tile [BM, channels of B packs] transposed, as the blocks that a product multiplies.

    If BLOCK is 16, these are blocks of 16 channels  # [blocks, 16, BM], in the order of the sums: packs,
    blocks of outputs, blocks of inputs. Each block of outputs meets all blocks of inputs, so there are AFTER
    copies of it, one after the other. Of all blocks of inputs there are BEFORE copies. Otherwise the tile is
    one block  # [channels, BM]
    """
    if BLOCK == SIDE:
        N: tl.constexpr = tile.shape[1] // (B * SIDE)
        tile = tile.reshape(tile.shape[0], B, 1, N, 1, SIDE).permute(1, 2, 3, 4, 5, 0)
        tile = tl.broadcast_to(tile, B, BEFORE, N, AFTER, SIDE, tile.shape[5])
        tile = tile.reshape(B * BEFORE * N * AFTER, SIDE, tile.shape[5])
    else:
        tile = tl.trans(tile)
    return tile


@triton.jit
def lay_out(blocks, PRECISION: tl.constexpr):
    """Return blocks of channels x pixels in float32, in the registers where a product's sums are.

    A weight gradient sums over pixels, but in memory the channels of a pixel are adjacent. So both operands
    have to be transposed on the way to the product. Triton does that well for a single block. But it reads a
    batch of blocks from shared memory number by number, and rows that a loop passes to its next turn go
    through shared memory in each turn.

    The sums of a product already have the layout of the next product's left operand and, transposed, of its
    right operand. So a product with the identity, whose right operand needs no transposition, creates this
    layout. It changes no finite number, except for the rounding to TF32 that the next product would make
    anyway.
    """
    return dot(identity(blocks, blocks.shape[-2]), blocks, tl.zeros(blocks.shape, tl.float32), PRECISION)


@triton.jit
def as_left(dy, B: tl.constexpr, AFTER: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """Return columns of dy as left operands, but still in float32, each  # [blocks, 16, BM], or [BO, BM]"""
    columns = ()
    for t in tl.static_range(len(dy)):
        columns = columns + (lay_out(cut(dy[t], B, 1, AFTER, BLOCK), PRECISION),)
    return columns


@triton.jit
def as_right(
    x, norm, masks, inside,
    B: tl.constexpr, BEFORE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return columns of x, through the norm, as right operands, each  # [blocks, BM, 16], or [BM, BI]

    The norm is computed from x as it is in memory: in 16 bits after ``lay_out``, which takes the fewest
    instructions; in float32 before, because ``lay_out`` rounds to TF32.
    """
    EXACT: tl.constexpr = x[0].dtype.primitive_bitwidth == 16
    columns = ()
    for u in tl.static_range(len(x)):
        column = x[u]
        if len(norm) > 0 and not EXACT:
            column = normalise(column, norm, as_mask(masks[u] & inside), True)
        if BLOCK == SIDE:
            laid = lay_out(cut(column, B, BEFORE, 1, BLOCK), PRECISION)
            if len(norm) > 0 and EXACT:
                scale = cut(norm[0][None, :], B, BEFORE, 1, BLOCK)
                shift = cut(norm[1][None, :], B, BEFORE, 1, BLOCK)
                mask = as_mask(masks[u] & inside)[None, None, :]
                laid = scale_and_rectify(laid, scale, shift, mask, x[u].dtype)
            column = laid.to(x[u].dtype).permute(0, 2, 1)
        else:  # each of the two warps needs all inputs, and would have half of them if they were laid out
            tl.static_assert(len(norm) == 0, "batch norm needs a warp for each block of sums")
        columns = columns + (column,)
    return columns


@triton.jit
def in_type(columns, DTYPE: tl.constexpr):
    """Return float32 columns in the type of the tensors."""
    result = ()
    for t in tl.static_range(len(columns)):
        result = result + (columns[t].to(DTYPE),)
    return result


@triton.jit
def add_to_bias(bias, dy, laid):
    """Add a row of dy to its running sums: ``laid`` if that is exact, or dy itself where TF32 rounded it."""
    for t in tl.static_range(len(dy)):
        bias += laid[t] if dy[t].dtype.primitive_bitwidth == 16 else dy[t]
    return bias


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
def store_taps(p, step, sums, offset, mask, B: tl.constexpr, NO: tl.constexpr):
    """Store the diagonal blocks of a kernel row's three taps, ``step`` numbers apart."""
    for s in tl.static_range(3):
        tile = sums[s]
        if len(tile.shape) == 3:
            tile = tile.reshape(B, NO, tile.shape[0] // (B * NO), SIDE, SIDE).permute(0, 1, 3, 2, 4)
        tl.store(p + s * step + offset, tile.reshape(offset.shape), mask)


@triton.jit
def total_bias(bias, B: tl.constexpr, NO: tl.constexpr, HALF: tl.constexpr):
    """Return the sums of dy of each output  # [B BO]"""
    if not HALF:  # [BM, B BO]
        total = tl.sum(bias, 0)
    elif len(bias.shape) == 3:  # each block of inputs has a copy
        copies = tl.sum(bias, 2).reshape(B, NO, bias.shape[0] // (B * NO), SIDE)
        total = tl.max(copies, 2).reshape(B * NO * SIDE)
    else:
        total = tl.sum(bias, 1)
    return total


@triton.jit(do_not_specialize=[*COUNTS, *WALK, *STRIDES, "dy_n", "dy_h", "dy_w"])
def strips_weight_kernel(
    p_dy, p_x, p_sums, p_norm,
    packs, groups, images, strips, group, parts, turns, H, W, P, Q, rows, top, left,
    dy_n, dy_h, dy_w, x_n, x_h, x_w,
    CI: tl.constexpr, CO: tl.constexpr, G: tl.constexpr, STRIDE: tl.constexpr,
    BIAS: tl.constexpr, PROLOGUE: tl.constexpr, PRECISION: tl.constexpr,
    FULL: tl.constexpr, WIDE: tl.constexpr, X_UNIT: tl.constexpr, DY_UNIT: tl.constexpr,
    T: tl.constexpr, B: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial sums for 3x3 at stride 1 or 2: slide BM strips of T columns of dy down the rows.

        sums[split, r, s] = sum over the split's n, p, q of dy[n, p, q] x[n, h, w]
        where  h = p STRIDE - top + r,  w = q STRIDE - left + s

    Column t of a strip of dy meets columns t STRIDE + s of x: T loads of dy and (T - 1) STRIDE + 3 of x.

    Turn t of an image loads row t of dy and row t STRIDE - top of x, at stride 2 also the row below. The last
    rows of dy meet x in the LAG turns that follow, in which no more of dy is loaded.

    Grid: batches of B packs, fastest; blocks of a pack's outputs, then inputs; parts of a group of images;
    splits of ``rows`` turns each (``walk.py``).

    A tile of sums [BO, BI] is cut into blocks of 16 x 16, which the warps share. A tile of a single pack with
    fewer warps than blocks is one product on all warps (BLOCK is its larger side).

    In registers: the sums of the nine taps, and the rows of dy that meet a row of x: three at stride 1, which
    move up as the rows move down, two at stride 2. In shared memory: the rows in flight.
    """
    OUTPUT_BLOCKS: tl.constexpr = (G * CO + BO - 1) // BO
    INPUT_BLOCKS: tl.constexpr = (G * CI + BI - 1) // BI
    LAG: tl.constexpr = 2 if STRIDE == 1 else 1
    NI: tl.constexpr = BI // SIDE
    NO: tl.constexpr = BO // SIDE
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
    if BLOCK == SIDE:
        zero = tl.zeros([B * NO * NI, SIDE, SIDE], tl.float32)
        none = tl.zeros([B * NO * NI, SIDE, BM], p_dy.dtype.element_ty)
    else:
        zero, none = tl.zeros([BO, BI], tl.float32), tl.zeros([BO, BM], p_dy.dtype.element_ty)
    sums0, sums1, sums2 = (zero, zero, zero), (zero, zero, zero), (zero, zero, zero)
    HALF: tl.constexpr = p_dy.dtype.element_ty.primitive_bitwidth == 16
    bias = none.to(tl.float32) if HALF else tl.zeros([BM, B * BO], tl.float32)
    step_x, step_dy = x_w * X_UNIT, dy_w * DY_UNIT
    image, strip, m_strip = locate_strips(i_tile % parts, group, strips, BM, WIDE)
    q = strip * T
    j = q * STRIDE - left
    o_x = ((image * x_n + j * x_w) * X_UNIT)[:, None] + c[None, :]
    o_dy = ((image * dy_n + q * dy_w) * DY_UNIT)[:, None] + k[None, :]
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
        x = load_columns(Row(p_row, o_x, step_x, m_x, m_c), inside, FULL)
        x = as_right(x, norm, m_x, inside, B, NO, BLOCK, PRECISION)
        sums2 = add_columns(sums2, dy2 if STRIDE == 1 else dy1, x, STRIDE, PRECISION)
        if STRIDE == 1:
            sums1 = add_columns(sums1, dy1, x, STRIDE, PRECISION)
            dy2 = renew(dy1)
        inside = image < tl.where((turn < P) & (i < stop), left_over, 0)
        dy = load_columns(Row(p_grad, o_dy, step_dy, m_dy, m_k), inside, FULL)
        laid = as_left(dy, B, NI, BLOCK, PRECISION)
        if BIAS:
            bias = add_to_bias(bias, dy, laid)
        dy1 = in_type(laid, p_dy.dtype.element_ty)
        sums0 = add_columns(sums0, dy1, x, STRIDE, PRECISION)
        if STRIDE == 2:
            inside = image < tl.where((h + 1 >= 0) & (h + 1 < H), left_over, 0)
            x = load_columns(Row(p_row + x_h * X_UNIT, o_x, step_x, m_x, m_c), inside, FULL)
            x = as_right(x, norm, m_x, inside, B, NO, BLOCK, PRECISION)
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
    store_taps(p_sums, size, sums0, offset, mask, B, NO)
    store_taps(p_sums + 3 * size, size, sums1, offset, mask, B, NO)
    store_taps(p_sums + 6 * size, size, sums2, offset, mask, B, NO)
    if BIAS:
        total = total_bias(bias, B, NO, HALF)
        tl.store(p_sums + 9 * size + k, total, as_mask(own_o & (i_i == 0)))
