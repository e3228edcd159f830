"""The input gradient: a correlation of dy with the flipped weights, in the kernels of forward passes."""

from __future__ import annotations

from torch import Tensor

from gconv.geometry import ConvGeometry
from gconv.kernels.epilogue import merge
from gconv.kernels.forward import run_correlation
from gconv.kernels.launch import Fusion
from gconv.kernels.tiles import Tile


def input_grad(
    grad_output: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    activation: str | None = None,
    residual: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Return activation(dx + bias + residual), channels_last: the forward pass of a transposed convolution.

    dx and residual are (N, C, H, W), grad_output (N, K, P, Q), weight (K, C / groups, R, S), bias (C,).
    """
    fusion = Fusion.of(bias, activation, residual)
    given = (grad_output, weight, bias, geometry, fusion)
    return run_correlation("input_grad", *given, side=residual, tile=tile)[0]


def norm_input_grad(
    grad_output: Tensor,
    weight: Tensor,
    input: Tensor,
    norm: Tensor,
    geometry: ConvGeometry,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of scale input + shift, from that of conv(relu(scale input + shift)), and sums.

    Returns:
        da (N, C, H, W), channels_last, zero where the ReLU was; the sums (2, C) of da and da (input - mean).
    """
    fusion, beside = Fusion(epilogue="gradient"), {"norm": norm.contiguous(), "side": input}
    da, parts = run_correlation(
        "input_grad", grad_output, weight, None, geometry, fusion, **beside, tile=tile
    )
    assert parts is not None  # sums are gathered
    return da, merge(parts, "gradient")
