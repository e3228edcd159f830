"""Large depthwise kernels: blocks of outputs stay in registers, and blocks of taps stream past."""

from __future__ import annotations

import triton
import triton.language as tl

from gconv.kernels.depthwise import locate_depthwise, repeat
from gconv.kernels.epilogue import Sink, emit, load_bias
from gconv.kernels.packing import COUNTS, load_tile, locate_columns

FAR = tl.constexpr(2**29)  # a column outside every image


@triton.jit
def load_block(p_w, taps, fresh, m_channel, BR: tl.constexpr, BS: tl.constexpr):
    """Load the weights of a block of taps, zero for taps that another block has  # each [1, BO]

    Args:
        p_w: pointers to the weights of the block's first tap, one for each channel.
        taps: distance from one tap to the next, along the kernel's rows and columns.
        fresh: number of the block's first rows and columns that another block has.
        m_channel: a tuple of the mask of existing channels; empty if all exist.
    """
    weights = ()
    for t in tl.static_range(BR * BS):
        p_tap = p_w + (t // BS * taps[0] + t % BS * taps[1])
        weight = tl.load(p_tap) if len(m_channel) == 0 else tl.load(p_tap, m_channel[0], 0.0)
        weight = tl.where((t // BS >= fresh[0]) & (t % BS >= fresh[1]), weight.to(tl.float32), 0.0)
        weights = weights + (weight[None, :],)
    return weights


@triton.jit
def add_block(sums, x, weights, u: tl.constexpr, v: tl.constexpr, T: tl.constexpr, BS: tl.constexpr):
    """Return sums[i, t] + x weights[u - i, v - t] for the outputs (row i, column t) that meet x[u, v]."""
    added = ()
    for o in tl.static_range(len(sums)):
        if (o // T <= u) & ((u - o // T) * BS < len(weights)) & (o % T <= v) & (v - o % T < BS):
            added = added + (sums[o] + x * weights[(u - o // T) * BS + v - o % T],)
        else:
            added = added + (sums[o],)
    return added


@triton.jit(do_not_specialize=[*COUNTS, "x_n", "x_h", "columns", "R", "S", "y_w"])
def depthwise_blocks_kernel(
    p_x, p_w, p_bias, p_y, p_side,
    packs, groups, columns, H, W, P, Q, R, S, top, left, x_n, x_h, y_w,
    STEP: tl.constexpr, FLIP: tl.constexpr, ACTIVATION: tl.constexpr, EPILOGUE: tl.constexpr,
    FULL: tl.constexpr, WIDE: tl.constexpr, X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr,
    PB: tl.constexpr, T: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr,
    BM: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Stride and dilation 1: sum PB rows of T adjacent columns at a time, over all taps.

        y[p, q] = sum over r, s of x[p - top + r, q - left + s] w[r, s], elementwise along the channels

    A block of BR x BS taps meets (PB + BR - 1) x (T + BS - 1) pixels of x, each loaded once for all outputs.
    The last block begins early enough to end with the kernel, and its taps that the previous block has count
    as zero. Blocks whose rows are outside the image are skipped. Weights are laid out (R, S, channels); FLIP
    means that the last tap comes first.

    Grid: blocks of BO channels, fastest; tiles of BM strips of T columns, ``columns`` in all; blocks of rows.

    In registers: the PB T sums [BM, BO], and the weights of the block's taps. STEP, the distance from a pixel
    of x to the next, is a constant, so that loads along a row share an address.
    """
    i_pack = tl.program_id(0) % packs
    i_m = tl.program_id(0) // packs % tl.cdiv(columns, BM)
    p = tl.program_id(0) // packs // tl.cdiv(columns, BM) * PB

    n, image, strip, m_strip = locate_columns(i_m, columns, tl.cdiv(Q, T), BM, WIDE)
    c, m_c = locate_depthwise(i_pack, groups, BO)
    m_channel = () if FULL else (m_c,)
    channels = y_w * Y_UNIT
    j = tl.where(m_strip, strip * T - left, FAR)
    o_x = (image * x_n * X_UNIT + (strip * T - left) * STEP)[:, None] + c[None, :]
    tap = -channels if FLIP else channels
    p_w += c + ((R * S - 1) * channels if FLIP else 0)
    sums = repeat(tl.zeros([BM, BO], tl.float32), PB * T)
    across = tl.cdiv(S, BS)
    begin = tl.maximum(top - p - (PB - 1), 0) // BR * across
    end = tl.cdiv(tl.minimum(R, H + top - p), BR) * across
    for i in range(begin, end):
        r, s = tl.minimum(i // across * BR, R - BR), tl.minimum(i % across * BS, S - BS)
        fresh = (i // across * BR - r, i % across * BS - s)
        weights = load_block(p_w + (r * S + s) * tap, (S * tap, tap), fresh, m_channel, BR, BS)
        h, w = p - top + r, j + s
        p_row = p_x + (n * x_n + h.to(tl.int64) * x_h) * X_UNIT + s * STEP + o_x
        for u in tl.static_range(PB + BR - 1):
            w_row = w + tl.where((h + u >= 0) & (h + u < H), 0, FAR)
            for v in tl.static_range(T + BS - 1):
                m_x = (w_row + v).to(tl.uint32) < W.to(tl.uint32)
                x = load_tile(p_row, v * STEP, m_x, m_c, FULL).to(tl.float32)
                sums = add_block(sums, x, weights, u, v, T, BS)
            p_row += x_h * X_UNIT

    q = strip * T
    o_y = ((image * P * Q + q) * channels)[:, None] + c[None, :]
    sink = Sink(p_y, p_side, load_bias(p_bias, c, m_c), o_y, 0, (), m_channel, ())
    at = (n * P + p) * Q * channels
    for o in tl.static_range(PB * T):
        m_y = m_strip & (q + o % T < Q) & (p + o // T < P)
        emit(sums[o], (), 1, sink, at + (o // T * Q + o % T) * channels, m_y, ACTIVATION, EPILOGUE)
