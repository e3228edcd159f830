"""3x3 kernels that slide down the rows of one tile of columns: for AMD, unequal strides and norms in TF32.

On NVIDIA GPUs, strip kernels (``strips.py``, ``strips_weight.py``, ``pairs.py``) do the same with fewer
loads, and are used wherever they support the geometry.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gconv.kernels.epilogue import Sink, emit, load_bias, store_sums
from gconv.kernels.packing import (
    COUNTS,
    STRIDES,
    WEIGHTS,
    Weights,
    as_mask,
    dot,
    dot_row,
    load_kernel,
    load_row,
    load_tile,
    locate_channels,
    locate_columns,
    locate_sums,
    mask_columns,
)
from gconv.kernels.prologue import load_norm, normalise_row


@triton.jit(do_not_specialize=[*COUNTS, *STRIDES, *WEIGHTS, "columns", "rows", "y_w"])
def slide_kernel(
    p_x, p_w, p_bias, p_y, p_norm, p_side, p_sums,
    packs, groups, columns, H, W, P, Q, rows, top, left, step_w, tap_w,
    x_n, x_h, x_w, y_w, w_0, w_g, w_i, w_o, w_r, w_s,
    CI: tl.constexpr, CO: tl.constexpr, G: tl.constexpr, STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, PROLOGUE: tl.constexpr, EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr,
    X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """3x3, vertical stride 1 or 2: slide down the rows of x; load each row once for all outputs it feeds.

        y[p] = x[p STRIDE - top] w[0] + x[p STRIDE - top + 1] w[1] + x[p STRIDE - top + 2] w[2]

    where x[h] w[r] sums three taps: loads of the row shifted by a column, which meet in L1.

    Grid: packs of channels, fastest, so that adjacent programs complete each other's cache lines; tiles of BM
    columns; chunks of ``rows`` output rows.

    In registers: one row's three x tiles [BM, BI], and the sums [BM, BO] of the outputs that the row feeds:
    three at stride 1, which move up as the rows move down, two at stride 2. In shared memory: the nine weight
    tiles [BI, BO], and the rows in flight.
    """
    i_pack = tl.program_id(0) % packs
    i_m = tl.program_id(0) // packs % tl.cdiv(columns, BM)
    first = tl.program_id(0) // packs // tl.cdiv(columns, BM) * rows
    end = tl.minimum(first + rows, P)

    n, image, q, m_column = locate_columns(i_m, columns, Q, BM, WIDE)
    c, m_c = locate_channels(i_pack, 0, groups, CI, G, BI)
    k, m_k = locate_channels(i_pack, 0, groups, CO, G, BO)
    weights = Weights(p_w + w_0, groups, w_g, w_i, w_o, w_r, w_s)
    w0, w1, w2 = load_kernel(i_pack, weights, CI, CO, G, BI, BO)
    if EPILOGUE == "gradient":
        norm = load_norm(p_norm, groups * CO, k, m_k, True)
    else:
        norm = load_norm(p_norm, groups * CI, c, m_c, PROLOGUE)

    j = q * step_w - left
    m_x = mask_columns(j, tap_w, W, m_column)
    o_x = ((image * x_n + j * x_w) * X_UNIT)[:, None] + c[None, :]
    o_y = ((image * P * Q + q) * y_w * Y_UNIT)[:, None] + k[None, :]
    bias = load_bias(p_bias, k, m_k)
    sink = Sink(p_y, p_side, bias, o_y, 0, (), () if FULL else (m_k,), norm)
    h0 = first * STRIDE - top
    step = tap_w * x_w * X_UNIT
    zero = tl.zeros([BM, BO], tl.float32)
    sums = (zero, zero)
    if STRIDE == 1:
        last, middle = zero, zero
        # Rows above the image add nothing. Start at the first one that completes an output row.
        start = tl.maximum(h0, tl.minimum(0, h0 + 2))
        p_x += (n * x_n + start.to(tl.int64) * x_h) * X_UNIT
        at = (n * P + start + top - 2) * Q * y_w * Y_UNIT
        for h in range(start, end - top + 2):
            x = load_row(p_x, o_x, step, m_x, (h >= 0) & (h < H), m_c, FULL)
            a = normalise_row(x, norm, m_x, (h >= 0) & (h < H), PROLOGUE)
            done = dot_row(a, w2, last, PRECISION)
            last = dot_row(a, w1, middle, PRECISION)
            middle = dot_row(a, w0, zero, PRECISION)
            complete = m_column & (h >= h0 + 2)
            sums = emit(done, sums, h - h0 - 1, sink, at, complete, ACTIVATION, EPILOGUE)
            p_x += x_h * X_UNIT
            at += Q * y_w * Y_UNIT
    else:
        p_x += (n * x_n + h0.to(tl.int64) * x_h) * X_UNIT
        at = (n * P + first - 1) * Q * y_w * Y_UNIT
        acc = zero
        for h in range(h0, 2 * end - top + 2, 2):
            x = load_row(p_x, o_x, step, m_x, (h >= 0) & (h < H), m_c, FULL)
            a = normalise_row(x, norm, m_x, (h >= 0) & (h < H), PROLOGUE)
            done = dot_row(a, w2, acc, PRECISION)
            acc = dot_row(a, w0, zero, PRECISION)
            complete = m_column & (h >= h0 + 2)
            sums = emit(done, sums, (h - h0) // 2, sink, at, complete, ACTIVATION, EPILOGUE)
            x = load_row(p_x + x_h * X_UNIT, o_x, step, m_x, (h + 1 >= 0) & (h + 1 < H), m_c, FULL)
            a = normalise_row(x, norm, m_x, (h + 1 >= 0) & (h + 1 < H), PROLOGUE)
            acc = dot_row(a, w1, acc, PRECISION)
            p_x += 2 * x_h * X_UNIT
            at += Q * y_w * Y_UNIT
    i_part = tl.program_id(0) // packs
    counts = tl.where(m_column, end - first, 0)
    store_sums(p_sums, i_part, sums, counts, groups * CO, k, m_k, EPILOGUE)


@triton.jit(
    do_not_specialize=[
        *COUNTS, *STRIDES, *WEIGHTS, "columns", "rows", "pairs_h", "pairs_w", "above", "before", "y_w",
    ]
)  # fmt: skip
def residue_kernel(
    p_x, p_w, p_bias, p_y, p_norm, p_side, p_sums,
    packs, groups, columns, H, W, P, Q, rows, top, left, pairs_h, pairs_w, above, before,
    x_n, x_h, x_w, y_w, w_0, w_g, w_i, w_o, w_r, w_s,
    CI: tl.constexpr, CO: tl.constexpr, G: tl.constexpr,
    ACTIVATION: tl.constexpr, EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr,
    X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """3x3, divided by 2: rows and columns of y in pairs, each residue with the taps that meet it.

    x is dy, y is dx, and w the flipped weights. Rows 2a + top and 2a + 1 + top are a pair, even and odd, and
    so are columns 2b + left and 2b + 1 + left:

        even, even   x[a, b] w[0, 0] + x[a, b + 1] w[0, 2] + x[a + 1, b] w[2, 0] + x[a + 1, b + 1] w[2, 2]
        even, odd                      x[a, b + 1] w[0, 1]                       + x[a + 1, b + 1] w[2, 1]
        odd, even                                            x[a + 1, b] w[1, 0] + x[a + 1, b + 1] w[1, 2]
        odd, odd                                                                   x[a + 1, b + 1] w[1, 1]

    Grid: packs of channels, fastest; tiles of BM column pairs; chunks of ``rows`` row pairs.

    In registers: the nine weight tiles [BI, BO], two x tiles [BM, BI] of one row, the sums [BM, BO] of the
    four outputs that the row completes and of the two that it begins.
    """
    i_pack = tl.program_id(0) % packs
    i_m = tl.program_id(0) // packs % tl.cdiv(columns, BM)
    first = tl.program_id(0) // packs // tl.cdiv(columns, BM) * rows + above
    end = tl.minimum(first + rows, above + pairs_h)

    n, image, pair, m_column = locate_columns(i_m, columns, pairs_w, BM, WIDE)
    c, m_c = locate_channels(i_pack, 0, groups, CI, G, BI)
    k, m_k = locate_channels(i_pack, 0, groups, CO, G, BO)
    weights = Weights(p_w + w_0, groups, w_g, w_i, w_o, w_r, w_s)
    w0, w1, w2 = load_kernel(i_pack, weights, CI, CO, G, BI, BO)

    b = pair + before
    m_left = m_column & (b >= 0) & (b < W)
    m_right = m_column & (b + 1 >= 0) & (b + 1 < W)
    o_x = ((image * x_n + b * x_w) * X_UNIT)[:, None] + c[None, :]
    q = 2 * b + left
    m_even = m_column & (q >= 0) & (q < Q)
    m_odd = m_column & (q + 1 >= 0) & (q + 1 < Q)
    o_y = ((image * P * Q + q) * y_w * Y_UNIT)[:, None] + k[None, :]
    p_x += (n * x_n + first.to(tl.int64) * x_h) * X_UNIT
    at = (n * P + 2 * (first - 1) + top) * Q * y_w * Y_UNIT
    norm = load_norm(p_norm, groups * CO, k, m_k, EPILOGUE == "gradient")

    bias = load_bias(p_bias, k, m_k)
    sink = Sink(p_y, p_side, bias, o_y, 0, (), () if FULL else (m_k,), norm)
    step = y_w * Y_UNIT  # from an even column to the odd one
    zero = tl.zeros([BM, BO], tl.float32)
    even, odd = zero, zero
    sums = (zero, zero)
    for a in range(first, end + 1):
        inside = (a >= 0) & (a < H)
        x0 = load_tile(p_x, o_x, m_left & inside, m_c, FULL)
        x1 = load_tile(p_x, o_x + x_w * X_UNIT, m_right & inside, m_c, FULL)
        p = 2 * (a - 1) + top
        above_row = (a > first) & (p >= 0) & (p < P)
        below_row = (a > first) & (p + 1 >= 0) & (p + 1 < P)
        even = dot(x1, w2[2], dot(x0, w2[0], even, PRECISION), PRECISION)
        sums = emit(even, sums, 1, sink, at, m_even & above_row, ACTIVATION, EPILOGUE)
        odd = dot(x1, w2[1], odd, PRECISION)
        sums = emit(odd, sums, 1, sink, at + step, m_odd & above_row, ACTIVATION, EPILOGUE)
        at += Q * step
        below = dot(x1, w1[2], dot(x0, w1[0], zero, PRECISION), PRECISION)
        sums = emit(below, sums, 1, sink, at, m_even & below_row, ACTIVATION, EPILOGUE)
        below = dot(x1, w1[1], zero, PRECISION)
        sums = emit(below, sums, 1, sink, at + step, m_odd & below_row, ACTIVATION, EPILOGUE)
        at += Q * step
        even = dot(x1, w0[2], dot(x0, w0[0], zero, PRECISION), PRECISION)
        odd = dot(x1, w0[1], zero, PRECISION)
        p_x += x_h * X_UNIT
    store_sums(p_sums, tl.program_id(0) // packs, sums, m_column, groups * CO, k, m_k, EPILOGUE)


@triton.jit
def add_outer_row(sums, dy, x, PRECISION: tl.constexpr):
    """Return the sums of a kernel row's three taps, each plus dy.T @ x  # [BO, BI]"""
    dy = tl.trans(dy)
    s0 = dot(dy, x[0], sums[0], PRECISION)
    s1 = dot(dy, x[1], sums[1], PRECISION)
    s2 = dot(dy, x[2], sums[2], PRECISION)
    return s0, s1, s2


@triton.jit
def store_row(p, offset, step, sums, mask):
    """Store the sums of a kernel row's three taps, ``step`` numbers apart."""
    tl.store(p + offset, sums[0], mask)
    tl.store(p + step + offset, sums[1], mask)
    tl.store(p + 2 * step + offset, sums[2], mask)


@triton.jit(do_not_specialize=[*COUNTS, *STRIDES, "columns", "rows", "dy_n", "dy_h", "dy_w"])
def slide_weight_kernel(
    p_dy, p_x, p_sums, p_norm,
    packs, groups, columns, H, W, P, Q, rows, top, left, step_w, tap_w,
    dy_n, dy_h, dy_w, x_n, x_h, x_w,
    CI: tl.constexpr, CO: tl.constexpr, G: tl.constexpr, STRIDE: tl.constexpr,
    BIAS: tl.constexpr, PROLOGUE: tl.constexpr, PRECISION: tl.constexpr,
    FULL: tl.constexpr, WIDE: tl.constexpr, X_UNIT: tl.constexpr, DY_UNIT: tl.constexpr,
    BM: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Partial sums for 3x3, vertical stride 1 or 2: slide down the rows of dy and x; load each row once.

        sums[split, r, s] = sum over the split's n, p, q of dy[n, p, q] x[n, h, w]
        where  h = p STRIDE - top + r,  w = q step_w - left + s tap_w

    Grid: packs of channels, fastest; blocks of a pack's outputs, then inputs; splits of ``rows`` rows of dy
    each, numbered through tiles of BM columns.

    In registers: the nine sums [BO, BI], one row's three x tiles [BM, BI], and the dy tiles [BM, BO] that
    meet it: three at stride 1, which move up as the rows move down, two at stride 2. In shared memory: the
    rows in flight.
    """
    OUTPUT_BLOCKS: tl.constexpr = (G * CO + BO - 1) // BO
    INPUT_BLOCKS: tl.constexpr = (G * CI + BI - 1) // BI
    i_pack = tl.program_id(0) % packs
    i_o = tl.program_id(0) // packs % OUTPUT_BLOCKS
    i_i = tl.program_id(0) // packs // OUTPUT_BLOCKS % INPUT_BLOCKS
    i_split = tl.program_id(0) // packs // (OUTPUT_BLOCKS * INPUT_BLOCKS)

    c, m_c = locate_channels(i_pack, i_i, groups, CI, G, BI)
    k, m_k = locate_channels(i_pack, i_o, groups, CO, G, BO)
    norm = load_norm(p_norm, groups * CI, c, m_c, PROLOGUE)
    zero = tl.zeros([BO, BI], tl.float32)
    sums0 = (zero, zero, zero)
    sums1 = (zero, zero, zero)
    sums2 = (zero, zero, zero)
    bias = tl.zeros([BM, BO], tl.float32)
    step = tap_w * x_w * X_UNIT
    start = i_split * rows
    stop = tl.minimum(start + rows, tl.cdiv(columns, BM) * P)
    for i_m in range(start // P, tl.cdiv(stop, P)):
        first, end = tl.maximum(start - i_m * P, 0), tl.minimum(stop - i_m * P, P)
        n, image, q, m_column = locate_columns(i_m, columns, Q, BM, WIDE)
        j = q * step_w - left
        m_x = mask_columns(j, tap_w, W, m_column)
        o_x = ((image * x_n + j * x_w) * X_UNIT)[:, None] + c[None, :]
        o_dy = ((image * dy_n + q * dy_w) * DY_UNIT)[:, None] + k[None, :]
        h0 = first * STRIDE - top
        p_row = p_x + (n * x_n + h0.to(tl.int64) * x_h) * X_UNIT
        p_grad = p_dy + (n * dy_n + first.to(tl.int64) * dy_h) * DY_UNIT
        dy1 = tl.zeros([BM, BO], p_dy.dtype.element_ty)
        dy2 = tl.zeros([BM, BO], p_dy.dtype.element_ty)
        last = end * STRIDE - top
        # Rows of x below the image add nothing, but the bias gradient needs those with a row of dy.
        for h in range(h0, tl.minimum(last + 2, tl.maximum(last, H)), STRIDE):
            dy0 = load_tile(p_grad, o_dy, m_column & (h < last), m_k, FULL)
            x = load_row(p_row, o_x, step, m_x, (h >= 0) & (h < H), m_c, FULL)
            a = normalise_row(x, norm, m_x, (h >= 0) & (h < H), PROLOGUE)
            sums0 = add_outer_row(sums0, dy0, a, PRECISION)
            if STRIDE == 1:
                sums1 = add_outer_row(sums1, dy1, a, PRECISION)
                sums2 = add_outer_row(sums2, dy2, a, PRECISION)
                # Triton loads ahead only in loops that pass on what they computed, so dy1 is recomputed.
                dy2 = tl.where(h >= h0, dy1, 0.0)
            else:
                sums2 = add_outer_row(sums2, dy1, a, PRECISION)
                x = load_row(p_row + x_h * X_UNIT, o_x, step, m_x, (h + 1 >= 0) & (h + 1 < H), m_c, FULL)
                a = normalise_row(x, norm, m_x, (h + 1 >= 0) & (h + 1 < H), PROLOGUE)
                sums1 = add_outer_row(sums1, dy0, a, PRECISION)
            dy1 = dy0
            if BIAS:
                bias += dy0.to(tl.float32)
            p_grad += dy_h * DY_UNIT
            p_row += STRIDE * x_h * X_UNIT

    o_sums, m_sums = locate_sums(i_i, i_o, k, m_k, CI, CO, BI, BO)
    size = groups * CO * CI
    p_sums += i_split.to(tl.int64) * (9 * size + BIAS * groups * CO)
    store_row(p_sums, o_sums, size, sums0, m_sums)
    store_row(p_sums + 3 * size, o_sums, size, sums1, m_sums)
    store_row(p_sums + 6 * size, o_sums, size, sums2, m_sums)
    if BIAS:
        tl.store(p_sums + 9 * size + k, tl.sum(bias, 0), as_mask(m_k & (i_i == 0)))
