"""Batch norm and ReLU around a convolution, as equations on tensors.

``norm_forward``, ``norm_input_grad`` and ``norm_weight_grad`` apply them around a backend's
passes; the Triton backend has kernels that compute both together.

``norm`` (3, C) contains for each channel

    scale = weight / sqrt(variance + eps),   shift = bias - mean scale,   mean

in float32, or float64 if the tensors are. With the gradient da of a:

    a  = max(scale x + shift, 0)                                normalise
    dz = da where scale x + shift > 0, else 0                   through_relu
    sum of dz, and of dz (x - mean), over a channel's pixels    grad_sums
    dx = scale dz + slope[0] (x - mean) + slope[1]              through_norm

The slope is the gradient through mean and variance, if they are those of the batch: see ``slope``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gconv.geometry import ConvGeometry


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in the dtype of its sums: float32 if it has 16 bits, otherwise unchanged."""
    return tensor.to(wide_dtype(tensor.dtype))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over tensors of ``dtype``."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def make_norm(mean: Tensor, variance: Tensor, eps: float, weight: Tensor, bias: Tensor) -> Tensor:
    """Return ``norm`` (3, C) from the statistics, ``weight`` and ``bias`` of a batch norm."""
    scale = weight.to(mean.dtype) * torch.rsqrt(variance + eps)
    return torch.stack([scale, bias.to(mean.dtype) - mean * scale, mean])


def moments(x: Tensor) -> Tensor:
    """Return the mean and biased variance of each channel of x (N, C, H, W), as (2, C)."""
    variance, mean = torch.var_mean(wide(x), (0, 2, 3), correction=0)
    return torch.stack([mean, variance])


def normalise(x: Tensor, norm: Tensor) -> Tensor:
    """Return a (N, C, H, W) from x, in the dtype of x."""
    return _affine(x, norm).relu_().to(x.dtype)


def through_relu(grad: Tensor, x: Tensor, norm: Tensor) -> Tensor:
    """Return the gradient before the ReLU from ``grad``, the gradient of a."""
    return torch.ops.aten.threshold_backward(grad, _affine(x, norm).to(grad.dtype), 0)


def grad_sums(grad: Tensor, x: Tensor, norm: Tensor) -> Tensor:
    """Return the two sums, (2, C), from ``grad``, the gradient of a."""
    grad, apart = wide(through_relu(grad, x, norm)), wide(x) - norm[2].view(-1, 1, 1)
    return torch.stack([grad.sum((0, 2, 3)), (grad * apart).sum((0, 2, 3))])


def through_norm(grad: Tensor, x: Tensor, norm: Tensor, slope: Tensor) -> Tensor:
    """Return dx (N, C, H, W) from ``grad``, the gradient of a, and ``slope`` (2, C)."""
    scale, _, mean = norm.view(3, -1, 1, 1)
    by_distance, constant = slope.view(2, -1, 1, 1)
    dx = wide(through_relu(grad, x, norm)) * scale + (wide(x) - mean) * by_distance + constant
    return dx.to(grad.dtype)


def slope(sums: Tensor, norm: Tensor, variance: Tensor, eps: float, pixels: int) -> Tensor:
    """Return the gradient through mean and variance, (2, C), from the two sums over ``pixels`` pixels.

    slope[0] = -scale sum dz (x - mean) / ((variance + eps) pixels),    slope[1] = -scale sum dz / pixels
    """
    part = -norm[0] / pixels
    return torch.stack([part * sums[1] / (variance + eps), part * sums[0]])


def _affine(x: Tensor, norm: Tensor) -> Tensor:
    scale, shift, _ = norm.view(3, -1, 1, 1)
    return wide(x) * scale + shift


def norm_forward(
    forward: Callable[..., Tensor],
    input: Tensor,
    norm: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
) -> tuple[Tensor, Tensor]:
    """Compute ``gconv.backends.Backend.norm_forward`` with a backend's ``forward``."""
    output = forward(normalise(input, norm), weight, bias, geometry)
    return output, moments(output)


def norm_input_grad(
    input_grad: Callable[..., Tensor],
    grad_output: Tensor,
    weight: Tensor,
    input: Tensor,
    norm: Tensor,
    geometry: ConvGeometry,
) -> tuple[Tensor, Tensor]:
    """Compute ``gconv.backends.Backend.norm_input_grad`` with a backend's ``input_grad``."""
    grad = through_relu(input_grad(grad_output, weight, None, geometry), input, norm)
    return grad, grad_sums(grad, input, norm)


def norm_weight_grad(
    weight_grad: Callable[..., tuple[Tensor, Tensor | None]],
    grad_output: Tensor,
    input: Tensor,
    norm: Tensor,
    geometry: ConvGeometry,
    with_bias: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute ``gconv.backends.Backend.norm_weight_grad`` with a backend's ``weight_grad``."""
    return weight_grad(grad_output, normalise(input, norm), geometry, with_bias)
