"""``conv_between_norms``: batch norm, ReLU, convolution, batch norm, ReLU, with the norms in its kernels.

With z the input and a the input of the convolution, the forward pass computes

    the statistics of z
    y = conv(a), computing a = relu(norm(z)) when it loads z, and the statistics of y when it stores y
    relu(norm(y))

In the backward pass, the input gradient applies the gradient of the ReLU when it stores its result, and
computes the sums that the gradient of the batch norm needs. The weight gradient computes a from z again. So a
is never in memory, and the statistics of y need no extra pass.
"""

from __future__ import annotations

from contextlib import nullcontext
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from gconv import batch_norm, dispatch, ops
from gconv.arguments import prepare
from gconv.geometry import ConvGeometry
from gconv.kinds import CONV2D
from gconv.module import GroupConv2d, is_watched
from gconv.torch_internals import BatchNormBase, forward_mode_active, has_global_hooks, transforms_active


def conv_between_norms(
    input: Tensor,
    before: nn.BatchNorm2d,
    conv: nn.Conv2d,
    after: nn.BatchNorm2d,
    *,
    backend: str | None = None,
) -> Tensor:
    """Compute ``relu(after(conv(relu(before(input)))))`` with fewer passes over memory.

    Works in training and evaluation mode. Gradients and updates of the running statistics are those of the
    modules.

    Falls back to calling the modules one after the other if the kernels can't run or wouldn't be faster:

    - on the backend "aten", which "auto" selects on a CPU
    - if a norm is of another class than ``nn.BatchNorm2d``, such as ``nn.SyncBatchNorm``, or has no weights
      or running statistics
    - if the convolution is of another class than ``gconv.GroupConv2d``, has an activation, or has a
      ``padding_mode`` other than "zeros"
    - if a module has hooks
    - if autocast would narrow the input
    - under ``torch.func``, forward mode, ``torch.export`` and ``torch.jit.trace``

    Args:
        input: (N, C, H, W).
        before: batch norm of the C input channels.
        conv: convolution from C to K channels.
        after: batch norm of the K output channels.
        backend: "auto", "triton", "aten" or "reference". Defaults to None: the one set by ``gconv.backend``.

    Returns:
        The output, (N, K, P, Q). It is channels_last if input or weight is.

    Raises:
        TypeError: ``input`` or a number is of the wrong type.
        ValueError: the backend is unknown, or there is only one value per channel in training.
        RuntimeError: sizes, dtypes or devices don't fit together, ``backend="triton"`` can't run, or a second
            derivative is needed.

    Examples:
        >>> before, after = nn.BatchNorm2d(128), nn.BatchNorm2d(128)
        >>> conv = gconv.GroupConv2d(128, 128, 3, padding=1, groups=32, bias=False)
        >>> gconv.conv_between_norms(torch.randn(8, 128, 56, 56), before, conv, after).shape
        torch.Size([8, 128, 56, 56])
    """
    if not _can_fuse(input, before, conv, after):
        return _one_by_one(input, before, conv, after, backend)
    dtype, call = prepare(CONV2D, input, conv.weight, conv.bias, CONV2D.settings_of(conv))
    geometry = call.geometry
    name = dispatch.requested(backend)
    fits = input.dtype == dtype and _sizes_fit(before, after, geometry)  # norms aren't narrowed by autocast
    if dispatch.aten_alone(name, input, dtype, call) or not fits:
        return _one_by_one(input, before, conv, after, backend)
    weight, bias = (None if t is None else t.to(dtype) for t in (conv.weight, conv.bias))
    with torch.no_grad():
        own = _run("moments", name, input) if before.training else None
        norm, variance = _norm(before, own, input)
    arguments = (before.weight, before.bias, weight, bias, norm, variance, before.eps, before.training)
    y, moments = _Convolution.apply(input, *arguments, geometry, name)
    with torch.no_grad():
        norm, variance = _norm(after, moments if after.training else None, y)
    return _Normalisation.apply(y, after.weight, after.bias, norm, variance, after.eps, after.training, name)


def _one_by_one(
    input: Tensor, before: nn.Module, conv: nn.Module, after: nn.Module, backend: str | None
) -> Tensor:
    with nullcontext() if backend is None else dispatch.backend(backend):
        return _relu(after, conv(_relu(before, input)))


def _relu(norm: nn.Module, x: Tensor) -> Tensor:
    """Compute relu(norm(x)), in place if ``norm`` is a batch norm without hooks that could see its output."""
    own = isinstance(norm, BatchNormBase) and not is_watched(norm)
    return F.relu(norm(x), inplace=own)


def _can_fuse(input: Any, before: nn.Module, conv: nn.Module, after: nn.Module) -> bool:
    """Whether the kernels support the call, and no hook needs the tensors between the modules."""
    if type(input) is not Tensor or input.ndim != 4 or not input.is_floating_point():
        return False
    if not all(map(_is_plain_norm, (before, after))) or type(conv) is not GroupConv2d:
        return False
    if conv.padding_mode != "zeros" or conv.activation is not None:
        return False
    if has_global_hooks() or any(map(is_watched, (before, conv, after))):
        return False
    traced = torch.jit.is_tracing() or torch.compiler.is_exporting()
    return not (traced or transforms_active() or forward_mode_active())


def _is_plain_norm(norm: nn.Module) -> bool:
    """Whether ``norm`` has weights and running statistics, which it updates at a fixed rate."""
    if type(norm) is not nn.BatchNorm2d or norm.momentum is None or not norm.track_running_stats:
        return False
    has = (norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked)
    return all(tensor is not None for tensor in has)


def _sizes_fit(before: nn.BatchNorm2d, after: nn.BatchNorm2d, geometry: ConvGeometry) -> bool:
    """Whether the channels match and there is more than one pixel; if not, the modules raise the error."""
    n, c, h, w = geometry.input_size
    _, k, p, q = geometry.output_size
    return before.num_features == c and after.num_features == k and n * h * w > 1 and n * p * q > 1


def _run(name: str, backend: str, *tensors: Tensor) -> Tensor:
    """Run a function of ``gconv.batch_norm``, or the kernel of the same name, on ``tensors``.

    Compiled graphs use the function, because the compiler can fuse its operators.
    """
    kernels = backend in ("auto", "triton") and tensors[0].dtype in dispatch.TRITON_DTYPES
    module = batch_norm
    if kernels and ops.ordinary(*tensors):
        module = import_module("..kernels.batch_norm", __spec__.parent)
    return getattr(module, name)(*tensors)


def _norm(norm: nn.BatchNorm2d, moments: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``norm`` (3, C) for x, and its variance (C,).

    Args:
        norm: the batch norm.
        moments: statistics of the batch, (2, C), which also update the running statistics. None to use the
            running statistics.
        x: input of the norm.
    """
    running_mean, running_var, momentum = norm.running_mean, norm.running_var, norm.momentum
    batches = norm.num_batches_tracked
    assert running_mean is not None and running_var is not None  # _is_plain_norm has checked
    assert batches is not None and momentum is not None
    if moments is None:
        dtype = batch_norm.wide_dtype(x.dtype)
        # A copy: the backward pass needs the variance, and training in between would change it.
        mean, variance = running_mean.to(dtype), running_var.to(dtype, copy=True)
    else:
        mean, variance = moments
        pixels = x.numel() // x.shape[1]
        batches.add_(1)
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        unbiased = variance * (pixels / (pixels - 1))
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    return batch_norm.make_norm(mean, variance, norm.eps, norm.weight, norm.bias), variance


class _Convolution(Function):
    """Compute y = conv(relu(norm(input))) and the moments of y, with gradients through the statistics."""

    @staticmethod
    def forward(
        input: Tensor,
        gamma: Tensor,
        beta: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm: Tensor,
        variance: Tensor,
        eps: float,
        of_batch: bool,
        geometry: ConvGeometry,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        return ops.norm_forward(input, norm, weight, bias, geometry, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        input, gamma, _, weight, _, norm, variance, ctx.eps, ctx.of_batch, ctx.geometry, ctx.backend = inputs
        ctx.save_for_backward(input, gamma, weight, norm, variance)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 11
        input, gamma, weight, norm, variance = ctx.saved_tensors
        geometry, backend = ctx.geometry, ctx.backend
        through: tuple[Tensor | None, ...] = (None, None, None)
        weights: tuple[Tensor | None, ...] = (None, None)
        if any(ctx.needs_input_grad[:3]):
            grad_norm, sums = ops.norm_input_grad(grad, weight, input, norm, geometry, backend)
            through = _norm_gradients(ctx, grad_norm, input, gamma, norm, variance, sums)
        if any(ctx.needs_input_grad[3:5]):
            with_bias = ctx.needs_input_grad[4]
            weights = ops.norm_weight_grad(grad, input, norm, geometry, with_bias, backend)
        return *through, weights[0], weights[1] if ctx.needs_input_grad[4] else None, *(None,) * 6


class _Normalisation(Function):
    """Compute relu(norm(y)), with gradients through the statistics if they are those of y."""

    @staticmethod
    def forward(
        y: Tensor,
        gamma: Tensor,
        beta: Tensor,
        norm: Tensor,
        variance: Tensor,
        eps: float,
        of_batch: bool,
        backend: str,
    ) -> Tensor:
        return _run("normalise", backend, y, norm)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        y, gamma, _, norm, variance, ctx.eps, ctx.of_batch, ctx.backend = inputs
        ctx.save_for_backward(y, gamma, norm, variance)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, gamma, norm, variance = ctx.saved_tensors
        sums = _run("grad_sums", ctx.backend, grad, y, norm)
        return *_norm_gradients(ctx, grad, y, gamma, norm, variance, sums), *(None,) * 5


def _norm_gradients(
    ctx: Any, grad: Tensor, x: Tensor, gamma: Tensor, norm: Tensor, variance: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, gamma and beta from the gradient of relu(norm(x)) and its two sums."""
    pixels = x.numel() // x.shape[1]
    slope = (
        batch_norm.slope(sums, norm, variance, ctx.eps, pixels) if ctx.of_batch else torch.zeros_like(sums)
    )
    grad_x = _run("through_norm", ctx.backend, grad, x, norm, slope)
    grad_gamma = sums[1] * torch.rsqrt(variance + ctx.eps)
    return grad_x, grad_gamma.to(gamma.dtype), sums[0].to(gamma.dtype)
