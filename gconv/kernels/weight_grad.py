"""The weight and bias gradients: partial sums over slices of the batch, then their sum in fixed order."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from gconv.geometry import ConvGeometry
from gconv.kernels.choice import fused_tile_of
from gconv.kernels.launch import PLAIN, PLANS_KEPT, Fusion, Launch, OperandLayout, channels_last
from gconv.kernels.plans import plan_weight_sums
from gconv.kernels.tiles import WIDEST, Tile, common_unit, power_of_two


@triton.jit(do_not_specialize=["splits", "size", "weights", "K", "CI", "S", "dw_k", "dw_c", "dw_r", "dw_s"])
def reduce_kernel(
    p_sums, p_dw, p_db, splits, size, weights, K, CI, S, dw_k, dw_c, dw_r, dw_s,
    UNIT: tl.constexpr, BS: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """dw and db = the partial sums, added up over the splits in fixed order and rounded once.

    Grid: tiles of BE of the ``size`` UNIT sums: ``weights`` of them laid out (R, S, K, C / groups), then the
    K sums of the bias. In registers: BS running totals of each, [BS, BE], added up at the end.
    """
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    size = size * UNIT
    split = tl.arange(0, BS)
    total = tl.zeros([BS, BE], tl.float32)
    for start in range(0, splits, BS):
        o = (start + split).to(tl.int64)[:, None] * size + e[None, :]
        total += tl.load(p_sums + o, (start + split < splits)[:, None] & (e < size)[None, :], 0.0)
    total = tl.sum(total, 0).to(p_dw.dtype.element_ty)
    tap, k, c = e // (K * CI), e // CI % K, e % CI
    tl.store(p_dw + k * dw_k + c * dw_c + tap // S * dw_r + tap % S * dw_s, total, e < weights)
    if p_db is not None:
        tl.store(p_db + (e - weights), total, (e >= weights) & (e < size))


SUMS_A_PROGRAM = 4096  # 32 for each thread, so that few programs keep memory busy
MOST_SPLITS = 128  # that a program loads at a time; more would leave less than a cache line of each


def weight_grad(
    grad_output: Tensor,
    input: Tensor,
    geometry: ConvGeometry,
    with_bias: bool,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return dw (K, C / groups, R, S) and, if asked for, dbias (K,).

    grad_output is (N, K, P, Q), input (N, C, H, W).
    """
    return run_weight_grad(grad_output, input, None, geometry, with_bias, tile)


def norm_weight_grad(
    grad_output: Tensor,
    input: Tensor,
    norm: Tensor,
    geometry: ConvGeometry,
    with_bias: bool,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the same for a convolution of relu(scale input + shift); ``norm`` (3, C), float32."""
    return run_weight_grad(grad_output, input, norm.contiguous(), geometry, with_bias, tile)


def run_weight_grad(
    grad_output: Tensor,
    input: Tensor,
    norm: Tensor | None,
    geometry: ConvGeometry,
    with_bias: bool,
    tile: Tile | None,
) -> tuple[Tensor, Tensor | None]:
    """Return dw and, if asked for, dbias. Without ``norm``, the input itself was convolved."""
    dy, x = channels_last(grad_output), channels_last(input)
    layout = torch.channels_last if dy is grad_output or x is input else torch.contiguous_format
    dw = torch.empty(geometry.weight_size, dtype=x.dtype, device=x.device, memory_format=layout)
    db = dw.new_empty(geometry.weight_size[0]) if with_bias else None
    if not dy.numel():
        return dw.zero_(), None if db is None else db.zero_()
    fusion = Fusion(with_bias, prologue=norm is not None)
    plan, splits, size = plan_weight_grad(geometry, OperandLayout.of(dy, x), fusion, tile)
    sums = torch.empty((splits, size), dtype=torch.float32, device=x.device)
    if plan.tile.depthwise:
        if norm is not None:
            raise ValueError("depthwise kernels don't support batch norm: pass a tile of the taps kernel")
        plan(dy, x, sums)
    else:
        plan(dy, x, sums, norm)
    plan_reduce(geometry, splits, with_bias, dw.stride())(sums, dw, db)
    return dw, db


@lru_cache(PLANS_KEPT)
def plan_weight_grad(
    geometry: ConvGeometry, operands: OperandLayout, fusion: Fusion = PLAIN, tile: Tile | None = None
) -> tuple[Launch, int, int]:
    """Plan the partial sums of ``geometry`` from dy and x.

    Args:
        geometry: what to compute.
        operands: layout of dy and x.
        fusion: what else runs in the kernel. Defaults to nothing.
        tile: the kernel's tile. Defaults to the one that is chosen for the geometry.

    Returns:
        The launch; how many partial sums there are of each number; how many numbers.
    """
    tile = tile or fused_tile_of("weight_grad", geometry, operands, fusion)
    k, cg, r, s = geometry.weight_size
    size = k * (cg * r * s + fusion.bias)
    launch, splits = plan_weight_sums(geometry, tile, operands, fusion, size)
    return launch, splits, size


@lru_cache(PLANS_KEPT)
def plan_reduce(geometry: ConvGeometry, splits: int, with_bias: bool, strides: tuple[int, ...]) -> Launch:
    """Plan how the partial sums become dw, of ``strides``, and db."""
    k, cg, r, s = geometry.weight_size
    weights = k * cg * r * s
    size = weights + k * with_bias
    at_once = min(MOST_SPLITS, power_of_two(splits))
    sums = SUMS_A_PROGRAM // at_once
    unit = common_unit(WIDEST, torch.float32, size)
    values = {"splits": splits, "size": size // unit, "weights": weights, "CI": cg, "K": k, "S": s}
    values |= dict(zip(("dw_k", "dw_c", "dw_r", "dw_s"), strides, strict=True))
    values |= {"UNIT": unit, "BS": at_once, "BE": sums}
    absent = () if with_bias else ("p_db",)
    tile = Tile("reduce", groups=1, pixels=at_once, inputs=sums, outputs=sums, warps=4)
    return Launch.of(reduce_kernel, -(-size // sums), values, tile, absent)
