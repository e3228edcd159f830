"""The input gradient: a correlation of dy with the flipped weights, in kernels that forward passes share."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from gconv.geometry import ConvGeometry
from gconv.kernels.choice import fused_tile_of
from gconv.kernels.correlation import Correlation
from gconv.kernels.epilogue import merge
from gconv.kernels.forward import beside, empty_parts, packed
from gconv.kernels.launch import (
    PLAIN,
    PLANS_KEPT,
    Fusion,
    Launch,
    OperandLayout,
    channels_last,
    empty_channels_last,
)
from gconv.kernels.plans import plan_correlation
from gconv.kernels.tiles import Tile


def input_grad(
    grad_output: Tensor, weight: Tensor, geometry: ConvGeometry, tile: Tile | None = None
) -> Tensor:
    """dx (N, C, H, W), channels_last, from grad_output (N, K, P, Q) and weight (K, C / groups, R, S)."""
    return run_input_grad(grad_output, weight, geometry, PLAIN, tile=tile)[0]


def norm_input_grad(
    grad_output: Tensor,
    weight: Tensor,
    input: Tensor,
    norm: Tensor,
    geometry: ConvGeometry,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient of scale input + shift, from that of conv(relu(scale input + shift)), and its sums.

    Returns:
        da (N, C, H, W), channels_last, zero where the ReLU was; the sums (2, C) of da and da (input - mean).
    """
    fusion = Fusion(epilogue="gradient")
    da, parts = run_input_grad(
        grad_output, weight, geometry, fusion, norm=norm.contiguous(), side=input, tile=tile
    )
    assert parts is not None  # sums are gathered
    return da, merge(parts, "gradient")


def run_input_grad(
    grad_output: Tensor,
    weight: Tensor,
    geometry: ConvGeometry,
    fusion: Fusion,
    *,
    norm: Tensor | None = None,
    side: Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dx, and what the programs gathered of it: (parts, 2, C), or None."""
    dy = channels_last(grad_output)
    dx = empty_channels_last(geometry.input_size, dy)
    if not dx.numel():
        return dx, torch.empty((0, 2, dx.shape[1]), device=dx.device)
    plan = plan_input_grad(geometry, OperandLayout.of(dy, weight), fusion, tile)
    parts, side, kernel = empty_parts(plan, dx), beside(side, dx), plan.tile.kernel
    weights = packed(weight, geometry, True, plan.tile) if kernel in ("strips", "pairs") else weight
    if plan.tile.depthwise:
        plan(dy, weights, None, dx, side)
    elif kernel == "pairs":
        plan(dy, weights, dx, norm, side, parts)
    else:
        plan(dy, weights, None, dx, norm, side, parts)
    return dx, parts


@lru_cache(PLANS_KEPT)
def plan_input_grad(
    geometry: ConvGeometry, operands: OperandLayout, fusion: Fusion = PLAIN, tile: Tile | None = None
) -> Launch:
    """Plan the input gradient of ``geometry`` on dy and weight as ``operands`` describes them.

    Args:
        tile: what the kernel works in. By default the one that is chosen for it.
    """
    tile = tile or fused_tile_of("input_grad", geometry, operands, fusion)
    return plan_correlation(Correlation.input_grad(geometry), tile, operands, fusion)
