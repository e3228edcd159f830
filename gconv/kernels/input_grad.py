"""The input gradient: the forward kernels on dy, the pairs kernel, and an older one for stride 2."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from gconv.geometry import ConvGeometry
from gconv.kernels import tiles
from gconv.kernels.correlation import Correlation
from gconv.kernels.forward import (
    COUNTS,
    WEIGHTS,
    beside,
    correlation_values,
    empty_parts,
    plan_correlation,
)
from gconv.kernels.fusion import PLAIN, Fusion, Sink, emit, load_bias, load_norm, merge, store_sums
from gconv.kernels.launch import PLANS_KEPT, Launch, Operands, channels_last, empty_channels_last
from gconv.kernels.packing import (
    Weights,
    dot,
    load_kernel,
    load_tile,
    locate_channels,
    locate_columns,
)
from gconv.kernels.pairs import pairs, plan_pairs
from gconv.kernels.strips import packed


@triton.jit(do_not_specialize=[*COUNTS, *WEIGHTS, "pairs_h", "pairs_w", "above", "before"])
def residue_kernel(
    p_x, p_w, p_bias, p_y, p_norm, p_side, p_sums,
    packs, groups, columns, H, W, P, Q, rows, top, left, pairs_h, pairs_w, above, before,
    x_n, x_h, x_w, y_w, w_0, w_g, w_i, w_o, w_r, w_s,
    CI: tl.constexpr, CO: tl.constexpr, G: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, EPILOGUE: tl.constexpr,
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

    bias = load_bias(p_bias, k, m_k, BIAS)
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


def input_grad(
    grad_output: Tensor, weight: Tensor, geometry: ConvGeometry, tile: tiles.Tile | None = None
) -> Tensor:
    """dx (N, C, H, W), channels_last, from grad_output (N, K, P, Q) and weight (K, C / groups, R, S)."""
    return run_input_grad(grad_output, weight, geometry, PLAIN, tile=tile)[0]


def norm_input_grad(
    grad_output: Tensor,
    weight: Tensor,
    input: Tensor,
    norm: Tensor,
    geometry: ConvGeometry,
    tile: tiles.Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient of scale input + shift, from that of conv(relu(scale input + shift)), and its sums.

    Returns:
        da (N, C, H, W), channels_last, zero where the ReLU was; the sums (2, C) of da and da (input - mean).
    """
    fusion = Fusion(epilogue="gradient")
    da, parts = run_input_grad(grad_output, weight, geometry, fusion, norm=norm, side=input, tile=tile)
    return da, merge(parts, "gradient")


def run_input_grad(
    grad_output: Tensor,
    weight: Tensor,
    geometry: ConvGeometry,
    fusion: Fusion,
    *,
    norm: Tensor | None = None,
    side: Tensor | None = None,
    tile: tiles.Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """dx, and what the programs gathered of it: (parts, 2, C), or nothing."""
    dy = channels_last(grad_output)
    dx = empty_channels_last(geometry.input_size, dy)
    if not dx.numel():
        return dx, torch.empty((0, 2, dx.shape[1]), device=dx.device)
    plan = plan_input_grad(geometry, Operands.of(dy, weight), fusion, tile)
    parts = empty_parts(plan, dx)
    norm, side = dx if norm is None else norm, beside(side, dx)
    if plan.tile.kernel == "strips":
        weight = packed(weight, geometry, True, plan.tile)
        plan(dy, weight, dy, dx, norm, side, parts)
    elif plan.tile.kernel == "pairs":
        plan(dy, packed(weight, geometry, True, plan.tile), dx, norm, side, parts)
    else:
        plan(dy, weight, dy, dx, norm, side, parts)
    return dx, parts


@lru_cache(PLANS_KEPT)
def plan_input_grad(
    geometry: ConvGeometry, operands: Operands, fusion: Fusion = PLAIN, tile: tiles.Tile | None = None
) -> Launch:
    """How the input gradient of ``geometry`` runs on dy and weight as ``operands`` describes them.

    In ``tile``, or in the one that is chosen for it.
    """
    correlation = Correlation.input_grad(geometry)
    tile = tile or fusion.tile("input_grad", geometry, operands)
    if tile.kernel not in ("pairs", "residue"):
        return plan_correlation(correlation, tile, operands, fusion)
    tile = tiles.with_whole_packs(tile, correlation.groups, correlation.inputs, correlation.outputs)
    values = correlation_values(correlation, tile, operands) | fusion.values
    if tile.kernel == "pairs":
        return plan_pairs(correlation, tile, values, operands.device)
    n, _, _ = correlation.size
    above, pairs_h = pairs(correlation.output[0], correlation.top)
    before, pairs_w = pairs(correlation.output[1], correlation.left)
    column_tiles = -(-n * pairs_w // tile.pixels)
    rows = tiles.rows_in_chunk(pairs_h, values["packs"] * column_tiles, tile, operands.device)
    values |= {"above": above, "pairs_h": pairs_h, "before": before, "pairs_w": pairs_w}
    values |= {"columns": n * pairs_w, "rows": rows}
    return Launch.of(residue_kernel, values["packs"] * column_tiles * -(-pairs_h // rows), values, tile)
