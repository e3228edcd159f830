"""The forward pass, and the steps it shares with the input gradient: choose a tile, plan and launch."""

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
from gconv.kernels.tiles import Tile, blocks_of

PACKED = ("strips", "pairs")  # kernels that read weights packed in the order of their registers


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    activation: str | None = None,
    residual: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Return y = activation(conv(input) + bias + residual), channels_last.

    y and residual are (N, K, P, Q), input (N, C, H, W), weight (K, C / groups, R, S), bias (K,).
    """
    fusion = Fusion.of(bias, activation, residual)
    return run_correlation("forward", input, weight, bias, geometry, fusion, side=residual, tile=tile)[0]


def norm_forward(
    input: Tensor,
    norm: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Return y = conv(relu(scale input + shift)) + bias, and the mean and variance (2, K) of its channels.

    ``norm`` (3, C), float32, has scale, shift and mean.
    """
    fusion, norm = Fusion(bias is not None, prologue=True, epilogue="moments"), norm.contiguous()
    y, parts = run_correlation("forward", input, weight, bias, geometry, fusion, norm=norm, tile=tile)
    assert parts is not None  # moments are gathered
    return y, merge(parts, "moments")


def run_correlation(
    pass_: str,
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    fusion: Fusion,
    *,
    norm: Tensor | None = None,
    side: Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run "forward" on x or "input_grad" on dy.

    Returns:
        y or dx, and what the programs gathered for its channels: (parts, 3 or 2, channels), or None.
    """
    x = channels_last(source)
    y = empty_channels_last(geometry.output_size if pass_ == "forward" else geometry.input_size, x)
    if not y.numel():
        return y, room_for_parts(fusion, None, y.shape[1], x.device)
    plan = plan_pass(pass_, geometry, OperandLayout.of(x, weight), fusion, tile)
    parts = room_for_parts(fusion, plan, y.shape[1], x.device)
    bias, side = None if bias is None else bias.contiguous(), in_layout_of(y, side)
    if plan.tile.depthwise:
        weight = taps_first(weight) if plan.tile.kernel == "depthwise-blocks" else weight
        plan(x, weight, bias, y, side)
        return y, parts
    if plan.tile.kernel in PACKED:
        weight = packed(weight, geometry, pass_ == "input_grad", plan.tile)
    plan(x, weight, bias, y, norm, side, parts)
    return y, parts


def packed(weight: Tensor, geometry: ConvGeometry, transposed: bool, tile: Tile) -> Tensor:
    """Return ``weight`` (K, C / groups, 3, 3) in the order in which strip kernels read it.

    Args:
        weight, geometry: of the convolution.
        transposed: whether it is for the input gradient.
        tile: the kernel's tile.
    """
    plan, size = plan_pack(geometry, transposed, weight.stride(), tile)
    buffer = torch.empty(size, dtype=weight.dtype, device=weight.device)
    plan(weight, buffer)
    return buffer


def taps_first(weight: Tensor) -> Tensor:
    """Return ``weight`` (K, 1, R, S) as (R, S, K), because many programs load each tap many times."""
    return weight[:, 0].permute(1, 2, 0).contiguous()


def room_for_parts(fusion: Fusion, plan: Launch | None, channels: int, device: torch.device) -> Tensor | None:
    """Return a buffer for what the programs of ``plan`` gather for each channel; None if they gather nothing.

    Empty batches have no plan, and so no parts: (0, 3 or 2, channels).
    """
    numbers = PARTIALS.get(fusion.epilogue)
    if numbers is None:
        return None
    count = 0 if plan is None else parts_of(plan)
    return torch.empty((count, numbers, channels), dtype=torch.float32, device=device)


def parts_of(plan: Launch) -> int:
    """Return how many programs of ``plan`` share a channel, each with another part of its pixels."""
    blocks = blocks_of(plan.tile, plan.arguments["CO"])
    return plan.programs // (plan.arguments["packs"] * blocks)


def in_layout_of(y: Tensor, side: Tensor | None) -> Tensor | None:
    """Return ``side`` in the layout of y, which kernels expect; copied only if it has another."""
    if side is None or side.stride() == y.stride():
        return side
    return torch.empty_like(y).copy_(side)


@lru_cache(PLANS_KEPT)
def plan_pass(
    pass_: str,
    geometry: ConvGeometry,
    operands: OperandLayout,
    fusion: Fusion = PLAIN,
    tile: Tile | None = None,
) -> Launch:
    """Plan "forward" or "input_grad" of ``geometry``.

    Args:
        pass_, geometry: what to compute.
        operands: layout of x or dy, and of the weight.
        fusion: what else runs in the kernel. Defaults to nothing.
        tile: the kernel's tile. Defaults to the one that is chosen for the geometry.
    """
    tile = tile or fused_tile_of(pass_, geometry, operands, fusion)
    return plan_correlation(Correlation.of(pass_, geometry), tile, operands, fusion)
