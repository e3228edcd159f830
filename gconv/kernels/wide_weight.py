"""The weight gradient of 3x3 kernels for groups of more than 32 channels."""

import triton
import triton.language as tl

from gconv.kernels.fusion import load_norm, normalise
from gconv.kernels.packing import (
    INTERPRETED,
    as_mask,
    dot,
    load_tile,
    locate_channels,
    locate_columns,
    locate_sums,
    mask_columns,
    store_row,
)


@triton.jit
def load_transposed(p, offset, m_pixel, m_channel, norm, PROLOGUE: tl.constexpr, FULL: tl.constexpr):
    """A row of x as a column of the kernel meets it, channels by pixels  # [BI, BM]"""
    m_pixel = as_mask(m_pixel)
    m = m_pixel[None, :]
    if not FULL:
        m = m & m_channel[:, None]
    x = tl.load(p + offset, m, 0.0)
    if PROLOGUE:
        x = tl.trans(normalise(tl.trans(x), norm, m_pixel, PROLOGUE))
    return x


@triton.jit
def renewed(tile):
    """``tile`` itself. Triton loads ahead only in loops that hand on what they made, so it is made anew.

    The assembler leaves out these moves of pairs; a ``tl.where`` takes three instructions a pair.
    """
    if INTERPRETED:
        return tile
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tile], tile.dtype, is_pure=True, pack=2)


@triton.jit
def add(sums, dy0, dy1, dy2, x):
    """The sums of a kernel column's three taps, each + x @ dy  # [BI, BO]"""
    return dot(x, dy0, sums[0], "ieee"), dot(x, dy1, sums[1], "ieee"), dot(x, dy2, sums[2], "ieee")


@triton.jit
def add_outer(sums, dy0, dy1, x):
    """The same for the outer two, with what stride 2 meets in an even row of x."""
    return dot(x, dy0, sums[0], "ieee"), sums[1], dot(x, dy1, sums[2], "ieee")


@triton.jit
def add_middle(sums, dy0, x):
    """The same for the middle one, in an odd row."""
    return sums[0], dot(x, dy0, sums[1], "ieee"), sums[2]


@triton.jit(
    do_not_specialize=[
        "packs", "groups", "columns", "H", "W", "P", "Q", "top", "left", "splits",
        "dy_n", "dy_h", "dy_w", "x_n", "x_h", "x_w",
    ]
)  # fmt: skip
def wide_weight_kernel(
    p_dy, p_x, p_sums, p_norm,
    packs, groups, columns, H, W, P, Q, top, left, splits,
    dy_n, dy_h, dy_w, x_n, x_h, x_w,
    CI: tl.constexpr, CO: tl.constexpr, G: tl.constexpr, STRIDE: tl.constexpr,
    BIAS: tl.constexpr, PROLOGUE: tl.constexpr,
    FULL: tl.constexpr, WIDE: tl.constexpr, X_UNIT: tl.constexpr, DY_UNIT: tl.constexpr,
    BM: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Partial sums for 3x3, stride 1 or 2: slides down the rows of dy and x, as the slide does.

        sums[split, r, s] = sum over the split's n, p, q of dy[n, p, q] x[n, p STRIDE - top + r, ...]

    It differs from :func:`~gconv.kernels.weight_grad.slide_weight_kernel` in what leaves registers to sums of
    four times the size: a tile of x is loaded where it is multiplied, not a row's three of them before, and
    comes transposed from memory; the bias gradient has a loop of its own.

    Grid: groups, fastest; blocks of a group's outputs, then inputs; splits, each of which takes every
    ``splits``-th tile of BM columns.

    In registers: the nine sums [BI, BO], a tuple for each column of the kernel, and the dy tiles [BM, BO]
    that a row of x meets: three at stride 1, which move up as the rows move down, two at stride 2. In shared
    memory: the rows that are on their way.
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
    zero = tl.zeros([BI, BO], tl.float32)
    sums0 = (zero, zero, zero)
    sums1 = (zero, zero, zero)
    sums2 = (zero, zero, zero)
    step = x_w * X_UNIT
    for i_m in range(i_split, tl.cdiv(columns, BM), splits):
        n, image, q, m_column = locate_columns(i_m, columns, Q, BM, WIDE)
        j = q * STRIDE - left
        m_x = mask_columns(j, 1, W, m_column)
        o_x = ((image * x_n + j * x_w) * X_UNIT)[None, :] + c[:, None]
        o_dy = ((image * dy_n + q * dy_w) * DY_UNIT)[:, None] + k[None, :]
        p_row = p_x + (n * x_n - top * x_h.to(tl.int64)) * X_UNIT
        p_grad = p_dy + n * dy_n * DY_UNIT
        dy1 = tl.zeros([BM, BO], p_dy.dtype.element_ty)
        dy2 = tl.zeros([BM, BO], p_dy.dtype.element_ty)
        for h in range(-top, tl.minimum(P * STRIDE - top + 2, H), STRIDE):
            dy0 = load_tile(p_grad, o_dy, m_column & (h < P * STRIDE - top), m_k, FULL)
            inside = (h >= 0) & (h < H)
            if STRIDE == 1:
                x = load_transposed(p_row, o_x, m_x[0] & inside, m_c, norm, PROLOGUE, FULL)
                sums0 = add(sums0, dy0, dy1, dy2, x)
                x = load_transposed(p_row, o_x + step, m_x[1] & inside, m_c, norm, PROLOGUE, FULL)
                sums1 = add(sums1, dy0, dy1, dy2, x)
                x = load_transposed(p_row, o_x + 2 * step, m_x[2] & inside, m_c, norm, PROLOGUE, FULL)
                sums2 = add(sums2, dy0, dy1, dy2, x)
                dy2 = renewed(dy1)
            else:
                x = load_transposed(p_row, o_x, m_x[0] & inside, m_c, norm, PROLOGUE, FULL)
                sums0 = add_outer(sums0, dy0, dy1, x)
                x = load_transposed(p_row, o_x + step, m_x[1] & inside, m_c, norm, PROLOGUE, FULL)
                sums1 = add_outer(sums1, dy0, dy1, x)
                x = load_transposed(p_row, o_x + 2 * step, m_x[2] & inside, m_c, norm, PROLOGUE, FULL)
                sums2 = add_outer(sums2, dy0, dy1, x)
                p_odd, inside = p_row + x_h * X_UNIT, (h + 1 >= 0) & (h + 1 < H)
                x = load_transposed(p_odd, o_x, m_x[0] & inside, m_c, norm, PROLOGUE, FULL)
                sums0 = add_middle(sums0, dy0, x)
                x = load_transposed(p_odd, o_x + step, m_x[1] & inside, m_c, norm, PROLOGUE, FULL)
                sums1 = add_middle(sums1, dy0, x)
                x = load_transposed(p_odd, o_x + 2 * step, m_x[2] & inside, m_c, norm, PROLOGUE, FULL)
                sums2 = add_middle(sums2, dy0, x)
            dy1 = dy0
            p_grad += dy_h * DY_UNIT
            p_row += STRIDE * x_h * X_UNIT

    o_sums, m_sums = locate_sums(i_pack, i_i, i_o, groups, CI, CO, G, BI, BO)
    o_sums, m_sums = tl.trans(o_sums), tl.trans(m_sums)
    size = groups * CO * CI
    p_sums += i_split.to(tl.int64) * (9 * size + BIAS * groups * CO)
    store_row(p_sums, o_sums, 3 * size, sums0, m_sums)
    store_row(p_sums + size, o_sums, 3 * size, sums1, m_sums)
    store_row(p_sums + 2 * size, o_sums, 3 * size, sums2, m_sums)
    if BIAS:
        bias = tl.zeros([BM, BO], tl.float32)
        for i_m in range(i_split, tl.where(i_i == 0, tl.cdiv(columns, BM), 0), splits):
            n, image, q, m_column = locate_columns(i_m, columns, Q, BM, WIDE)
            o_dy = ((image * dy_n + q * dy_w) * DY_UNIT)[:, None] + k[None, :]
            p_grad = p_dy + n * dy_n * DY_UNIT
            for _ in range(P):
                bias += load_tile(p_grad, o_dy, m_column, m_k, FULL).to(tl.float32)
                p_grad += dy_h * DY_UNIT
        tl.store(p_sums + 9 * size + k, tl.sum(bias, 0), as_mask(m_k & (i_i == 0)))
