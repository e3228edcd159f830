"""What the kernels share: columns of pixels, packs of groups, and the products of their tiles.

Names in kernels: ``p_`` a pointer, ``o_`` offsets from it, ``m_`` a mask, ``i_`` the index of a program or a
loop; BM, BI, BO the sides of a tile (pixels, inputs, outputs), powers of two; ``# [BM, BI]`` a tile's shape.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton import knobs

# The interpreter multiplies the bit patterns of bfloat16, so it gets float32 operands, the type of the sums.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


# Plain counts. Their divisibility doesn't help the compiler, so one binary serves all values.
COUNTS = ["packs", "groups", "H", "W", "P", "Q", "top", "left"]
STRIDES = ["x_n", "x_h", "x_w"]
WEIGHTS = ["w_0", "w_g", "w_i", "w_o", "w_r", "w_s"]
WALK = ["images", "strips", "group", "parts", "turns", "rows"]


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a @ b in float32. PRECISION ("tf32" or "ieee") is how float32 operands are multiplied."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def identity(tile, SIDE: tl.constexpr):
    """Return the identity in the type of ``tile``  # [SIDE, SIDE], or [B, SIDE, SIDE] if it is a batch"""
    lane = tl.arange(0, SIDE)
    ones = tl.where(lane[:, None] == lane[None, :], 1.0, 0.0).to(tile.dtype)
    if len(tile.shape) == 3:
        ones = tl.broadcast_to(ones[None, :, :], tile.shape[0], SIDE, SIDE)
    return ones


@triton.jit
def locate_columns(i_m, columns, Q, BM: tl.constexpr, WIDE: tl.constexpr):
    """Locate a tile of columns: its first image; for each column its image from there, q and mask  # [BM]

    The columns of all images are numbered consecutively, so that narrow images (14 pixels, 7) waste no lanes.
    """
    m = i_m * BM + tl.arange(0, BM)
    first = i_m * BM // Q
    image = m // Q - first
    if WIDE:
        image = image.to(tl.int64)
    return first.to(tl.int64), image, m % Q, m < columns


@triton.jit
def locate_strips(i_part, group, strips, BM: tl.constexpr, WIDE: tl.constexpr):
    """Locate a tile of a group's strips: image of the group, strip of the image, mask  # [BM]"""
    m = i_part * BM + tl.arange(0, BM)
    image = m // strips
    if WIDE:
        image = image.to(tl.int64)
    return image, m % strips, m < group * strips


@triton.jit
def locate_channels(i_pack, i_block, groups, CHANNELS: tl.constexpr, G: tl.constexpr, B: tl.constexpr):
    """Return the channels of a block in a pack of G groups of CHANNELS each, and their mask  # [B]"""
    lane = i_block * B + tl.arange(0, B)
    channel = i_pack * (G * CHANNELS) + lane
    if G == 1:
        return channel, lane < CHANNELS
    return channel, (lane < G * CHANNELS) & (channel < groups * CHANNELS)


class Weights(NamedTuple):
    """The compact weights in memory.

    Args:
        p: pointer to the first weight.
        groups: number of groups.
        g, i, o, r, s: strides along groups, inputs and outputs of a group, rows and columns of the kernel.
    """

    p: Any
    groups: Any
    g: Any
    i: Any
    o: Any
    r: Any
    s: Any


@triton.jit
def locate_weights(
    i_pack, block, w,
    CI: tl.constexpr, CO: tl.constexpr, G: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Return offsets and mask of a block-diagonal tile in the compact weights  # [BI, BO]

    If input i and output o of the pack are in one group, entry (i, o) is their weight. All other entries are
    zero; these zeros are masked loads and never in memory. ``block``: block of inputs, block of outputs.
    """
    i = block[0] * BI + tl.arange(0, BI)
    o = block[1] * BO + tl.arange(0, BO)
    if G == 1:
        return i_pack * w.g + (i * w.i)[:, None] + (o * w.o)[None, :], (i < CI)[:, None] & (o < CO)[None, :]
    g = i // CI
    group = i_pack * G + g
    offset = (group * w.g + (i % CI) * w.i)[:, None] + ((o % CO) * w.o)[None, :]
    return offset, (g[:, None] == (o // CO)[None, :]) & ((g < G) & (group < w.groups))[:, None]


@triton.jit
def locate_sums(i_i, i_o, k, m_k, CI: tl.constexpr, CO: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr):
    """Return offsets of a tile's diagonal blocks in sums laid out (K, C / groups), and a mask  # [BO, BI]"""
    i, o = i_i * BI + tl.arange(0, BI), i_o * BO + tl.arange(0, BO)
    m = ((o // CO)[:, None] == (i // CI)[None, :]) & m_k[:, None]
    return (k * CI)[:, None] + (i % CI)[None, :], m


@triton.jit
def as_mask(m):
    """Return a mask that was combined with a scalar condition, in the form that loads and stores accept.

    The interpreter broadcasts the result of a scalar comparison as integers, which it rejects as a mask from
    Triton 3.9 on. Compiled, this is ``m``.
    """
    if INTERPRETED:
        return m != 0
    return m


@triton.jit
def load_tile(p, offset, m_pixel, m_channel, FULL: tl.constexpr):
    """Load pixels x channels, zero where a mask is off. FULL: all channels exist, so mask pixels only."""
    m_pixel = as_mask(m_pixel)
    if FULL:
        return tl.load(p + offset, mask=m_pixel[:, None], other=0.0)
    return tl.load(p + offset, mask=m_pixel[:, None] & m_channel[None, :], other=0.0)


@triton.jit
def store_tile(p, offset, tile, m_pixel, m_channel, FULL: tl.constexpr):
    """Store what ``load_tile`` loads, rounded to the type in memory."""
    tile = tile.to(p.dtype.element_ty)
    m_pixel = as_mask(m_pixel)
    if FULL:
        tl.store(p + offset, tile, mask=m_pixel[:, None])
    else:
        tl.store(p + offset, tile, mask=m_pixel[:, None] & m_channel[None, :])


@triton.jit
def mask_columns(j, step, W, m_column):
    """Return which columns are in the image, for three taps ``step`` pixels apart, starting at ``j``."""
    return (
        m_column & (j >= 0) & (j < W),
        m_column & (j + step >= 0) & (j + step < W),
        m_column & (j + 2 * step >= 0) & (j + 2 * step < W),
    )


@triton.jit
def load_row(p, offset, step, m_columns, inside, m_channel, FULL: tl.constexpr):
    """Load what the three taps of a kernel row meet in one row of the image, each  # [BM, B]"""
    x0 = load_tile(p, offset, m_columns[0] & inside, m_channel, FULL)
    x1 = load_tile(p, offset + step, m_columns[1] & inside, m_channel, FULL)
    x2 = load_tile(p, offset + 2 * step, m_columns[2] & inside, m_channel, FULL)
    return x0, x1, x2


@triton.jit
def load_weight_row(p, step, mask):
    """Load the weights of a kernel row's three taps, each  # [BI, BO]"""
    return tl.load(p, mask, 0.0), tl.load(p + step, mask, 0.0), tl.load(p + 2 * step, mask, 0.0)


@triton.jit
def load_kernel(
    i_pack, w, CI: tl.constexpr, CO: tl.constexpr, G: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr
):
    """Load the weights of a pack's 3x3 taps: three rows of three block-diagonal tiles, each  # [BI, BO]"""
    offset, mask = locate_weights(i_pack, (0, 0), w, CI, CO, G, BI, BO)
    p = w.p + offset
    return (
        load_weight_row(p, w.s, mask),
        load_weight_row(p + w.r, w.s, mask),
        load_weight_row(p + 2 * w.r, w.s, mask),
    )


@triton.jit
def dot_row(x, w, acc, PRECISION: tl.constexpr):
    """Return acc + x[0] @ w[0] + x[1] @ w[1] + x[2] @ w[2]  # [BM, BO]"""
    acc = dot(x[0], w[0], acc, PRECISION)
    acc = dot(x[1], w[1], acc, PRECISION)
    return dot(x[2], w[2], acc, PRECISION)
