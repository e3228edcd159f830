"""The three passes as PyTorch operators: ``torch.ops.gconv.forward``, ``input_grad`` and ``weight_grad``.

As operators they stay whole in a compiled or exported graph. Each has a fake kernel (sizes and strides
without data) and a FLOP formula for PyTorch's flop counter; :mod:`gconv.autograd` gives them their gradients.
Where "aten" runs every pass, :func:`gconv.group_conv2d` calls ``F.conv2d`` instead, and none of this is used.

Arguments are those that :func:`gconv.group_conv2d` has checked: ``padding`` is (top, bottom, left, right),
``activation`` None or "relu", ``backend`` a name of ``gconv.dispatch.BACKENDS``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils.flop_counter import register_flop_formula

from gconv import dispatch
from gconv.geometry import ConvGeometry

_SETTINGS = "int[2] stride, SymInt[4] padding, int[2] dilation, SymInt groups, str backend"

# define and impl, not custom_op: a quarter of its host time a call.
library = torch.library.Library("gconv", "DEF")
library.define(f"forward(Tensor input, Tensor weight, Tensor? bias, str? activation, {_SETTINGS}) -> Tensor")
library.define(f"input_grad(Tensor grad_output, Tensor weight, SymInt[4] input_size, {_SETTINGS}) -> Tensor")
library.define(
    "weight_grad(Tensor grad_output, Tensor input, SymInt[4] weight_size, bool with_bias, "
    f"{_SETTINGS}) -> (Tensor, Tensor)"
)


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str,
) -> Tensor:
    """y (N, K, P, Q): channels_last where input or weight is, else contiguous, as ``F.conv2d`` decides it."""
    geometry = ConvGeometry.of(input.shape, weight.shape, stride, padding, dilation, groups)
    run = dispatch.implementation(backend, "forward", input, geometry)
    with _no_autocast(input):
        output = run.forward(input, weight, bias, geometry, activation)
    return _arrange(output, _layout(input, weight))


def input_grad(
    grad_output: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str,
) -> Tensor:
    """dx (N, C, H, W): channels_last where grad_output or weight is, else contiguous."""
    geometry = ConvGeometry.of(input_size, weight.shape, stride, padding, dilation, groups)
    run = dispatch.implementation(backend, "input_grad", grad_output, geometry)
    with _no_autocast(grad_output):
        grad = run.input_grad(grad_output, weight, geometry)
    return _arrange(grad, _layout(grad_output, weight))


def weight_grad(
    grad_output: Tensor,
    input: Tensor,
    weight_size: Sequence[int],
    with_bias: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """dw (K, C / groups, R, S) and dbias (K,), empty if not asked.

    dw is channels_last where grad_output or input is, else contiguous.
    """
    geometry = ConvGeometry.of(input.shape, weight_size, stride, padding, dilation, groups)
    run = dispatch.implementation(backend, "weight_grad", input, geometry)
    with _no_autocast(input):
        weight, bias = run.weight_grad(grad_output, input, geometry, with_bias)
    weight = _arrange(weight, _layout(grad_output, input))
    return weight, grad_output.new_empty(0) if bias is None else bias


for _operator in (forward, input_grad, weight_grad):
    library.impl(_operator.__name__, _operator, "CompositeExplicitAutograd")


@torch.library.register_fake("gconv::forward", lib=library)
def _fake_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, *settings: Any
) -> Tensor:
    size = ConvGeometry.of(input.shape, weight.shape, *settings[:-1]).output_size
    return _empty(size, input, _layout(input, weight))


@torch.library.register_fake("gconv::input_grad", lib=library)
def _fake_input_grad(
    grad_output: Tensor, weight: Tensor, input_size: Sequence[int], *settings: Any
) -> Tensor:
    return _empty(input_size, grad_output, _layout(grad_output, weight))


@torch.library.register_fake("gconv::weight_grad", lib=library)
def _fake_weight_grad(
    grad_output: Tensor, input: Tensor, weight_size: Sequence[int], with_bias: bool, *settings: Any
) -> tuple[Tensor, Tensor]:
    weight = _empty(weight_size, grad_output, _layout(grad_output, input))
    return weight, grad_output.new_empty(weight_size[0] if with_bias else 0)


@register_flop_formula(torch.ops.gconv.forward)
def _forward_flops(
    input_size: Sequence[int],
    weight_size: Sequence[int],
    bias_size: Sequence[int] | None,
    activation: str | None,
    *settings: Any,
    out_shape: Any = None,
) -> int:
    return ConvGeometry.of(input_size, weight_size, *settings[:-1]).flops


@register_flop_formula(torch.ops.gconv.input_grad)
def _input_grad_flops(
    grad_size: Sequence[int],
    weight_size: Sequence[int],
    input_size: Sequence[int],
    *settings: Any,
    out_shape: Any = None,
) -> int:
    return ConvGeometry.of(input_size, weight_size, *settings[:-1]).flops


@register_flop_formula(torch.ops.gconv.weight_grad)
def _weight_grad_flops(
    grad_size: Sequence[int],
    input_size: Sequence[int],
    weight_size: Sequence[int],
    with_bias: bool,
    *settings: Any,
    out_shape: Any = None,
) -> int:
    return ConvGeometry.of(input_size, weight_size, *settings[:-1]).flops


def _layout(first: Tensor, second: Tensor) -> torch.memory_format:
    """The layout of a result: channels_last where either tensor's strides say so."""
    formats = (suggest_memory_format(first), suggest_memory_format(second))
    return torch.channels_last if torch.channels_last in formats else torch.contiguous_format


def _arrange(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    """``tensor`` in ``layout``, with that layout's strides along axes of length 1 too, where any would do."""
    whole = tensor.contiguous(memory_format=layout)
    tensor = whole.clone(memory_format=layout) if whole.storage_offset() else whole
    _, c, h, w = tensor.shape
    strides = (c * h * w, 1, w * c, c) if layout == torch.channels_last else (c * h * w, h * w, w, 1)
    return tensor if tensor.stride() == strides else tensor.as_strided(tensor.shape, strides)


def _empty(size: Sequence[int], like: Tensor, layout: torch.memory_format) -> Tensor:
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)


def _no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Autocast has had its say before the operator; inside, it would narrow the float32 sums."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
