"""The convolution functions: those of PyTorch, with an optional activation and residual.

``group_conv2d`` documents what they have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from gconv import autograd, dispatch, ops
from gconv.activation import ACTIVATIONS, finish
from gconv.arguments import prepare
from gconv.batch_norm import wide, wide_dtype
from gconv.kinds import CONV1D, CONV2D, CONV3D, CONV_TRANSPOSE1D, CONV_TRANSPOSE2D, Call, Kind


def group_conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute a grouped 1-d convolution, with an optional residual and activation, on the fastest backend.

    Accepts everything ``F.conv1d`` does, and runs the same kernels as ``group_conv2d``, on images of one row.
    These kernels read channels that are adjacent in memory, as in a transposed (N, L, C) tensor. A contiguous
    input has to be copied; "auto" does that only if it was measured to be faster.

    Args:
        input: (N, C, L), or (C, L) without a batch. N may be 0.
        weight: (K, C / groups, S).
        bias: (K,), or None for no bias. Defaults to None.
        stride: distance between the inputs of neighboring outputs, at least 1. Defaults to 1.
        padding: zeros on each side, at least 0; "valid" for none, "same" to keep the length at stride 1.
            Defaults to 0.
        dilation: distance between the taps of the kernel, at least 1. Defaults to 1.
        groups: number of groups, which divides C and K. Defaults to 1.
        activation: None, "relu", "relu6", "silu" or "hardswish", applied to the result. Defaults to None.
        residual: tensor to add before the activation, broadcast with the output. Defaults to None.
        backend: "auto", "triton", "aten" or "reference". Defaults to None: the one set by ``gconv.backend``.

    Returns:
        The output, (N, K, Q), or (K, Q) without a batch. Its length Q is
            (L + 2 padding - dilation (S - 1) - 1) // stride + 1.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the activation, the backend or the padding mode is unknown.
        RuntimeError: sizes, dtypes or devices don't fit together, or ``backend="triton"`` can't run.

    Examples:
        A depthwise convolution over time, as in a Conformer:

        >>> frames = torch.randn(8, 100, 256)  # (N, L, C)
        >>> weight = torch.randn(256, 1, 31)
        >>> gconv.group_conv1d(frames.transpose(1, 2), weight, padding=15, groups=256).shape
        torch.Size([8, 256, 100])
    """
    settings = (stride, padding, dilation, groups)
    return _convolve(CONV1D, group_conv1d, input, weight, bias, settings, activation, residual, backend)


def group_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute a grouped 2-d convolution, with an optional residual and activation, on the fastest backend.

    Accepts everything ``F.conv2d`` does, including unbatched and empty inputs and any layout. Returns
    activation(conv(input, weight) + bias + residual).

    It is differentiable to any order, in reverse and forward mode, and works under autocast,
    ``torch.compile``, ``torch.export`` and ``torch.func``. In inference, residual and activation run inside
    the kernels.

    Args:
        input: (N, C, H, W), or (C, H, W) for one image. N may be 0.
        weight: (K, C / groups, R, S).
        bias: (K,), or None for no bias. Defaults to None.
        stride: distance between the inputs of neighboring outputs, one number or (vertical, horizontal), at
            least 1. Defaults to 1.
        padding: zeros on each side of the image, one number or (vertical, horizontal), at least 0; "valid"
            for none, "same" to keep H and W at stride 1. Defaults to 0.
        dilation: distance between the taps of the kernel, one number or (vertical, horizontal), at least 1.
            Defaults to 1.
        groups: number of groups, which divides C and K. Each group of C / groups input channels is connected
            only to its K / groups output channels. Defaults to 1.
        activation: None, "relu", "relu6", "silu" or "hardswish", applied to the result. Defaults to None.
        residual: tensor to add before the activation, broadcast with the output. Defaults to None.
        backend: "auto", "triton", "aten" or "reference". Defaults to None: that of the enclosing
            ``with gconv.backend(...)``, otherwise "auto".

    Returns:
        The output, (N, K, P, Q), or (K, P, Q) for one image. It is channels_last if input or weight is. Its
            height P is (H + 2 padding - dilation (R - 1) - 1) // stride + 1; its width Q is computed the same
            way from W and S.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the activation, the backend or the padding mode is unknown.
        RuntimeError: sizes, dtypes or devices don't fit together, or ``backend="triton"`` can't run.

    Examples:
        >>> x, weight = torch.randn(8, 128, 56, 56), torch.randn(128, 4, 3, 3)
        >>> gconv.group_conv2d(x, weight, padding=1, groups=32).shape
        torch.Size([8, 128, 56, 56])

        A residual branch in one call, relu(conv(x) + x):

        >>> y = gconv.group_conv2d(x, weight, padding=1, groups=32, activation="relu", residual=x)
    """
    settings = (stride, padding, dilation, groups)
    return _convolve(CONV2D, group_conv2d, input, weight, bias, settings, activation, residual, backend)


def group_conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute a grouped 3-d convolution, with an optional residual and activation, on the fastest backend.

    Accepts everything ``F.conv3d`` does. If the kernel has depth 1, and no stride or padding in depth, the
    slices of a channels_last_3d input run as images of a 2-d convolution, without a copy. "auto" uses gconv's
    kernels only for these and PyTorch for all others. "triton" and "reference" compute any 3-d convolution,
    but copy the input once for each tap in depth.

    Args:
        input: (N, C, D, H, W), or (C, D, H, W) without a batch. N may be 0.
        weight: (K, C / groups, T, R, S).
        bias: (K,), or None for no bias. Defaults to None.
        stride: distance between the inputs of neighboring outputs, one number or (depth, vertical,
            horizontal), at least 1. Defaults to 1.
        padding: zeros on each side, one number or (depth, vertical, horizontal), at least 0; "valid" for
            none, "same" to keep D, H and W at stride 1. Defaults to 0.
        dilation: distance between the taps of the kernel, one number or (depth, vertical, horizontal), at
            least 1. Defaults to 1.
        groups: number of groups, which divides C and K. Defaults to 1.
        activation: None, "relu", "relu6", "silu" or "hardswish", applied to the result. Defaults to None.
        residual: tensor to add before the activation, broadcast with the output. Defaults to None.
        backend: "auto", "triton", "aten" or "reference". Defaults to None: the one set by ``gconv.backend``.

    Returns:
        The output, (N, K, D', P, Q), or (K, D', P, Q) without a batch, with sizes as in ``group_conv2d``.
            It is channels_last_3d if input or weight is.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the activation, the backend or the padding mode is unknown.
        RuntimeError: sizes, dtypes or devices don't fit together, or ``backend="triton"`` can't run.

    Examples:
        >>> x = torch.randn(1, 64, 8, 28, 28).to(memory_format=torch.channels_last_3d)
        >>> weight = torch.randn(64, 4, 1, 3, 3)
        >>> gconv.group_conv3d(x, weight, padding=(0, 1, 1), groups=16).shape
        torch.Size([1, 64, 8, 28, 28])
    """
    settings = (stride, padding, dilation, groups)
    return _convolve(CONV3D, group_conv3d, input, weight, bias, settings, activation, residual, backend)


def group_conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute a grouped transposed 1-d convolution, with an optional residual and activation.

    Accepts everything ``F.conv_transpose1d`` does, and runs the kernels of ``group_conv_transpose2d`` on
    images of one row.

    Args:
        input: (N, C, L), or (C, L) without a batch. N may be 0.
        weight: (C, K / groups, S).
        bias: (K,), or None for no bias. Defaults to None.
        stride: distance between the outputs of neighboring inputs, at least 1. Defaults to 1.
        padding: outputs to cut off on each side, at least 0. Defaults to 0.
        output_padding: outputs to add at the end, less than stride or dilation. Defaults to 0.
        groups: number of groups, which divides C and K. Defaults to 1.
        dilation: distance between the taps of the kernel, at least 1. Defaults to 1.
        activation: None, "relu", "relu6", "silu" or "hardswish", applied to the result. Defaults to None.
        residual: tensor to add before the activation, broadcast with the output. Defaults to None.
        backend: "auto", "triton", "aten" or "reference". Defaults to None: the one set by ``gconv.backend``.

    Returns:
        The output, (N, K, Q), or (K, Q) without a batch. Its length Q is
            (L - 1) stride - 2 padding + dilation (S - 1) + output_padding + 1.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the activation or the backend is unknown.
        RuntimeError: sizes, dtypes or devices don't fit together, no input reaches the output, or
            ``backend="triton"`` can't run.
    """
    settings = (stride, padding, output_padding, groups, dilation)
    function = group_conv_transpose1d
    return _convolve(CONV_TRANSPOSE1D, function, input, weight, bias, settings, activation, residual, backend)


def group_conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute a grouped transposed 2-d convolution, with an optional residual and activation.

    Accepts everything ``F.conv_transpose2d`` does. It is the input gradient of a convolution and runs the
    kernels of that pass.

    Args:
        input: (N, C, H, W), or (C, H, W) for one image. N may be 0.
        weight: (C, K / groups, R, S).
        bias: (K,), or None for no bias. Defaults to None.
        stride: distance between the outputs of neighboring inputs, one number or (vertical, horizontal), at
            least 1. Defaults to 1.
        padding: rows and columns to cut off on each side of the output, one number or (vertical, horizontal),
            at least 0. Defaults to 0.
        output_padding: rows and columns to add at the end of the output, one number or (vertical,
            horizontal), less than stride or dilation. Defaults to 0.
        groups: number of groups, which divides C and K. Defaults to 1.
        dilation: distance between the taps of the kernel, one number or (vertical, horizontal), at least 1.
            Defaults to 1.
        activation: None, "relu", "relu6", "silu" or "hardswish", applied to the result. Defaults to None.
        residual: tensor to add before the activation, broadcast with the output. Defaults to None.
        backend: "auto", "triton", "aten" or "reference". Defaults to None: the one set by ``gconv.backend``.

    Returns:
        The output, (N, K, P, Q), or (K, P, Q) for one image. It is channels_last if input or weight is. Its
            height P is (H - 1) stride - 2 padding + dilation (R - 1) + output_padding + 1; its width Q is
            computed the same way from W and S.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the activation or the backend is unknown.
        RuntimeError: sizes, dtypes or devices don't fit together, no input reaches the output, or
            ``backend="triton"`` can't run.

    Examples:
        >>> x, weight = torch.randn(2, 64, 14, 14), torch.randn(64, 1, 4, 4)
        >>> gconv.group_conv_transpose2d(x, weight, stride=2, padding=1, groups=64).shape
        torch.Size([2, 64, 28, 28])
    """
    settings = (stride, padding, output_padding, groups, dilation)
    function = group_conv_transpose2d
    return _convolve(CONV_TRANSPOSE2D, function, input, weight, bias, settings, activation, residual, backend)


def _convolve(
    kind: Kind,
    function: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    settings: tuple[Any, ...],
    activation: str | None,
    residual: Tensor | None,
    backend: str | None,
) -> Tensor:
    """Compute any of the convolutions.

    Args:
        kind: which convolution.
        function: the public function, for ``__torch_function__``.
        settings: the arguments of ``kind.pytorch`` after the bias.
        input, weight, bias, activation, residual, backend: as in ``group_conv2d``.
    """
    tensors = (input, weight, bias, residual)
    watched = has_torch_function_variadic(*tensors)
    if torch.jit.is_tracing() or (watched and any([_has_its_own_convolution(tensor) for tensor in tensors])):
        return _trace(kind, input, weight, bias, settings, activation, residual)
    if watched:
        options = {"activation": activation, "residual": residual, "backend": backend}
        return handle_torch_function(function, tensors, input, weight, bias, *settings, **options)
    dtype, call = prepare(kind, input, weight, bias, settings, activation, residual)
    name = dispatch.requested(backend)
    if dispatch.aten_alone(name, input, dtype, call):
        # Under autocast PyTorch's functions cast their arguments, and cache the cast weights.
        return finish(kind.pytorch(input, weight, bias, *call.settings), residual, activation)
    input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _run_operators(call, input, weight, bias, activation, residual, name)


def _trace(
    kind: Kind,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    settings: tuple[Any, ...],
    activation: str | None,
    residual: Any,
) -> Tensor:
    """Compute a convolution with PyTorch's functions, for ``torch.jit.trace`` and for tensor subclasses."""
    output = kind.pytorch(input, weight, bias, *settings)
    output = output if residual is None else output + residual
    return output if activation is None else ACTIVATIONS[activation](output)


def _run_operators(
    call: Call,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    backend: str,
) -> Tensor:
    """Compute a convolution with gconv's operators; the tensors have the same dtype."""
    narrow = input.dtype != wide_dtype(input.dtype)
    if call.adds_gradients and narrow and autograd.gradient_possible(input, weight, bias):
        wide_bias = None if bias is None else wide(bias)
        output = _run_operators(call, wide(input), wide(weight), wide_bias, None, None, backend)
        return finish(output.to(input.dtype), residual, activation)
    if call.beyond != (0, 0):
        return _with_rows_beyond(call, input, weight, bias, activation, residual, backend)
    transposed = call.kind.transposed
    images, kernel = call.as_images(input), call.as_kernel(weight)
    if transposed and kernel.is_complex():
        kernel = kernel.conj()  # the input gradient conjugates it
    if residual is None and activation in autograd.DIFFERENTIABLE:
        output = autograd.group_conv(images, kernel, bias, call.geometry, activation, backend, transposed)
    elif _epilogue_fits(call, input, weight, bias, residual):
        operator = ops.input_grad if transposed else ops.forward
        side = None if residual is None else call.as_images(residual)
        output = operator(images, kernel, bias, call.geometry, activation, side, backend)
    else:
        output = autograd.group_conv(images, kernel, bias, call.geometry, None, backend, transposed)
        return finish(call.as_output(output, input, weight), residual, activation)
    return call.as_output(output, input, weight)


def _with_rows_beyond(
    call: Call,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    backend: str,
) -> Tensor:
    """Compute a transposed convolution whose last rows or columns no input reaches."""
    rows, columns = call.beyond
    zeros = (0, columns, 0, rows)[: 2 * call.kind.dims]
    reached = _run_operators(call._replace(beyond=(0, 0)), input, weight, bias, None, None, backend)
    output = F.pad(reached, zeros)
    if bias is not None:
        inside = F.pad(reached.new_ones(reached.shape[-call.kind.dims :], dtype=torch.bool), zeros)
        output = torch.where(inside, output, bias.view(-1, *[1] * call.kind.dims))
    return finish(output, residual, activation)


def _epilogue_fits(
    call: Call, input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> bool:
    """Whether a kernel can add the residual and apply the activation.

    It can't if gradients through them may be needed, or if the sum broadcasts or has another dtype than the
    convolution.
    """
    if residual is not None:
        alike = residual.shape == call.output_size and residual.dtype == input.dtype
        batched = input.ndim == call.kind.dims + 2
        if not (alike and batched) or residual.device != input.device or call.depth is not None:
            return False
    return not autograd.gradient_possible(input, weight, bias, residual)


def _has_its_own_convolution(tensor: Any) -> bool:
    """Whether the class of a tensor may override PyTorch's function, and so can't know gconv's."""
    if not isinstance(tensor, Tensor):
        return False
    own, plain = (getattr(cls.__torch_function__, "__func__", None) for cls in (type(tensor), Tensor))
    return own is not None and own is not plain
