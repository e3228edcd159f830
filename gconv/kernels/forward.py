"""The forward pass: choose a tile, plan a launch, launch it. The input gradient shares most of it."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from gconv.geometry import ConvGeometry
from gconv.kernels.choice import fused_tile_of
from gconv.kernels.correlation import Correlation
from gconv.kernels.epilogue import merge
from gconv.kernels.launch import (
    PARTIALS,
    PLAIN,
    PLANS_KEPT,
    Fusion,
    Launch,
    OperandLayout,
    channels_last,
    empty_channels_last,
)
from gconv.kernels.plans import plan_correlation, plan_pack
from gconv.kernels.tiles import Tile


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    activation: str | None = None,
    residual: Tensor | None = None,
    tile: Tile | None = None,
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
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """y = conv(relu(scale input + shift)) + bias, and mean and variance (2, K) of its channels.

    ``norm`` (3, C), float32: scale, shift, mean.
    """
    fusion = Fusion(bias is not None, prologue=True, epilogue="moments")
    y, parts = run_forward(input, weight, bias, geometry, fusion, norm=norm.contiguous(), tile=tile)
    assert parts is not None  # moments are gathered
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
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y, and what the programs gathered of it: (parts, 3, K), or None."""
    x = channels_last(input)
    y = empty_channels_last(geometry.output_size, x)
    if not y.numel():
        return y, torch.empty((0, 3, geometry.weight_size[0]), device=x.device)
    plan = plan_forward(geometry, OperandLayout.of(x, weight), fusion, tile)
    parts = empty_parts(plan, y)
    bias, side = None if bias is None else bias.contiguous(), beside(side, y)
    if plan.tile.depthwise:
        plan(x, weight, bias, y, side)
    else:
        weights = packed(weight, geometry, False, plan.tile) if plan.tile.kernel == "strips" else weight
        plan(x, weights, bias, y, norm, side, parts)
    return y, parts


def packed(weight: Tensor, geometry: ConvGeometry, transposed: bool, tile: Tile) -> Tensor:
    """``weight`` (K, C / groups, 3, 3) as the kernels of strips read it in ``tile``.

    Args:
        weight, geometry: of the convolution.
        transposed: for the input gradient.
        tile: that of the kernel.
    """
    plan, size = plan_pack(geometry, transposed, weight.stride(), tile)
    packed = torch.empty(size, dtype=weight.dtype, device=weight.device)
    plan(weight, packed)
    return packed


def empty_parts(plan: Launch, like: Tensor) -> Tensor | None:
    """Room for what the programs of ``plan`` gather, where ``like`` is; None if they gather nothing."""
    numbers = PARTIALS.get(plan.arguments["EPILOGUE"])
    if numbers is None:
        return None
    channels = plan.arguments["groups"] * plan.arguments["CO"]
    return torch.empty((parts_of(plan), numbers, channels), dtype=torch.float32, device=like.device)


def parts_of(plan: Launch) -> int:
    """How many programs of ``plan`` share a channel, each with another part of its pixels."""
    blocks = -(-plan.tile.groups * plan.arguments["CO"] // plan.tile.outputs)
    return plan.programs // (plan.arguments["packs"] * blocks)


def beside(side: Tensor | None, y: Tensor) -> Tensor | None:
    """``side`` in the layout of y, as kernels read it: copied only if it has another."""
    if side is None or side.stride() == y.stride():
        return side
    return torch.empty_like(y).copy_(side)


@lru_cache(PLANS_KEPT)
def plan_forward(
    geometry: ConvGeometry, operands: OperandLayout, fusion: Fusion = PLAIN, tile: Tile | None = None
) -> Launch:
    """Plan the forward pass of ``geometry`` on x and weight as ``operands`` describes them.

    Args:
        tile: what the kernel works in. By default the one that is chosen for it.
    """
    tile = tile or fused_tile_of("forward", geometry, operands, fusion)
    return plan_correlation(Correlation.forward(geometry), tile, operands, fusion)
