"""The 3x3 input gradient at stride 2: slides strips of dy down the rows, and writes dx in pairs."""

from __future__ import annotations

import triton
import triton.language as tl

from gconv.kernels.epilogue import Sink, finish, load_bias, mask_sink, store_sums
from gconv.kernels.packing import COUNTS, STRIDES, WALK, dot, locate_channels, locate_strips
from gconv.kernels.prologue import load_norm
from gconv.kernels.strips import Source, join_packs, load_strip, load_taps


@triton.jit
def add_pairs(sums, x, w, ODD: tl.constexpr):
    """Return the sums of each column of a strip of pairs, plus a row of x times a row of the kernel."""
    added = ()
    for t in tl.static_range(len(x) - 1):
        even = dot(x[t], w[0], sums[2 * t + ODD], "ieee")
        even = dot(x[t + 1], w[2], even, "ieee")
        odd = dot(x[t + 1 - ODD], w[1], sums[2 * t + 1 - ODD], "ieee")
        if ODD:
            added = added + (odd, even)
        else:
            added = added + (even, odd)
    return added


@triton.jit
def fold(tile):
    """Return the sums of every eighth row, which one thread holds in the layout of sums  # [8, channels]"""
    return tl.sum(tile.reshape(tile.shape[0] // 8, 8, tile.shape[1]), 0)


@triton.jit
def emit_pairs(
    acc, sums, sink, at, inside, complete, ACTIVATION: tl.constexpr, EPILOGUE: tl.constexpr
):  # fmt: skip
    """Store a row of strips of pairs if it is ``inside`` y and ``complete``; return ``sums`` plus the row."""
    for u in tl.static_range(len(acc)):
        y = join_packs(acc[u])
        offset, m_y = sink.offset + u * sink.step, sink.masks[u] & (inside & complete)
        if EPILOGUE == "gradient":
            # A separate mask. Otherwise the store's mask would stay in registers from the load of x on.
            x = tl.load(sink.p_side + at + offset, mask_sink(sink, sink.masks[u] & inside), 0.0)
            x = x.to(tl.float32)
            # Like through_relu in a single comparison. Outside the image, numbers become zero but NaN stays.
            bound = tl.where(m_y, 0.0, float("inf"))
            before = x * sink.norm[0][None, :] + sink.norm[1][None, :]
            y = tl.where(before <= bound[:, None], 0.0, y).to(sink.p_y.dtype.element_ty)
            grad = y.to(tl.float32)
            sums = (sums[0] + fold(grad), sums[1] + fold(grad * (x - sink.norm[2][None, :])))
        else:
            y = finish(y, sink, at, offset, m_y, ACTIVATION, EPILOGUE)
        tl.store(sink.p_y + at + offset, y, mask_sink(sink, m_y))
    return sums


@triton.jit(do_not_specialize=[*COUNTS, *WALK, *STRIDES, "begins", "above", "quad", "y_w"])
def pairs_kernel(
    p_x, p_w, p_bias, p_y, p_norm, p_side, p_sums,
    packs, groups, images, strips, group, parts, turns, begins, H, W, P, Q, rows,
    top, left, above, quad, x_n, x_h, x_w, y_w,
    CI: tl.constexpr, CO: tl.constexpr, G: tl.constexpr, ODD: tl.constexpr,
    ACTIVATION: tl.constexpr, EPILOGUE: tl.constexpr,
    FULL: tl.constexpr, WIDE: tl.constexpr, X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr,
    STAGES: tl.constexpr, T: tl.constexpr, B: tl.constexpr,
    BM: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """3x3, divided by 2: slide BM strips of T columns of x down its rows; write two rows of y for each.

    x is dy, y is dx, and w the flipped weights. Rows 2a + top and 2a + 1 + top of y are even and odd, and so
    are columns 2b + left and 2b + 1 + left:

        even, even   x[a, b] w[0, 0] + x[a, b + 1] w[0, 2] + x[a + 1, b] w[2, 0] + x[a + 1, b + 1] w[2, 2]
        even, odd                      x[a, b + 1] w[0, 1]                       + x[a + 1, b + 1] w[2, 1]
        odd, even                                            x[a + 1, b] w[1, 0] + x[a + 1, b + 1] w[1, 2]
        odd, odd                                                                   x[a + 1, b + 1] w[1, 1]

    Row a of x completes the even row above it and the odd row next to it, and begins the even row below.
    Pairs of columns begin at even numbers, so ODD, whether ``left`` is odd, determines which of the two comes
    first: if ODD, that of b - 1. Either way columns b and b + 1 of x make a pair, so T + 1 loads serve 2 T
    columns of y.

    Grid: batches of B packs, fastest, so that adjacent programs complete each other's cache lines; blocks of
    a pack's outputs; parts of a group of images; splits of ``rows`` turns each (``walk.py``). Turn t of an
    image takes row ``above`` + t of x; the first turn is ``begins``, as in the strips kernel.

    In registers: all weights of the batch; a row's tiles of x; the sums of the outputs that the row completes
    and of those that it begins. In shared memory: the rows in flight.
    """
    BLOCKS: tl.constexpr = (G * CO + BO - 1) // BO
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
    norm = load_norm(p_norm, groups * CO, k, m_k, EPILOGUE == "gradient")
    step_x, step_y = x_w * X_UNIT, y_w * Y_UNIT
    if B == 1:
        zero = tl.zeros([BM, BO], tl.float32)
    else:
        zero = tl.zeros([B, BM, BO], tl.float32)
    zeros = (zero,) * (2 * T)
    nothing = tl.zeros([8, B * BO], tl.float32)
    sums = (nothing, nothing)

    image, strip, m_strip = locate_strips(i_tile % parts, group, strips, BM, WIDE)
    q = strip * (2 * T)
    b = strip * T - (left - ODD) // 2
    o_x = ((image * x_n + b * x_w) * X_UNIT)[:, None] + c[None, :]
    o_y = ((image * P * Q + q) * y_w * Y_UNIT)[:, None] + k[None, :]
    m_x, m_y = (), ()
    for u in tl.static_range(T + 1):
        m_x = m_x + (m_strip & (b + u >= 0) & (b + u < W),)
    for u in tl.static_range(2 * T):
        m_y = m_y + (m_strip & (q + u < Q),)
    source = Source(o_x, step_x, m_x, m_c, norm)
    sink = Sink(p_y, p_side, load_bias(p_bias, k, m_k), o_y, step_y, m_y, () if FULL else (m_k,), norm)

    i_begin = tl.maximum(start - 1, 0)  # another program's turn, but this one needs its sums, too
    turn = i_begin % turns + begins
    left_over = images - i_begin // turns * group
    n = (i_begin // turns * group).to(tl.int64)
    p_row = p_x + (n * x_n + (above + turn).to(tl.int64) * x_h) * X_UNIT
    at = (n * P + 2 * (above + turn - 1) + top) * Q * step_y
    next_x = (group.to(tl.int64) * x_n - (turns - 1).to(tl.int64) * x_h) * X_UNIT  # from an image's last turn
    next_y = (group.to(tl.int64) * P - 2 * (turns - 1)) * Q * step_y
    even = zeros
    # Without num_stages, Triton wouldn't copy x of the epilogue ahead, because it isn't for a product.
    for i in tl.range(i_begin, stop, num_stages=STAGES):
        a = above + turn
        x = load_strip(p_row, source, image < tl.where((a >= 0) & (a < H), left_over, 0), False, FULL, B)
        p = 2 * (a - 1) + top
        complete = (turn > 0) & (i >= start)
        odd = add_pairs(zeros, x, w1, ODD)
        inside = image < tl.where((p + 1 >= 0) & (p + 1 < P), left_over, 0)
        sums = emit_pairs(odd, sums, sink, at + Q * step_y, inside, complete, ACTIVATION, EPILOGUE)
        even = add_pairs(even, x, w2, ODD)
        inside = image < tl.where((p >= 0) & (p < P), left_over, 0)
        sums = emit_pairs(even, sums, sink, at, inside, complete, ACTIVATION, EPILOGUE)
        even = add_pairs(zeros, x, w0, ODD)
        ends = turn == turns - 1 + begins
        p_row += tl.where(ends, next_x, x_h * X_UNIT)
        at += tl.where(ends, next_y, 2 * Q * step_y)
        left_over -= tl.where(ends, group, 0)
        turn = tl.where(ends, begins, turn + 1)
    store_sums(p_sums, i_tile, sums, m_k, groups * CO, k, m_k, EPILOGUE)
