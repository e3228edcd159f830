"""The forward pass: kernels, then their launcher, which the input gradient uses too."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gconv.geometry import ConvGeometry
from gconv.kernels import tiles
from gconv.kernels.correlation import Correlation
from gconv.kernels.depthwise import depthwise_kernel, depthwise_slide_kernel
from gconv.kernels.fusion import (
    PARTIALS,
    PLAIN,
    Fusion,
    Sink,
    emit,
    load_bias,
    load_norm,
    merge,
    normalise,
    normalise_row,
    store_sums,
)
from gconv.kernels.launch import PLANS_KEPT, Launch, Operands, channels_last, empty_channels_last
from gconv.kernels.packing import (
    Weights,
    dot,
    dot_row,
    load_kernel,
    load_row,
    load_tile,
    locate_channels,
    locate_columns,
    locate_weights,
    mask_columns,
)
from gconv.kernels.strips import packed, plan_strips

# Plain counts, whose divisibility tells the compiler nothing: one binary serves them all.
COUNTS = ["packs", "groups", "columns", "H", "W", "P", "Q", "rows", "top", "left", "x_n", "x_h", "x_w", "y_w"]
WEIGHTS = ["w_0", "w_g", "w_i", "w_o", "w_r", "w_s"]


@triton.jit(do_not_specialize=COUNTS + WEIGHTS)
def slide_kernel(
    p_x, p_w, p_bias, p_y, p_norm, p_side, p_sums,
    packs, groups, columns, H, W, P, Q, rows, top, left, step_w, tap_w,
    x_n, x_h, x_w, y_w, w_0, w_g, w_i, w_o, w_r, w_s,
    CI: tl.constexpr, CO: tl.constexpr, G: tl.constexpr, STRIDE: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PROLOGUE: tl.constexpr, EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr,
    X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """3x3, vertical stride 1 or 2: slides down the rows of x and loads each once for every output it feeds.

        y[p] = x[p STRIDE - top] w[0] + x[p STRIDE - top + 1] w[1] + x[p STRIDE - top + 2] w[2]

    where x[h] w[r] sums three taps, column-shifted loads of the row that meet in L1.

    Grid: packs of channels, fastest, so that neighbours complete each other's cache lines; tiles of BM
    columns; chunks of ``rows`` output rows.

    In registers: one row's three x tiles [BM, BI], and the sums [BM, BO] of the outputs that the row feeds:
    three at stride 1, which move up as the rows move down, two at stride 2. In shared memory: the nine weight
    tiles [BI, BO], and the rows that are on their way.
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
    bias = load_bias(p_bias, k, m_k, BIAS)
    sink = Sink(p_y, p_side, bias, o_y, 0, (), () if FULL else (m_k,), norm)
    h0 = first * STRIDE - top
    step = tap_w * x_w * X_UNIT
    zero = tl.zeros([BM, BO], tl.float32)
    sums = (zero, zero)
    if STRIDE == 1:
        last, middle = zero, zero
        # Rows above the image add nothing, but for those at which an output row is complete.
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


@triton.jit(do_not_specialize=COUNTS)
def taps_kernel(
    p_x, p_w, p_bias, p_y, p_norm, p_side, p_sums,
    packs, groups, columns, H, W, P, Q, top, left,
    x_n, x_h, x_w, y_w, w_0, w_g, w_i, w_o, w_r, w_s,
    CI: tl.constexpr, CO: tl.constexpr, G: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, DIVISOR_H: tl.constexpr, DIVISOR_W: tl.constexpr,
    TAP_H: tl.constexpr, TAP_W: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PROLOGUE: tl.constexpr, EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr,
    X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Any geometry: one matrix product for each tap and block of input channels, summed in order.

    The equation is :class:`~gconv.kernels.correlation.Correlation`'s.

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
    bias = load_bias(p_bias, k, m_k, BIAS)
    sink = Sink(p_y, p_side, bias, o_y, 0, (), () if FULL else (m_k,), norm)
    sums = emit(acc, (zero, zero), 1, sink, at, m_pixel, ACTIVATION, EPILOGUE)
    store_sums(p_sums, i_m, sums, m_pixel.to(tl.int32), groups * CO, k, m_k, EPILOGUE)


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    activation: str | None,
    residual: Tensor | None = None,
    tile: tiles.Tile | None = None,
) -> Tensor:
    """y = activation(conv(input) + bias + residual), channels_last.

    y and residual are (N, K, P, Q), input (N, C, H, W), weight (K, C / groups, R, S), bias (K,).
    """
    epilogue = "plain" if residual is None else "residual"
    fusion = Fusion(bias is not None, activation, epilogue=epilogue)
    return run_forward(input, weight, bias, geometry, fusion, side=residual, tile=tile)[0]


def norm_forward(
    input: Tensor,
    norm: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    tile: tiles.Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """y = conv(relu(scale input + shift)) + bias, and mean and variance (2, K) of its channels.

    ``norm`` (3, C), float32: scale, shift, mean.
    """
    fusion = Fusion(bias is not None, prologue=True, epilogue="moments")
    y, parts = run_forward(input, weight, bias, geometry, fusion, norm=norm, tile=tile)
    return y, merge(parts, "moments")


def run_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    fusion: Fusion,
    *,
    norm: Tensor | None = None,
    side: Tensor | None = None,
    tile: tiles.Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """y, and what the programs gathered of it: (parts, 3, K), or nothing."""
    x = channels_last(input)
    y = empty_channels_last(geometry.output_size, x)
    if not y.numel():
        return y, torch.empty((0, 3, geometry.weight_size[0]), device=x.device)
    plan = plan_forward(geometry, Operands.of(x, weight), fusion, tile)
    parts = empty_parts(plan, y)
    bias = x if bias is None else bias.contiguous()
    if plan.tile.kernel == "strips":
        weight = packed(weight, geometry, False, plan.tile)
    plan(x, weight, bias, y, x if norm is None else norm, beside(side, y), parts)
    return y, parts


def empty_parts(plan: Launch, like: Tensor) -> Tensor:
    """Room for what the programs of ``plan`` gather; ``like``, a pointer that is not used, if nothing."""
    numbers = PARTIALS.get(plan.arguments["EPILOGUE"])
    if numbers is None:
        return like
    channels = plan.arguments["groups"] * plan.arguments["CO"]
    return torch.empty((parts_of(plan), numbers, channels), dtype=torch.float32, device=like.device)


def parts_of(plan: Launch) -> int:
    """How many programs of ``plan`` share a channel, each with another part of its pixels."""
    blocks = -(-plan.tile.groups * plan.arguments["CO"] // plan.tile.outputs)
    return plan.programs // (plan.arguments["packs"] * blocks)


def beside(side: Tensor | None, y: Tensor) -> Tensor:
    """``side`` as kernels read it, copied only if it does not lie as y does; y if there is none."""
    if side is None or side.stride() == y.stride():
        return y if side is None else side
    return torch.empty_like(y).copy_(side)


@lru_cache(PLANS_KEPT)
def plan_forward(
    geometry: ConvGeometry, operands: Operands, fusion: Fusion = PLAIN, tile: tiles.Tile | None = None
) -> Launch:
    """How the forward pass of ``geometry`` runs on x and weight as ``operands`` describes them.

    In ``tile``, or in the one that is chosen for it.
    """
    tile = tile or fusion.tile("forward", geometry, operands)
    return plan_correlation(Correlation.forward(geometry), tile, operands, fusion)


def plan_correlation(
    correlation: Correlation, tile: tiles.Tile, operands: Operands, fusion: Fusion
) -> Launch:
    """The launch of a correlation in ``tile``: kernel, grid and arguments."""
    tile = tiles.with_whole_packs(tile, correlation.groups, correlation.inputs, correlation.outputs)
    c, values = correlation, correlation_values(correlation, tile, operands)
    values |= {**fusion.values, "step_w": c.step[1], "tap_w": c.dilation[1]}
    if tile.kernel == "strips":
        return plan_strips(c, tile, values, operands.device)
    chunks = -(-c.output[0] // values["rows"])
    programs = values["packs"] * chunks * -(-values["columns"] // tile.pixels)
    if tile.kernel == "slide":
        return Launch.of(slide_kernel, programs, values | {"STRIDE": c.step[0]}, tile)
    values |= {"R": c.kernel[0], "S": c.kernel[1], "TAP_H": c.dilation[0], "TAP_W": c.dilation[1]}
    values |= {"STEP_H": c.step[0], "STEP_W": c.step[1]}
    values |= {"DIVISOR_H": c.divisor[0], "DIVISOR_W": c.divisor[1]}
    if tile.depthwise:
        kernel = depthwise_slide_kernel if tile.kernel == "depthwise-slide" else depthwise_kernel
        return Launch.of(kernel, programs, values, tile)
    (n, _, _), (p, q) = c.size, c.output
    programs = values["packs"] * -(-tile.groups * c.outputs // tile.outputs) * -(-n * p * q // tile.pixels)
    return Launch.of(taps_kernel, programs, values | {"columns": n * p * q}, tile)


def correlation_values(correlation: Correlation, tile: tiles.Tile, operands: Operands) -> dict[str, Any]:
    """The arguments that the kernels of a correlation have in common, by name."""
    c, (n, h, w), (p, q) = correlation, correlation.size, correlation.output
    channels = c.groups * c.outputs
    packs = -(-c.groups // (tile.outputs if tile.depthwise else tile.groups * tile.packs))
    strips = -(-q // tile.columns)
    strides = operands.first
    x_unit = tiles.common_unit(tile.load, operands.dtype, strides[0], strides[2], strides[3])
    y_unit = tiles.common_unit(tiles.WIDEST, operands.dtype, channels)
    return {
        "packs": packs,
        "groups": c.groups,
        "columns": n * strips,
        "H": h,
        "W": w,
        "P": p,
        "Q": q,
        "rows": tiles.rows_in_chunk(p, packs * -(-n * strips // tile.pixels), tile, operands.device),
        "top": c.top,
        "left": c.left,
        "x_n": strides[0] // x_unit,
        "x_h": strides[2] // x_unit,
        "x_w": strides[3] // x_unit,
        "y_w": channels // y_unit,
        **dict(zip(WEIGHTS, c.weight_strides(operands.second), strict=True)),
        "CI": c.inputs,
        "CO": c.outputs,
        "G": tile.groups,
        "PRECISION": operands.precision,
        "FULL": tiles.fills(tile, c.groups, c.inputs, c.outputs),
        "WIDE": tiles.is_wide(tile, strips, (strides[0], p * q * channels), (h * strides[2], w * strides[3])),
        "X_UNIT": x_unit,
        "Y_UNIT": y_unit,
        "BM": tile.pixels,
        "BI": tile.inputs,
        "BO": tile.outputs,
    }
