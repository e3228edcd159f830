"""The three passes on the backend that :mod:`gconv.dispatch` chooses, in the layout ``F.conv2d`` would give.

Arguments are those that :func:`gconv.group_conv2d` has checked; ``backend`` is a name of
``gconv.dispatch.BACKENDS``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from gconv import batch_norm, dispatch
from gconv.geometry import ConvGeometry

# Autocast has had its say before the operator; inside, it would narrow the float32 sums.
without_autocast = torch._C._DisableAutocast


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    geometry: ConvGeometry,
    backend: str,
) -> Tensor:
    """y (N, K, P, Q) = activation(conv(input) + bias + residual).

    channels_last where input or weight is, else contiguous.
    """
    run = dispatch.implementation(backend, "forward", input, geometry)
    with without_autocast():
        output = run.forward(input, weight, bias, geometry, activation, residual)
    return _arrange(output, layout(input, weight))


def input_grad(grad_output: Tensor, weight: Tensor, geometry: ConvGeometry, backend: str) -> Tensor:
    """dx (N, C, H, W): channels_last where grad_output or weight is, else contiguous."""
    run = dispatch.implementation(backend, "input_grad", grad_output, geometry)
    with without_autocast():
        grad = run.input_grad(grad_output, weight, geometry)
    return _arrange(grad, layout(grad_output, weight))


def weight_grad(
    grad_output: Tensor, input: Tensor, with_bias: bool, geometry: ConvGeometry, backend: str
) -> tuple[Tensor, Tensor]:
    """dw (K, C / groups, R, S) and dbias (K,), empty if not asked.

    dw is channels_last where grad_output or input is, else contiguous.
    """
    run = dispatch.implementation(backend, "weight_grad", input, geometry)
    with without_autocast():
        grads = run.weight_grad(grad_output, input, geometry, with_bias)
    return _arrange_grads(*grads, layout(grad_output, input))


def norm_forward(
    input: Tensor, norm: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry, backend: str
) -> tuple[Tensor, Tensor]:
    """y (N, K, P, Q) = conv(relu(scale input + shift)) + bias, and mean and variance (2, K) of its channels.

    ``norm``: :mod:`gconv.batch_norm`, whose equations a backend runs that cannot do all in one kernel.
    """
    run = dispatch.implementation(backend, "forward", input, geometry)
    with without_autocast():
        if hasattr(run, "norm_forward"):
            output, moments = run.norm_forward(input, norm.contiguous(), weight, bias, geometry)
        else:
            output = run.forward(batch_norm.normalise(input, norm), weight, bias, geometry, None, None)
            moments = batch_norm.moments(output)
    return _arrange(output, layout(input, weight)), moments


def norm_input_grad(
    grad_output: Tensor, weight: Tensor, input: Tensor, norm: Tensor, geometry: ConvGeometry, backend: str
) -> tuple[Tensor, Tensor]:
    """The gradient (N, C, H, W) of scale input + shift, and the sums (2, C) that batch norm's needs of it."""
    run = dispatch.implementation(backend, "input_grad", grad_output, geometry)
    with without_autocast():
        if hasattr(run, "norm_input_grad"):
            grad, sums = run.norm_input_grad(grad_output, weight, input, norm.contiguous(), geometry)
        else:
            grad = batch_norm.through_relu(run.input_grad(grad_output, weight, geometry), input, norm)
            sums = batch_norm.grad_sums(grad, input, norm)
    return _arrange(grad, layout(grad_output, weight)), sums


def norm_weight_grad(
    grad_output: Tensor, input: Tensor, norm: Tensor, with_bias: bool, geometry: ConvGeometry, backend: str
) -> tuple[Tensor, Tensor]:
    """dw and dbias as from :func:`weight_grad`, where relu(scale input + shift) was convolved."""
    run = dispatch.implementation(backend, "weight_grad", input, geometry)
    if not hasattr(run, "norm_weight_grad"):
        return weight_grad(grad_output, batch_norm.normalise(input, norm), with_bias, geometry, backend)
    with without_autocast():
        grads = run.norm_weight_grad(grad_output, input, norm.contiguous(), geometry, with_bias)
    return _arrange_grads(*grads, layout(grad_output, input))


def layout(first: Tensor, second: Tensor) -> torch.memory_format:
    """The layout of a result: channels_last where either tensor's strides say so."""
    either = is_channels_last(first) or is_channels_last(second)
    return torch.channels_last if either else torch.contiguous_format


def is_channels_last(tensor: Tensor) -> bool:
    """What PyTorch's ``suggest_memory_format`` says, which takes 8 us, where one look does not tell."""
    channels_last = tensor.is_contiguous(memory_format=torch.channels_last)
    if channels_last != tensor.is_contiguous():
        return channels_last
    return suggest_memory_format(tensor) == torch.channels_last


def _arrange(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    """``tensor`` in ``layout``, with that layout's strides along axes of length 1 too, where any would do."""
    whole = tensor.contiguous(memory_format=layout)
    tensor = whole.clone(memory_format=layout) if whole.storage_offset() else whole
    _, c, h, w = tensor.shape
    strides = (c * h * w, 1, w * c, c) if layout == torch.channels_last else (c * h * w, h * w, w, 1)
    return tensor if tensor.stride() == strides else tensor.as_strided(tensor.shape, strides)


def _arrange_grads(weight: Tensor, bias: Tensor | None, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
    """dw in ``layout``, and dbias or, as operators must return a tensor, an empty one."""
    return _arrange(weight, layout), weight.new_empty(0) if bias is None else bias
