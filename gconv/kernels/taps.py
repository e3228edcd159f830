"""Kernels for any geometry: a matrix product for each tap."""

from __future__ import annotations

import triton
import triton.language as tl

from gconv.kernels.epilogue import Sink, emit, load_bias, store_sums
from gconv.kernels.packing import (
    COUNTS,
    STRIDES,
    Weights,
    as_mask,
    dot,
    load_tile,
    locate_channels,
    locate_columns,
    locate_sums,
    locate_weights,
)
from gconv.kernels.prologue import load_norm, normalise


@triton.jit(do_not_specialize=[*COUNTS, *STRIDES, "columns", "y_w"])
def taps_kernel(
    p_x, p_w, p_bias, p_y, p_norm, p_side, p_sums,
    packs, groups, columns, H, W, P, Q, top, left,
    x_n, x_h, x_w, y_w, w_0, w_g, w_i, w_o, w_r, w_s,
    CI: tl.constexpr, CO: tl.constexpr, G: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, DIVISOR_H: tl.constexpr, DIVISOR_W: tl.constexpr,
    TAP_H: tl.constexpr, TAP_W: tl.constexpr,
    ACTIVATION: tl.constexpr, PROLOGUE: tl.constexpr, EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr,
    X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Any geometry: one matrix product for each tap and block of input channels, summed in order.

    ``Correlation`` has the equation.

    Grid: packs of channels, fastest; blocks of BO outputs of a pack; tiles of BM pixels, numbered through
    images, rows and columns.

    In registers: the sums [BM, BO]. The tiles of x [BM, BI] and of the weights [BI, BO] stream past.
    """
    OUTPUT_BLOCKS: tl.constexpr = (G * CO + BO - 1) // BO
    INPUT_BLOCKS: tl.constexpr = (G * CI + BI - 1) // BI
    i_pack = tl.program_id(0) % packs
    i_o = tl.program_id(0) // packs % OUTPUT_BLOCKS
    i_m = tl.program_id(0) // packs // OUTPUT_BLOCKS

    n, image, pixel, m_pixel = locate_columns(i_m, columns, P * Q, BM, WIDE)
    p, q = pixel // Q, pixel % Q
    if WIDE:
        p, q = p.to(tl.int64), q.to(tl.int64)
    k, m_k = locate_channels(i_pack, i_o, groups, CO, G, BO)
    p_x += n * x_n * X_UNIT
    norm = load_norm(p_norm, groups * CO, k, m_k, EPILOGUE == "gradient")
    weights = Weights(p_w + w_0, groups, w_g, w_i, w_o, w_r, w_s)
    zero = tl.zeros([BM, BO], tl.float32)
    acc = zero
    for t in range(R * S * INPUT_BLOCKS):
        i_i, s, r = t % INPUT_BLOCKS, t // INPUT_BLOCKS % S, t // INPUT_BLOCKS // S
        c, m_c = locate_channels(i_pack, i_i, groups, CI, G, BI)
        h = p * STEP_H + r * TAP_H - top
        w = q * STEP_W + s * TAP_W - left
        m_x = m_pixel & (h >= 0) & (w >= 0)
        if DIVISOR_H * DIVISOR_W > 1:
            m_x = m_x & (h % DIVISOR_H == 0) & (w % DIVISOR_W == 0)
            h, w = h // DIVISOR_H, w // DIVISOR_W
        m_x = m_x & (h < H) & (w < W)
        o_x = ((image * x_n + h * x_h + w * x_w) * X_UNIT)[:, None] + c[None, :]
        x = load_tile(p_x, o_x, m_x, m_c, FULL)
        x = normalise(x, load_norm(p_norm, groups * CI, c, m_c, PROLOGUE), m_x, PROLOGUE)
        o_w, m_w = locate_weights(i_pack, (i_i, i_o), weights, CI, CO, G, BI, BO)
        acc = dot(x, tl.load(weights.p + r * w_r + s * w_s + o_w, m_w, 0.0), acc, PRECISION)

    at = i_m.to(tl.int64) * BM * y_w * Y_UNIT
    o_y = (tl.arange(0, BM) * y_w * Y_UNIT)[:, None] + k[None, :]
    bias = load_bias(p_bias, k, m_k)
    sink = Sink(p_y, p_side, bias, o_y, 0, (), () if FULL else (m_k,), norm)
    sums = emit(acc, (zero, zero), 1, sink, at, m_pixel, ACTIVATION, EPILOGUE)
    store_sums(p_sums, i_m, sums, m_pixel.to(tl.int32), groups * CO, k, m_k, EPILOGUE)


@triton.jit(do_not_specialize=[*COUNTS, *STRIDES, "columns", "splits", "dy_n", "dy_h", "dy_w"])
def taps_weight_kernel(
    p_dy, p_x, p_sums, p_norm,
    packs, groups, columns, H, W, P, Q, top, left, splits,
    dy_n, dy_h, dy_w, x_n, x_h, x_w,
    CI: tl.constexpr, CO: tl.constexpr, G: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, TAP_H: tl.constexpr, TAP_W: tl.constexpr,
    BIAS: tl.constexpr, PROLOGUE: tl.constexpr, PRECISION: tl.constexpr,
    FULL: tl.constexpr, WIDE: tl.constexpr, X_UNIT: tl.constexpr, DY_UNIT: tl.constexpr,
    BM: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Partial sums for any geometry, one tap per program.

        sums[split, r, s] = sum over the split's n, p, q of dy[n, p, q] x[n, p STEP_H + r TAP_H - top, ...]

    Grid: packs of channels, fastest; blocks of a pack's outputs, then inputs; taps; splits, each of every
    ``splits``-th tile of BM pixels, numbered through images, rows and columns.

    In registers: the tap's sums [BO, BI]. The tiles of dy [BM, BO] and x [BM, BI] stream past.
    """
    OUTPUT_BLOCKS: tl.constexpr = (G * CO + BO - 1) // BO
    INPUT_BLOCKS: tl.constexpr = (G * CI + BI - 1) // BI
    i_pack = tl.program_id(0) % packs
    i_block = tl.program_id(0) // packs
    i_o = i_block % OUTPUT_BLOCKS
    i_i = i_block // OUTPUT_BLOCKS % INPUT_BLOCKS
    i_tap = i_block // (OUTPUT_BLOCKS * INPUT_BLOCKS) % (R * S)
    i_split = i_block // (OUTPUT_BLOCKS * INPUT_BLOCKS * R * S)

    c, m_c = locate_channels(i_pack, i_i, groups, CI, G, BI)
    k, m_k = locate_channels(i_pack, i_o, groups, CO, G, BO)
    norm = load_norm(p_norm, groups * CI, c, m_c, PROLOGUE)
    sums = tl.zeros([BO, BI], tl.float32)
    for i_m in range(i_split, tl.cdiv(columns, BM), splits):
        n, image, pixel, m_pixel = locate_columns(i_m, columns, P * Q, BM, WIDE)
        p, q = pixel // Q, pixel % Q
        if WIDE:
            p, q = p.to(tl.int64), q.to(tl.int64)
        h = p * STEP_H + i_tap // S * TAP_H - top
        w = q * STEP_W + i_tap % S * TAP_W - left
        m_x = m_pixel & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        o_dy = ((image * dy_n + p * dy_h + q * dy_w) * DY_UNIT)[:, None] + k[None, :]
        o_x = ((image * x_n + h * x_h + w * x_w) * X_UNIT)[:, None] + c[None, :]
        dy = load_tile(p_dy + n * dy_n * DY_UNIT, o_dy, m_pixel, m_k, FULL)
        x = normalise(load_tile(p_x + n * x_n * X_UNIT, o_x, m_x, m_c, FULL), norm, m_x, PROLOGUE)
        sums = dot(tl.trans(dy), x, sums, PRECISION)

    o_sums, m_sums = locate_sums(i_i, i_o, k, m_k, CI, CO, BI, BO)
    size = groups * CO * CI
    p_sums += i_split.to(tl.int64) * (R * S * size + BIAS * groups * CO)
    tl.store(p_sums + i_tap * size + o_sums, sums, m_sums)
    if BIAS:
        # In a separate loop: if dy is summed in the loop with the product, Triton copies the next tile of dy
        # over the one that wgmma is still reading.
        bias = tl.zeros([BO], tl.float32)
        last = tl.where((i_i == 0) & (i_tap == 0), tl.cdiv(columns, BM), 0)
        for i_m in range(i_split, last, splits):
            n, image, pixel, m_pixel = locate_columns(i_m, columns, P * Q, BM, WIDE)
            p, q = pixel // Q, pixel % Q
            if WIDE:
                p, q = p.to(tl.int64), q.to(tl.int64)
            o_dy = ((image * dy_n + p * dy_h + q * dy_w) * DY_UNIT)[:, None] + k[None, :]
            bias += tl.sum(load_tile(p_dy + n * dy_n * DY_UNIT, o_dy, m_pixel, m_k, FULL).to(tl.float32), 0)
        tl.store(p_sums + R * S * size + k, bias, as_mask(m_k & (i_i == 0) & (i_tap == 0)))
