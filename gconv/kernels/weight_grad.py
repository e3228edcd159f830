"""The weight and bias gradients: partial sums over slices of the batch, then their sum in fixed order."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from gconv.geometry import ConvGeometry
from gconv.kernels import tiles
from gconv.kernels.depthwise import depthwise_slide_weight_kernel, depthwise_weight_kernel
from gconv.kernels.fusion import PLAIN, Fusion, load_norm, normalise, normalise_row
from gconv.kernels.launch import PLANS_KEPT, Launch, Operands, channels_last
from gconv.kernels.packing import (
    as_mask,
    dot,
    load_row,
    load_tile,
    locate_channels,
    locate_columns,
    mask_columns,
)
from gconv.kernels.strips_weight import strips_weight_kernel, walk_of_weights

COUNTS = ["packs", "groups", "columns", "H", "W", "P", "Q", "top", "left"]
STRIDES = ["dy_n", "dy_h", "dy_w", "x_n", "x_h", "x_w"]


@triton.jit
def add_row(sums, dy, x, PRECISION: tl.constexpr):
    """The sums of a kernel row's three taps, each + dy.T @ x  # [BO, BI]"""
    dy = tl.trans(dy)
    s0 = dot(dy, x[0], sums[0], PRECISION)
    s1 = dot(dy, x[1], sums[1], PRECISION)
    s2 = dot(dy, x[2], sums[2], PRECISION)
    return s0, s1, s2


@triton.jit
def locate_sums(i_i, i_o, k, m_k, CI: tl.constexpr, CO: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr):
    """Offsets of a tile's diagonal blocks in sums laid out (K, C / groups), and their mask  # [BO, BI]"""
    i, o = i_i * BI + tl.arange(0, BI), i_o * BO + tl.arange(0, BO)
    m = ((o // CO)[:, None] == (i // CI)[None, :]) & m_k[:, None]
    return (k * CI)[:, None] + (i % CI)[None, :], m


@triton.jit
def store_row(p, offset, step, sums, mask):
    """The sums of a kernel row's three taps, ``step`` numbers apart."""
    tl.store(p + offset, sums[0], mask)
    tl.store(p + step + offset, sums[1], mask)
    tl.store(p + 2 * step + offset, sums[2], mask)


@triton.jit(do_not_specialize=[*COUNTS, "rows", *STRIDES])
def slide_weight_kernel(
    p_dy, p_x, p_sums, p_norm,
    packs, groups, columns, H, W, P, Q, rows, top, left, step_w, tap_w,
    dy_n, dy_h, dy_w, x_n, x_h, x_w,
    CI: tl.constexpr, CO: tl.constexpr, G: tl.constexpr, STRIDE: tl.constexpr,
    BIAS: tl.constexpr, PROLOGUE: tl.constexpr, PRECISION: tl.constexpr,
    FULL: tl.constexpr, WIDE: tl.constexpr, X_UNIT: tl.constexpr, DY_UNIT: tl.constexpr,
    BM: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Partial sums for 3x3, vertical stride 1 or 2: slides down the rows of dy and x and loads each once.

        sums[split, r, s] = sum over the split's n, p, q of dy[n, p, q] x[n, h, w]
        where  h = p STRIDE - top + r,  w = q step_w - left + s tap_w

    Grid: packs of channels, fastest; blocks of a pack's outputs, then inputs; splits, each of which takes
    ``rows`` rows of dy, numbered through tiles of BM columns.

    In registers: the nine sums [BO, BI], one row's three x tiles [BM, BI], and the dy tiles [BM, BO] that
    meet it: three at stride 1, which move up as the rows move down, two at stride 2. In shared memory: the
    rows that are on their way.
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
        # Rows of x below the image add nothing; those beside rows of dy are the bias gradient's.
        for h in range(h0, tl.minimum(last + 2, tl.maximum(last, H)), STRIDE):
            dy0 = load_tile(p_grad, o_dy, m_column & (h < last), m_k, FULL)
            x = load_row(p_row, o_x, step, m_x, (h >= 0) & (h < H), m_c, FULL)
            a = normalise_row(x, norm, m_x, (h >= 0) & (h < H), PROLOGUE)
            sums0 = add_row(sums0, dy0, a, PRECISION)
            if STRIDE == 1:
                sums1 = add_row(sums1, dy1, a, PRECISION)
                sums2 = add_row(sums2, dy2, a, PRECISION)
                # Triton loads ahead only in loops that hand on what they made, so dy1 is made anew, as it is.
                dy2 = tl.where(h >= h0, dy1, 0.0)
            else:
                sums2 = add_row(sums2, dy1, a, PRECISION)
                x = load_row(p_row + x_h * X_UNIT, o_x, step, m_x, (h + 1 >= 0) & (h + 1 < H), m_c, FULL)
                a = normalise_row(x, norm, m_x, (h + 1 >= 0) & (h + 1 < H), PROLOGUE)
                sums1 = add_row(sums1, dy0, a, PRECISION)
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


@triton.jit(do_not_specialize=[*COUNTS, "splits", *STRIDES])
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
    """Partial sums for any geometry, one tap a program.

        sums[split, r, s] = sum over the split's n, p, q of dy[n, p, q] x[n, p STEP_H + r TAP_H - top, ...]

    Grid: packs of channels, fastest; blocks of a pack's outputs, then inputs; taps; splits, each of which
    takes every ``splits``-th tile of BM pixels, numbered through images, rows and columns.

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
        # In a loop of its own: where dy is summed beside the product, Triton copies the next tile of dy over
        # the one that wgmma still reads.
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


@triton.jit(do_not_specialize=["splits", "size", "weights", "K", "CI", "S", "dw_k", "dw_c", "dw_r", "dw_s"])
def reduce_kernel(
    p_sums, p_dw, p_db, splits, size, weights, K, CI, S, dw_k, dw_c, dw_r, dw_s,
    BS: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """dw and db = the partial sums, added up over the splits in fixed order and rounded once.

    Grid: tiles of BE of the ``size`` sums: ``weights`` of them laid out (R, S, K, C / groups), then the K of
    the bias. In registers: BS running totals of each, [BS, BE], added up at the end.
    """
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    split = tl.arange(0, BS)
    total = tl.zeros([BS, BE], tl.float32)
    for start in range(0, splits, BS):
        o = (start + split).to(tl.int64)[:, None] * size + e[None, :]
        total += tl.load(p_sums + o, (start + split < splits)[:, None] & (e < size)[None, :], 0.0)
    total = tl.sum(total, 0).to(p_dw.dtype.element_ty)
    tap, k, c = e // (K * CI), e // CI % K, e % CI
    tl.store(p_dw + k * dw_k + c * dw_c + tap // S * dw_r + tap % S * dw_s, total, e < weights)
    tl.store(p_db + (e - weights), total, (e >= weights) & (e < size))


REDUCTION = tiles.Tile("reduce", groups=1, pixels=16, inputs=64, outputs=64, warps=4)


def weight_grad(
    grad_output: Tensor,
    input: Tensor,
    geometry: ConvGeometry,
    with_bias: bool,
    tile: tiles.Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dw (K, C / groups, R, S) and, if asked, dbias (K,), from grad_output (N, K, P, Q) and input."""
    return run_weight_grad(grad_output, input, None, geometry, with_bias, tile)


def norm_weight_grad(
    grad_output: Tensor,
    input: Tensor,
    norm: Tensor,
    geometry: ConvGeometry,
    with_bias: bool,
    tile: tiles.Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The same where relu(scale input + shift) was convolved; ``norm`` (3, C), float32."""
    return run_weight_grad(grad_output, input, norm, geometry, with_bias, tile)


def run_weight_grad(
    grad_output: Tensor,
    input: Tensor,
    norm: Tensor | None,
    geometry: ConvGeometry,
    with_bias: bool,
    tile: tiles.Tile | None,
) -> tuple[Tensor, Tensor | None]:
    """dw and, if asked, dbias; ``norm`` None for the input as it is."""
    dy, x = channels_last(grad_output), channels_last(input)
    layout = torch.channels_last if dy is grad_output or x is input else torch.contiguous_format
    dw = torch.empty(geometry.weight_size, dtype=x.dtype, device=x.device, memory_format=layout)
    db = dw.new_empty(geometry.weight_size[0] if with_bias else 0)
    if not dy.numel():
        dw.zero_(), db.zero_()
    else:
        fusion = Fusion(with_bias, prologue=norm is not None)
        plan, splits, size = plan_weight_grad(geometry, Operands.of(dy, x), fusion, tile)
        sums = torch.empty((splits, size), dtype=torch.float32, device=x.device)
        plan(dy, x, sums, x if norm is None else norm)
        plan_reduce(geometry, splits, size, dw.stride())(sums, dw, db)
    return dw, db if with_bias else None


@lru_cache(PLANS_KEPT)
def plan_weight_grad(
    geometry: ConvGeometry, operands: Operands, fusion: Fusion = PLAIN, tile: tiles.Tile | None = None
) -> tuple[Launch, int, int]:
    """How the partial sums of ``geometry`` are made from dy and x as ``operands`` describes them.

    In ``tile``, or in the one that is chosen for it.

    Returns:
        The launch; how many partial sums there are of each number; how many numbers.
    """
    tile = tile or fusion.tile("weight_grad", geometry, operands)
    tile = tiles.with_whole_packs(tile, geometry.groups, *geometry.channels_per_group)
    (n, _, h, w), (_, _, p, q) = geometry.input_size, geometry.output_size
    (k, _, r, s), (cg, kg), groups = geometry.weight_size, geometry.channels_per_group, geometry.groups
    size = k * (cg * r * s + fusion.bias)
    columns = n * p * q if tile.kernel == "taps" else n * q
    column_tiles = -(-columns // tile.pixels)
    if tile.depthwise:
        programs = -(-groups // tile.outputs)
        packs = programs
    else:
        packs = -(-groups // (tile.groups * tile.packs))
        programs = packs * -(-tile.groups * kg // tile.outputs) * -(-tile.groups * cg // tile.inputs)
        programs *= r * s if tile.kernel == "taps" else 1
    places = {}
    if tile.kernel == "strips":
        walk = walk_of_weights(geometry, tile, programs, 4 * size, operands.device)
        rows, splits, places = walk.rows, walk.parts * walk.splits, walk._asdict()
    elif tile.kernel == "slide":
        rows, splits = tiles.rows_of_split(column_tiles * p, programs, 4 * size, tile, operands.device)
    else:
        rows = tiles.rows_in_chunk(p, programs * column_tiles, tile, operands.device)
        items = column_tiles * (1 if tile.kernel == "taps" else -(-p // rows))
        splits = tiles.splits_of(items, programs, 4 * size, tile, operands.device)
    (dy_n, _, dy_h, dy_w), (x_n, _, x_h, x_w) = operands.first, operands.second
    dy_unit = tiles.common_unit(tiles.WIDEST, operands.dtype, dy_n, dy_h, dy_w)
    x_unit = tiles.common_unit(tile.load, operands.dtype, x_n, x_h, x_w)
    values = places | {
        "packs": packs,
        "groups": groups,
        "columns": columns,
        "H": h,
        "W": w,
        "P": p,
        "Q": q,
        "rows": rows,
        "top": geometry.padding.top,
        "left": geometry.padding.left,
        "splits": splits,
        "step_w": geometry.stride[1],
        "tap_w": geometry.dilation[1],
        **{"dy_n": dy_n // dy_unit, "dy_h": dy_h // dy_unit, "dy_w": dy_w // dy_unit, "DY_UNIT": dy_unit},
        **{"x_n": x_n // x_unit, "x_h": x_h // x_unit, "x_w": x_w // x_unit, "X_UNIT": x_unit},
        **{"CI": cg, "CO": kg, "G": tile.groups, "STRIDE": geometry.stride[0], "R": r, "S": s},
        **{"STEP_H": geometry.stride[0], "STEP_W": geometry.stride[1]},
        **{"TAP_H": geometry.dilation[0], "TAP_W": geometry.dilation[1]},
        **fusion.values,
        "PRECISION": operands.precision,
        "FULL": tiles.fills(tile, groups, cg, kg) or tiles.overlaps(tile, cg, kg),
        "WIDE": tiles.is_wide(
            tile, -(-q // tile.columns), (x_n, dy_n), (h * x_h, w * x_w, p * dy_h, q * dy_w)
        ),
        **{"BM": tile.pixels, "BI": tile.inputs, "BO": tile.outputs, "BT": tiles.power_of_two(r * s)},
        **{"T": tile.columns, "B": tile.packs},
    }
    kernel = KERNELS[tile.kernel]
    return Launch.of(kernel, programs * splits, values, tile), splits, size


KERNELS = {
    "strips": strips_weight_kernel,
    "slide": slide_weight_kernel,
    "taps": taps_weight_kernel,
    "depthwise-slide": depthwise_slide_weight_kernel,
    "depthwise": depthwise_weight_kernel,
}


@lru_cache(PLANS_KEPT)
def plan_reduce(geometry: ConvGeometry, splits: int, size: int, strides: tuple[int, ...]) -> Launch:
    """How the partial sums become dw, of ``strides``, and db."""
    k, cg, r, s = geometry.weight_size
    values = {"splits": splits, "size": size, "weights": k * cg * r * s, "CI": cg, "K": k, "S": s}
    values |= {"dw_k": strides[0], "dw_c": strides[1], "dw_r": strides[2], "dw_s": strides[3]}
    values |= {"BS": REDUCTION.pixels, "BE": REDUCTION.outputs}
    return Launch.of(reduce_kernel, -(-size // REDUCTION.outputs), values, REDUCTION)
