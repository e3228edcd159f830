"""The three passes through PyTorch's operators: cuDNN, MIOpen, oneDNN or MPS, depending on the device.

PyTorch pads opposite sides by the same number. If ours differ, the operator pads by the smaller one, and the
rest is padded before it or cropped after it.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gconv import batch_norm
from gconv.activation import finish
from gconv.geometry import ConvGeometry, Padding


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return y = activation(conv(input) + bias + residual).

    Shapes: y and residual (N, K, P, Q), input (N, C, H, W), weight (K, C / groups, R, S), bias (K,).
    """
    padding, extra = _split_padding(geometry)
    output = F.conv2d(
        _pad(input, extra), weight, bias, geometry.stride, padding, geometry.dilation, geometry.groups
    )
    return finish(output, residual, activation)


def input_grad(
    grad_output: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return activation(dx + bias + residual), (N, C, H, W), from grad_output (N, K, P, Q) and weight.

    Computed as a transposed convolution, which unlike ``convolution_backward`` needs no tensor of the input's
    size.
    """
    _, _, h, w = geometry.input_size
    padding, extra = _split_padding(geometry)
    total = (extra.top + h + extra.bottom, extra.left + w + extra.right)
    beyond_last_tap = tuple(
        (total[i] + 2 * padding[i] - geometry.dilation[i] * (geometry.weight_size[2 + i] - 1) - 1)
        % geometry.stride[i]
        for i in (0, 1)
    )
    grad = F.conv_transpose2d(
        grad_output,
        weight.conj() if weight.is_complex() else weight,
        bias,
        geometry.stride,
        padding,
        beyond_last_tap,
        geometry.groups,
        geometry.dilation,
    )
    return finish(grad[:, :, extra.top : extra.top + h, extra.left : extra.left + w], residual, activation)


def weight_grad(
    grad_output: Tensor, input: Tensor, geometry: ConvGeometry, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Return dw (K, C / groups, R, S), and dbias (K,) or None, from grad_output (N, K, P, Q) and input."""
    padding, extra = _split_padding(geometry)
    _, weight, bias = torch.ops.aten.convolution_backward(
        grad_output,
        _pad(input, extra),
        grad_output.new_empty(geometry.weight_size),
        [geometry.weight_size[0]],
        geometry.stride,
        padding,
        geometry.dilation,
        False,
        [0, 0],
        geometry.groups,
        [False, True, with_bias],
    )
    return weight, bias


norm_forward = partial(batch_norm.norm_forward, forward)
norm_input_grad = partial(batch_norm.norm_input_grad, input_grad)
norm_weight_grad = partial(batch_norm.norm_weight_grad, weight_grad)


def _split_padding(geometry: ConvGeometry) -> tuple[tuple[int, int], Padding]:
    """Return the padding that PyTorch can do, (vertical, horizontal), and the rest on each side."""
    top, bottom, left, right = geometry.padding
    vertical, horizontal = min(top, bottom), min(left, right)
    return (vertical, horizontal), Padding(
        top - vertical, bottom - vertical, left - horizontal, right - horizontal
    )


def _pad(input: Tensor, extra: Padding) -> Tensor:
    """Return ``input`` padded with ``extra`` zeros, or unchanged if there are none."""
    return F.pad(input, (extra.left, extra.right, extra.top, extra.bottom)) if any(extra) else input
