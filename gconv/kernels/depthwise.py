"""Depthwise kernels: multiply-adds. Products of tiles would multiply fifteen zeros in sixteen."""

from __future__ import annotations

import triton
import triton.language as tl

from gconv.kernels.epilogue import Sink, emit, load_bias
from gconv.kernels.packing import COUNTS, STRIDES, WEIGHTS, as_mask, load_tile, locate_columns

OWN_WEIGHTS = [name for name in WEIGHTS if name not in ("w_i", "w_o")]  # a group has one input and output
FORWARD = [*COUNTS, *STRIDES, *OWN_WEIGHTS, "columns", "rows", "y_w"]
WEIGHT_GRAD = [*COUNTS, *STRIDES, "columns", "rows", "splits", "dy_n", "dy_h", "dy_w"]


@triton.jit
def locate_depthwise(i_pack, groups, B: tl.constexpr):
    """Return the channels of a block and which of them exist  # [B]

    A thread has two channels, for loads of 4 bytes, with which a warp still loads complete lines. With more
    channels, the weights that every thread holds wouldn't fit its registers.
    """
    channel = i_pack * B + tl.arange(0, B)
    return tl.max_contiguous(channel, 2), channel < groups


@triton.jit
def repeat(value, TIMES: tl.constexpr):
    """Return a tuple of TIMES values."""
    values = ()
    for _ in tl.static_range(TIMES):
        values = values + (value,)
    return values


@triton.jit
def add_products(sums, x, weights, s: tl.constexpr, S: tl.constexpr):
    """Return sums[r] + x * weights[r, s] for every kernel row r."""
    added = ()
    for r in tl.static_range(len(sums)):
        added = added + (sums[r] + x * weights[r * S + s][None, :],)
    return added


@triton.jit
def add_gradients(sums, x, dy, s: tl.constexpr, S: tl.constexpr):
    """Return sums[r, s] + x * dy[r] for every kernel row r, and the sums of other columns unchanged."""
    added = ()
    for t in tl.static_range(len(sums)):
        if t % S == s:
            added = added + (sums[t] + x * dy[t // S],)
        else:
            added = added + (sums[t],)
    return added


@triton.jit(do_not_specialize=FORWARD)
def depthwise_slide_kernel(
    p_x, p_w, p_bias, p_y, p_side,
    packs, groups, columns, H, W, P, Q, rows, top, left, step_w, tap_w,
    x_n, x_h, x_w, y_w, w_0, w_g, w_r, w_s,
    R: tl.constexpr, S: tl.constexpr,
    ACTIVATION: tl.constexpr, EPILOGUE: tl.constexpr,
    FULL: tl.constexpr, WIDE: tl.constexpr, X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr,
    BM: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Vertical stride and dilation 1: slide down the rows of x; load each once for the R outputs it feeds.

        y[p] = sum over r, s of x[p - top + r, q step_w - left + s tap_w] w[r, s], elementwise along channels

    Grid: blocks of BO channels, fastest; tiles of BM columns; chunks of ``rows`` output rows.

    In registers: the R S weights of the channels, and the sums [BM, BO] of R outputs, which move up as the
    rows move down.
    """
    i_pack = tl.program_id(0) % packs
    i_m = tl.program_id(0) // packs % tl.cdiv(columns, BM)
    first = tl.program_id(0) // packs // tl.cdiv(columns, BM) * rows
    end = tl.minimum(first + rows, P)

    n, image, q, m_column = locate_columns(i_m, columns, Q, BM, WIDE)
    c, m_c = locate_depthwise(i_pack, groups, BO)
    weights = ()
    for t in tl.static_range(R * S):
        weight = tl.load(p_w + w_0 + c * w_g + t // S * w_r + t % S * w_s, m_c, 0.0)
        weights = weights + (weight.to(tl.float32),)

    j = q * step_w - left
    o_x = ((image * x_n + j * x_w) * X_UNIT)[:, None] + c[None, :]
    o_y = ((image * P * Q + q) * y_w * Y_UNIT)[:, None] + c[None, :]
    bias = load_bias(p_bias, c, m_c)
    sink = Sink(p_y, p_side, bias, o_y, 0, (), () if FULL else (m_c,), ())
    h0 = first - top
    p_x += (n * x_n + h0.to(tl.int64) * x_h) * X_UNIT
    at = (n * P + first - (R - 1)) * Q * y_w * Y_UNIT
    zero = tl.zeros([BM, BO], tl.float32)
    sums = repeat(zero, R)
    for h in range(h0, end - top + R - 1):
        for s in tl.static_range(S):
            w = j + s * tap_w
            m_x = m_column & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            x = load_tile(p_x, o_x + s * tap_w * x_w * X_UNIT, m_x, m_c, FULL).to(tl.float32)
            sums = add_products(sums, x, weights, s, S)
        emit(sums[R - 1], (), 1, sink, at, m_column & (h >= h0 + R - 1), ACTIVATION, EPILOGUE)
        sums = (zero,) + sums[:-1]
        p_x += x_h * X_UNIT
        at += Q * y_w * Y_UNIT


@triton.jit(do_not_specialize=WEIGHT_GRAD)
def depthwise_slide_weight_kernel(
    p_dy, p_x, p_sums,
    packs, groups, columns, H, W, P, Q, rows, top, left, splits, step_w, tap_w,
    dy_n, dy_h, dy_w, x_n, x_h, x_w,
    R: tl.constexpr, S: tl.constexpr, BIAS: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr,
    X_UNIT: tl.constexpr, DY_UNIT: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, TURNS: tl.constexpr,
    BM: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Partial sums of the weight gradient, vertical stride and dilation 1.

        sums[split, r, s] = sum over the split's n, p, q of dy[n, p, q] x[n, h, w]
        where  h = p - top + r,  w = q step_w - left + s tap_w

    Grid: blocks of BO channels, fastest; blocks of BR x BS taps; splits, each of every ``splits``-th piece of
    work, a tile of BM columns by a chunk of ``rows`` rows. For a block of taps, the image begins further up
    and to the left.

    In registers: BR BS sums [BM, BO], added up over the columns at the end, and BR rows of dy, which move up
    as the rows move down. Moving them takes two to four instructions for each row of dy, so a turn of the
    loop may take several rows of x (TURNS).
    """
    ACROSS: tl.constexpr = (S + BS - 1) // BS
    BLOCKS: tl.constexpr = (R + BR - 1) // BR * ACROSS
    i_pack = tl.program_id(0) % packs
    i_block = tl.program_id(0) // packs % BLOCKS
    i_split = tl.program_id(0) // (packs * BLOCKS)
    r0, s0 = 0, 0
    if BLOCKS > 1:
        r0, s0 = i_block // ACROSS * BR, i_block % ACROSS * BS
        top, left = top - r0, left - s0 * tap_w
    c, m_c = locate_depthwise(i_pack, groups, BO)
    zero = tl.zeros([BM, BO], tl.float32)
    sums = repeat(zero, BR * BS)
    bias = zero
    for item in range(i_split, tl.cdiv(columns, BM) * tl.cdiv(P, rows), splits):
        first = item // tl.cdiv(columns, BM) * rows
        end = tl.minimum(first + rows, P)
        n, image, q, m_column = locate_columns(item % tl.cdiv(columns, BM), columns, Q, BM, WIDE)
        j = q * step_w - left
        o_x = ((image * x_n + j * x_w) * X_UNIT)[:, None] + c[None, :]
        o_dy = ((image * dy_n + q * dy_w) * DY_UNIT)[:, None] + c[None, :]
        h0 = first - top
        p_row = p_x + (n * x_n + tl.cast(h0, tl.int64) * x_h) * X_UNIT
        p_grad = p_dy + (n * dy_n + tl.cast(first, tl.int64) * dy_h) * DY_UNIT
        dy = repeat(zero, BR)
        for turn in range(h0, end - top + BR - 1, TURNS):
            for u in tl.static_range(TURNS):
                h = turn + u
                dy0 = load_tile(p_grad, o_dy, m_column & (h < end - top), m_c, FULL).to(tl.float32)
                dy = (dy0,) + dy[:-1]
                if BIAS:
                    bias += dy0
                inside = m_column & (h >= 0) & (h < H)
                for s in tl.static_range(BS):
                    w = j + s * tap_w
                    m_x = inside & (w >= 0) & (w < W)
                    x = load_tile(p_row, o_x + s * tap_w * x_w * X_UNIT, m_x, m_c, FULL).to(tl.float32)
                    sums = add_gradients(sums, x, dy, s, BS)
                p_row += x_h * X_UNIT
                p_grad += dy_h * DY_UNIT

    p_sums += i_split.to(tl.int64) * groups * (R * S + BIAS) + c
    for t in tl.static_range(BR * BS):
        r, s = r0 + t // BS, s0 + t % BS
        m_tap = m_c & (r < R) & (s < S) if BLOCKS > 1 else m_c
        tl.store(p_sums + (r * S + s) * groups, tl.sum(sums[t], 0), as_mask(m_tap))
    if BIAS:
        m_bias = m_c & (i_block == 0) if BLOCKS > 1 else m_c
        tl.store(p_sums + R * S * groups, tl.sum(bias, 0), as_mask(m_bias))


@triton.jit(do_not_specialize=FORWARD)
def depthwise_kernel(
    p_x, p_w, p_bias, p_y, p_side,
    packs, groups, columns, H, W, P, Q, rows, top, left,
    x_n, x_h, x_w, y_w, w_0, w_g, w_r, w_s,
    R: tl.constexpr, S: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, DIVISOR_H: tl.constexpr, DIVISOR_W: tl.constexpr,
    TAP_H: tl.constexpr, TAP_W: tl.constexpr,
    ACTIVATION: tl.constexpr, EPILOGUE: tl.constexpr,
    FULL: tl.constexpr, WIDE: tl.constexpr, X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr,
    BM: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Any depthwise geometry.

        y[p, q] = sum over taps r, s of x[h, w] weight[r, s], elementwise along the channels

    with h and w as in ``Correlation``.

    Grid: blocks of BO channels, fastest; tiles of BM columns; chunks of ``rows`` output rows. Going down the
    rows, a program meets each row of x R times in succession: once from memory, then from L1.

    In registers: the sums of one output row, [BM, BO].
    """
    i_pack = tl.program_id(0) % packs
    i_m = tl.program_id(0) // packs % tl.cdiv(columns, BM)
    first = tl.program_id(0) // packs // tl.cdiv(columns, BM) * rows

    n, image, q, m_column = locate_columns(i_m, columns, Q, BM, WIDE)
    c, m_c = locate_depthwise(i_pack, groups, BO)
    p_w += w_0 + c * w_g
    p_x += n * x_n * X_UNIT
    at = (n * P + first) * Q * y_w * Y_UNIT
    o_y = ((image * P * Q + q) * y_w * Y_UNIT)[:, None] + c[None, :]
    bias = load_bias(p_bias, c, m_c)
    sink = Sink(p_y, p_side, bias, o_y, 0, (), () if FULL else (m_c,), ())
    for p in range(first, tl.minimum(first + rows, P)):
        acc = tl.zeros([BM, BO], tl.float32)
        for r in range(R):
            h = p * STEP_H + r * TAP_H - top
            inside = (h >= 0) & (h % DIVISOR_H == 0) & (h // DIVISOR_H < H)
            p_row = p_x + tl.cast(h // DIVISOR_H, tl.int64) * x_h * X_UNIT
            for s in range(S):
                w = q * STEP_W + s * TAP_W - left
                m_x = m_column & inside & (w >= 0) & (w % DIVISOR_W == 0) & (w // DIVISOR_W < W)
                o_x = ((image * x_n + w // DIVISOR_W * x_w) * X_UNIT)[:, None] + c[None, :]
                x = load_tile(p_row, o_x, m_x, m_c, FULL)
                weight = tl.load(p_w + r * w_r + s * w_s, m_c, 0.0)
                acc += x.to(tl.float32) * weight.to(tl.float32)[None, :]
        emit(acc, (), 1, sink, at, m_column, ACTIVATION, EPILOGUE)
        at += Q * y_w * Y_UNIT


@triton.jit(do_not_specialize=WEIGHT_GRAD)
def depthwise_weight_kernel(
    p_dy, p_x, p_sums,
    packs, groups, columns, H, W, P, Q, rows, top, left, splits,
    dy_n, dy_h, dy_w, x_n, x_h, x_w,
    R: tl.constexpr, S: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, TAP_H: tl.constexpr, TAP_W: tl.constexpr,
    BIAS: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr,
    X_UNIT: tl.constexpr, DY_UNIT: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Partial sums of the weight gradient for any depthwise geometry.

        sums[split, r, s] = sum over the split's n, p, q of dy[n, p, q] x[n, h, w], elementwise along channels

    Grid: blocks of BO channels, fastest; splits, each of every ``splits``-th piece of work, a tile of BM
    columns by a chunk of ``rows`` rows.

    In registers: a sum for each column, tap and channel, [BM, BT, BO], added up over the columns at the end.
    """
    i_pack = tl.program_id(0) % packs
    i_split = tl.program_id(0) // packs
    c, m_c = locate_depthwise(i_pack, groups, BO)
    tap = tl.arange(0, BT)
    r, s = tap // S, tap % S
    sums = tl.zeros([BM, BT, BO], tl.float32)
    bias = tl.zeros([BM, BO], tl.float32)
    for item in range(i_split, tl.cdiv(columns, BM) * tl.cdiv(P, rows), splits):
        first = item // tl.cdiv(columns, BM) * rows
        n, image, q, m_column = locate_columns(item % tl.cdiv(columns, BM), columns, Q, BM, WIDE)
        w = (q * STEP_W - left)[:, None] + (s * TAP_W)[None, :]
        m_x = m_column[:, None] & (tap < R * S)[None, :] & (w >= 0) & (w < W)
        o_x = (image * x_n)[:, None] + w * x_w
        o_dy = ((image * dy_n + q * dy_w) * DY_UNIT)[:, None] + c[None, :]
        for p in range(first, tl.minimum(first + rows, P)):
            h = p * STEP_H - top + r * TAP_H
            if WIDE:
                h = h.to(tl.int64)
            m_row = m_x & ((h >= 0) & (h < H))[None, :]
            o_row = ((o_x + (h * x_h)[None, :]) * X_UNIT)[:, :, None] + c[None, None, :]
            m_row = m_row[:, :, None] & m_c[None, None, :]
            x = tl.load(p_x + n * x_n * X_UNIT + o_row, m_row, 0.0).to(tl.float32)
            p_grad = p_dy + (n * dy_n + tl.cast(p, tl.int64) * dy_h) * DY_UNIT
            dy = load_tile(p_grad, o_dy, m_column, m_c, FULL).to(tl.float32)
            sums += dy[:, None, :] * x
            if BIAS:
                bias += dy
    p_sums += i_split.to(tl.int64) * groups * (R * S + BIAS) + c
    m_sums = (tap < R * S)[:, None] & m_c[None, :]
    tl.store(p_sums + (tap * groups)[:, None], tl.sum(sums, 0), m_sums)
    if BIAS:
        tl.store(p_sums + R * S * groups, tl.sum(bias, 0), m_c)
