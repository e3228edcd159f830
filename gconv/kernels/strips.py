"""3x3 kernels that slide strips of adjacent columns down the rows: forward pass and input gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gconv.kernels import tiles
from gconv.kernels.epilogue import (
    Sink,
    add_apart,
    add_gradient,
    finish,
    load_bias,
    mask_sink,
    mean_and_squares,
    store_sums,
    through_relu,
)
from gconv.kernels.packing import (
    COUNTS,
    STRIDES,
    WALK,
    WEIGHTS,
    Weights,
    dot,
    load_tile,
    locate_channels,
    locate_strips,
    locate_weights,
)
from gconv.kernels.prologue import as_sums, load_norm, normalise_operand

PACKING = tiles.Tile("pack", groups=1, pixels=1, inputs=1, outputs=1, warps=4)
QUAD = 4  # threads that share a row of a product's operand
# If neither of two axes is contiguous, Triton puts threads along the first, from 3.7 on along the second.
ROWS_FIRST = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7))


@triton.jit
def position_in_quad(i, BI: tl.constexpr, E: tl.constexpr):
    """Return where input ``i`` of a block is in packed weights, so that each thread's inputs are adjacent.

    In the registers of tensor cores, thread t of four holds inputs 4 E j + E t + e of every j; E numbers e
    fill 32 bits.
    """
    return i % (4 * E) // E * (BI // 4) + i // (4 * E) * E + i % E


@triton.jit(do_not_specialize=["groups", *WEIGHTS])
def pack_kernel(
    p_w, p_packed, groups, w_0, w_g, w_i, w_o, w_r, w_s,
    CI: tl.constexpr, CO: tl.constexpr, G: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Pack weights as ``load_tap`` reads them: (packs, output blocks, 9, input blocks, BO, BK).

    They are zero off the diagonal. Of a block's BK inputs, each of four threads reads 16 bytes.

    Grid: taps, fastest; blocks of a pack's outputs; packs.
    """
    BLOCKS: tl.constexpr = (G * CO + BO - 1) // BO
    E: tl.constexpr = 32 // p_w.dtype.element_ty.primitive_bitwidth
    BK: tl.constexpr = min(BI, 16 * E)
    i_tap = tl.program_id(0) % 9
    i_o = tl.program_id(0) // 9 % BLOCKS
    i_pack = tl.program_id(0) // (9 * BLOCKS)
    weights = Weights(p_w + w_0, groups, w_g, w_i, w_o, w_r, w_s)
    offset, mask = locate_weights(i_pack, (0, i_o), weights, CI, CO, G, BI, BO)
    w = tl.load(weights.p + i_tap // 3 * w_r + i_tap % 3 * w_s + offset, mask, 0.0)
    i, o = tl.arange(0, BI)[:, None], tl.arange(0, BO)[None, :]
    at = (i // BK * BO + o) * BK + position_in_quad(i % BK, BK, E)
    tl.store(p_packed + tl.program_id(0) * BO * BI + at, w)


@triton.jit
def load_tap(p_w, i_first, tap, quad, B: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr):
    """Load one tap's weights of B packs into registers, where they stay  # [BI, BO], or [B, BI, BO]

    Triton reloads operands of products from shared memory in every turn of a loop, unless they were loaded in
    exactly the layout of the product. The packed order and the shape of this load achieve that. ``quad`` is
    4, but known only at run time: so a thread loads its BK / 4 inputs of a block together, and no more. Packs
    alternate every eight rows, so that each of two warps holds one pack.
    """
    E: tl.constexpr = 32 // p_w.dtype.element_ty.primitive_bitwidth
    BK: tl.constexpr = min(BI, 16 * E)
    row = tl.arange(0, B * BO)
    pack, output = row // 8 % B, row // (8 * B) * 8 + row % 8
    o = (((i_first * B + pack) * 9 + tap) * (BI // BK * BO) + output) * quad * (BK // 4)
    block = tl.arange(0, BI // BK) * BO * BK
    if ROWS_FIRST:
        w = tl.load(p_w + o[:, None, None] + block[None, :, None] + tl.arange(0, BK)[None, None, :])
        w = w.reshape(BO // 8, B, 8, BI // BK, 4, BK // (4 * E), E).permute(1, 0, 2, 3, 5, 4, 6)
    else:
        w = tl.load(p_w + block[:, None, None] + o[None, :, None] + tl.arange(0, BK)[None, None, :])
        w = w.reshape(BI // BK, BO // 8, B, 8, 4, BK // (4 * E), E).permute(2, 1, 3, 0, 5, 4, 6)
    if B == 1:
        w = tl.trans(w.reshape(BO, BI))
    else:
        w = w.reshape(B, BO, BI).permute(0, 2, 1)
    return w


@triton.jit
def load_taps(p_w, i_first, r, quad, B: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr):
    """Load the weights of kernel row ``r``."""
    return (
        load_tap(p_w, i_first, 3 * r, quad, B, BI, BO),
        load_tap(p_w, i_first, 3 * r + 1, quad, B, BI, BO),
        load_tap(p_w, i_first, 3 * r + 2, quad, B, BI, BO),
    )


class Source(NamedTuple):
    """Where strips find their columns in a row of x, and the batch norm of its channels."""

    offset: Any
    step: Any
    masks: Any
    m_channel: Any
    norm: Any


@triton.jit
def split_packs(tile, B: tl.constexpr):
    """Return [BM, BI], or [B, BM, BI], from [BM, B BI]."""
    if B > 1:
        tile = tile.reshape(tile.shape[0], B, tile.shape[1] // B).permute(1, 0, 2)
    return tile


@triton.jit
def join_packs(tile):
    """Undo ``split_packs``."""
    if len(tile.shape) == 3:
        tile = tile.permute(1, 0, 2).reshape(tile.shape[1], tile.shape[0] * tile.shape[2])
    return tile


@triton.jit
def load_strip(p, source, inside, PROLOGUE: tl.constexpr, FULL: tl.constexpr, B: tl.constexpr):
    """Load the columns of a row that strips of outputs meet, each  # [BM, BI], or [B, BM, BI]"""
    columns = ()
    for u in tl.static_range(len(source.masks)):
        m_x = source.masks[u] & inside
        x = load_tile(p, source.offset + u * source.step, m_x, source.m_channel, FULL)
        x = split_packs(x, B)
        if PROLOGUE:
            x = normalise_operand(x, source.norm, m_x)
        columns = columns + (x,)
    return columns


@triton.jit
def add_row(sums, x, w, STRIDE: tl.constexpr, PRECISION: tl.constexpr):
    """Return the sums of each column of a strip, plus a row of x times a row of the kernel."""
    added = ()
    for t in tl.static_range(len(sums)):
        acc = dot(x[t * STRIDE], w[0], sums[t], PRECISION)
        acc = dot(x[t * STRIDE + 1], w[1], acc, PRECISION)
        added = added + (dot(x[t * STRIDE + 2], w[2], acc, PRECISION),)
    return added


@triton.jit
def emit_strip(done, sums, sink, at, inside, begins, ACTIVATION: tl.constexpr, EPILOGUE: tl.constexpr):
    """Finish and store the outputs of a row of strips; return ``sums`` with them added.

    ``at``: where the row is. ``begins``: whether it is the first row that the program stores.
    """
    for t in tl.static_range(len(done)):
        offset, m_y = sink.offset + t * sink.step, sink.masks[t] & inside
        y = finish(join_packs(done[t]), sink, at, offset, m_y, ACTIVATION, EPILOGUE)
        if EPILOGUE == "gradient":
            x = tl.load(sink.p_side + at + offset, mask_sink(sink, m_y), 0.0)
            if len(done[t].shape) == 3:
                x = split_packs(x, done[t].shape[0])
            x = join_packs(as_sums(x))
            y = through_relu(y, x, sink.norm, m_y).to(y.dtype)
            sums = add_gradient(sums, y, x, sink.norm)
        if EPILOGUE == "moments":
            sums = add_apart(sums, y.to(tl.float32), m_y, begins & (t == 0))
        tl.store(sink.p_y + at + offset, y, mask_sink(sink, m_y))
    return sums


@triton.jit(do_not_specialize=[*COUNTS, *WALK, *STRIDES, "begins", "quad", "y_w"])
def strips_kernel(
    p_x, p_w, p_bias, p_y, p_norm, p_side, p_sums,
    packs, groups, images, strips, group, parts, turns, begins, H, W, P, Q, rows,
    top, left, quad, x_n, x_h, x_w, y_w,
    CI: tl.constexpr, CO: tl.constexpr, G: tl.constexpr, STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, PROLOGUE: tl.constexpr, EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr,
    X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr,
    T: tl.constexpr, B: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """3x3 at stride 1 or 2: slide BM strips of T output columns down the rows; load each column of x once.

        y[p, q + t] = sum over r, s of x[p STRIDE - top + r, (q + t) STRIDE - left + s] w[r, s]

    Column tap s of output t is column u = t STRIDE + s of the strip. That is another register tile and not
    another load, so (T - 1) STRIDE + 3 loads serve T columns of outputs.

    Turn t of an image loads row t STRIDE - top of x, at stride 2 also the row below, and completes output row
    t - LAG. An image begins at turn ``begins``. That is 1 if the rows above and below the image are zero:
    then one turn serves the end of an image and the beginning of the next.

    Grid: batches of B packs, fastest, so that adjacent programs complete each other's cache lines; blocks of
    a pack's outputs; parts of a group of images; splits of ``rows`` turns each (``walk.py``).

    In registers: all weights of the batch; a row's tiles of x; the sums of the outputs that the row feeds;
    what an epilogue gathers from all rows of the program. In shared memory: the rows in flight.
    """
    BLOCKS: tl.constexpr = (G * CO + BO - 1) // BO
    GATHERS: tl.constexpr = EPILOGUE == "moments" or EPILOGUE == "gradient"
    LAG: tl.constexpr = 2 if STRIDE == 1 else 1
    i_pack = tl.program_id(0) % packs
    i_o = tl.program_id(0) // packs % BLOCKS
    i_tile = tl.program_id(0) // (packs * BLOCKS)
    start = i_tile // parts * rows
    stop = tl.minimum(start + rows, tl.cdiv(images, group) * turns)

    i_first = i_pack * BLOCKS + i_o
    w0 = load_taps(p_w, i_first, 0, quad, B, BI, BO)
    w1 = load_taps(p_w, i_first, 1, quad, B, BI, BO)
    w2 = load_taps(p_w, i_first, 2, quad, B, BI, BO)
    c, m_c = locate_channels(i_pack, 0, groups, CI, B * G, B * BI)
    k, m_k = locate_channels(i_pack, i_o, groups, CO, B * G, B * BO)
    step_x, step_y = x_w * X_UNIT, y_w * Y_UNIT
    norm_x = load_norm(p_norm, groups * CI, c, m_c, PROLOGUE)
    norm_y = load_norm(p_norm, groups * CO, k, m_k, EPILOGUE == "gradient")
    if B == 1:
        zero = tl.zeros([BM, BO], tl.float32)
    else:
        zero = tl.zeros([B, BM, BO], tl.float32)
    zeros = (zero,) * T
    lanes = tl.zeros([BM // 2, B * BO], tl.float32)
    sums = (lanes, lanes, lanes) if EPILOGUE == "moments" else (lanes, lanes)
    counts = tl.zeros([BM // 2], tl.int32)

    image, strip, m_strip = locate_strips(i_tile % parts, group, strips, BM, WIDE)
    q = strip * T
    j = q * STRIDE - left
    o_x = ((image * x_n + j * x_w) * X_UNIT)[:, None] + c[None, :]
    o_y = ((image * P * Q + q) * y_w * Y_UNIT)[:, None] + k[None, :]
    m_x, m_y = (), ()
    for u in tl.static_range((T - 1) * STRIDE + 3):
        m_x = m_x + (m_strip & (j + u >= 0) & (j + u < W),)
    for t in tl.static_range(T):
        m_y = m_y + (m_strip & (q + t < Q),)
    source = Source(o_x, step_x, m_x, m_c, norm_x)
    bias = load_bias(p_bias, k, m_k)
    sink = Sink(p_y, p_side, bias, o_y, step_y, m_y, () if FULL else (m_k,), norm_y)

    # The first turns belong to another program, but this one needs their sums, too.
    i_begin = tl.maximum(start - LAG, 0)
    turn = i_begin % turns + begins
    left_over = images - i_begin // turns * group
    first = start + tl.maximum(LAG - start % turns - begins, 0)  # the turn that completes the first row
    n = (i_begin // turns * group).to(tl.int64)
    p_row = p_x + (n * x_n + (turn * STRIDE - top).to(tl.int64) * x_h) * X_UNIT
    at = (n * P + turn - LAG) * Q * step_y
    next_x = (
        group.to(tl.int64) * x_n - (turns - 1).to(tl.int64) * STRIDE * x_h
    ) * X_UNIT  # from an image's last turn
    next_y = (group.to(tl.int64) * P - (turns - 1)) * Q * step_y
    last, middle = zeros, zeros
    for i in range(i_begin, stop):
        h = turn * STRIDE - top
        inside = image < tl.where((h >= 0) & (h < H), left_over, 0)
        complete = image < tl.where((turn >= LAG) & (i >= start), left_over, 0)
        x = load_strip(p_row, source, inside, PROLOGUE, FULL, B)
        done = add_row(last, x, w2, STRIDE, PRECISION)
        if GATHERS or STRIDE == 2:  # right away, which frees registers
            sums = emit_strip(done, sums, sink, at, complete, i == first, ACTIVATION, EPILOGUE)
        if STRIDE == 1:
            last = add_row(middle, x, w1, STRIDE, PRECISION)
            middle = add_row(zeros, x, w0, STRIDE, PRECISION)
        else:
            last = add_row(zeros, x, w0, STRIDE, PRECISION)
            inside = image < tl.where((h + 1 >= 0) & (h + 1 < H), left_over, 0)
            x = load_strip(p_row + x_h * X_UNIT, source, inside, PROLOGUE, FULL, B)
            last = add_row(last, x, w1, STRIDE, PRECISION)
        if not GATHERS and STRIDE == 1:
            sums = emit_strip(done, sums, sink, at, complete, i == first, ACTIVATION, EPILOGUE)
        if EPILOGUE == "moments":
            for t in tl.static_range(T):
                counts += tl.sum((m_y[t] & complete).to(tl.int32).reshape(2, BM // 2), 0)
        ends = turn == turns - 1 + begins
        p_row += tl.where(ends, next_x, STRIDE * x_h * X_UNIT)
        at += tl.where(ends, next_y, Q * step_y)
        left_over -= tl.where(ends, group, 0)
        turn = tl.where(ends, begins, turn + 1)
    if EPILOGUE == "moments":
        sums = mean_and_squares(sums, counts)
    store_sums(p_sums, i_tile, sums, counts, groups * CO, k, m_k, EPILOGUE)
