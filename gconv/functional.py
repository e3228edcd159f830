"""The convolutions: with the arguments of PyTorch's functions, and what often follows a convolution.

:func:`group_conv2d` describes what they have in common.
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
    """Compute a grouped 1-d convolution on the fastest backend: ``F.conv1d``, and what often follows it.

    Nothing is copied to make it 2-d. The kernels read channels that lie side by side in memory, as those of a
    transposed (N, L, C) tensor do; "auto" takes them for a contiguous input only where they were measured to
    be worth its copies.

    Args:
        input: (N, C, L), or (C, L) without a batch. N may be 0.
        weight: (K, C / groups, S).
        bias, stride, padding, dilation, groups, activation, residual, backend: as in :func:`group_conv2d`,
            along one dimension.

    Returns:
        (N, K, Q), or (K, Q) without a batch, with Q = (L + 2 padding - dilation (S - 1) - 1) // stride + 1.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`group_conv2d`.
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
    """Compute a grouped 2-d convolution on the fastest backend: ``F.conv2d``, and what often follows it.

    Differentiable to any order, forward mode included; works under autocast, ``torch.compile``,
    ``torch.export`` and ``torch.func``.

    Args:
        input: (N, C, H, W), or (C, H, W) for one image. N may be 0.
        weight: (K, C / groups, R, S).
        bias: (K,), or None.
        stride: one number, or (vertical, horizontal); at least 1.
        padding: zeros around the image: one number, or (vertical, horizontal), at least 0; "valid" for none;
            "same" for as many as keep H and W, at stride 1.
        dilation: distance between taps, one number, or (vertical, horizontal); at least 1.
        groups: C and K are split into this many independent convolutions.
        activation: None, "relu", "relu6", "silu" or "hardswish", applied to the result.
        residual: added to the result before the activation, as ``+`` does: of its shape, or broadcast.
        backend: "auto", "triton", "aten" or "reference". Defaults to None, which takes that of an enclosing
            ``with gconv.backend(...)``.

    Returns:
        (N, K, P, Q), or (K, P, Q) for one image, channels_last if input or weight is. The height P is
        (H + 2 padding - dilation (R - 1) - 1) // stride + 1, the width Q likewise.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an unknown activation, backend or name of a padding.
        RuntimeError: numbers, shapes, dtypes or devices that don't fit together, as ``F.conv2d`` raises; or
            ``backend="triton"`` cannot run.
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
    """Compute a grouped 3-d convolution: ``F.conv3d``, and what often follows it.

    Kernels of depth 1 without stride or padding in depth are 2-d convolutions of the slices. "auto" takes
    gconv's kernels only for those, in channels_last_3d, and leaves all others to PyTorch. "triton" and
    "reference" compute any, but copy the input once for each tap in depth.

    Args:
        input: (N, C, D, H, W), or (C, D, H, W) without a batch. N may be 0.
        weight: (K, C / groups, T, R, S).
        bias, stride, padding, dilation, groups, activation, residual, backend: as in :func:`group_conv2d`;
            three numbers are (depth, vertical, horizontal).

    Returns:
        (N, K, D', P, Q), or (K, D', P, Q) without a batch, channels_last_3d if input or weight is.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`group_conv2d`.
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
    """Compute a grouped transposed 1-d convolution: ``F.conv_transpose1d``, and what often follows it.

    Args:
        input: (N, C, L), or (C, L) without a batch. N may be 0.
        weight: (C, K / groups, S).
        bias, stride, padding, output_padding, groups, dilation: as in :func:`group_conv_transpose2d`, along
            one dimension.
        activation, residual, backend: as in :func:`group_conv2d`.

    Returns:
        (N, K, Q), or (K, Q) without a batch.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`group_conv_transpose2d`.
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
    """Compute a grouped transposed 2-d convolution: ``F.conv_transpose2d``, and what often follows it.

    It is the input gradient of a convolution, and runs on the kernels of that pass.

    Args:
        input: (N, C, H, W), or (C, H, W) for one image. N may be 0.
        weight: (C, K / groups, R, S).
        bias: (K,), or None.
        stride: distance between the outputs of neighbouring inputs: one number, or (vertical, horizontal).
        padding: rows and columns to cut off on each side of the output; at least 0.
        output_padding: rows and columns to add at the end of the output; smaller than stride or dilation.
        groups: C and K are split into this many independent convolutions.
        dilation: distance between taps, one number, or (vertical, horizontal); at least 1.
        activation, residual, backend: as in :func:`group_conv2d`.

    Returns:
        (N, K, P, Q), or (K, P, Q) for one image, channels_last if input or weight is. The height P is
        (H - 1) stride - 2 padding + dilation (R - 1) + output_padding + 1, the width Q likewise.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an unknown activation or backend.
        RuntimeError: numbers, shapes, dtypes or devices don't fit together; no input reaches the output; or
            ``backend="triton"`` cannot run.
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
        kind: which one.
        function: the function above, for ``__torch_function__``.
        settings: what ``kind.pytorch`` takes after the bias.
        input, weight, bias, activation, residual, backend: as in :func:`group_conv2d`.
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
        # Under autocast PyTorch's functions cast, and remember the weights that they cast.
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
    """Compute it by PyTorch's functions, for a tracer whose sizes are tensors, or another class."""
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
    """Compute it by gconv's operators, on tensors of one dtype."""
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
    """Compute a transposed convolution that ends in rows or columns that no input reaches."""
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
    """Whether a kernel may add the residual and apply the activation.

    Not if someone may ask for gradients through them, or if the sum broadcasts or has another dtype than the
    convolution.
    """
    if residual is not None:
        alike = residual.shape == call.output_size and residual.dtype == input.dtype
        batched = input.ndim == call.kind.dims + 2
        if not (alike and batched) or residual.device != input.device or call.depth is not None:
            return False
    return not autograd.gradient_possible(input, weight, bias, residual)


def _has_its_own_convolution(tensor: Any) -> bool:
    """Whether PyTorch's function may mean something else to a tensor's class, which doesn't know ours."""
    if not isinstance(tensor, Tensor):
        return False
    own, plain = (getattr(cls.__torch_function__, "__func__", None) for cls in (type(tensor), Tensor))
    return own is not None and own is not plain
