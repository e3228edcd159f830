"""Gradients of the three operators: of any order, in reverse and forward mode.

The convolution is linear in x and in w, so the derivatives of each pass are the other two passes:

    y  = conv(x, w) + b      dx    = input_grad(dy, w)      dw, db = weight_grad(dy, x)
    dx = input_grad(dy, w)   d(dy) = conv(ddx, w)           dw     = weight_grad(dy, ddx)
    dw = weight_grad(dy, x)  d(dy) = conv(x, ddw) + ddb     dx     = input_grad(dy, ddw)

A transposed convolution is y = input_grad(x, w) + b. ``group_conv`` and ``weight_grad`` are the
differentiable versions of the operators. The rest of the package calls them, and so do the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from gconv import ops
from gconv.geometry import ConvGeometry
from gconv.namespace import registered
from gconv.torch_internals import (
    apply_function,
    below_autograd,
    forward_mode_active,
    jvp_nesting,
    transforms_active,
)

DIFFERENTIABLE = (None, "relu")  # activations whose gradient needs only the output


def group_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    activation: str | None,
    backend: str,
    transposed: bool = False,
) -> Tensor:
    """Return activation(conv(input, weight) + bias), with the input gradient as conv if ``transposed``.

    Args:
        input: (N, C, H, W); (N, K, P, Q) if transposed.
        weight: (K, C / groups, R, S).
        bias: (K,), or (C,) if transposed; None for no bias.
        geometry: sizes of the convolution that is not transposed.
        activation: None or "relu".
        backend: as in ``gconv.group_conv2d``.
        transposed: whether to compute the transposed convolution. Defaults to False.

    Returns:
        (N, K, P, Q); (N, C, H, W) if transposed.
    """
    if _in_eager_autograd():
        arguments = (input, weight, bias, geometry, activation, backend, transposed)
        return apply_function(GroupConvFunction, *arguments)
    return _correlation(transposed)(input, weight, bias, geometry, activation, None, backend)


def _correlation(transposed: bool) -> ops.Operator:
    return ops.input_grad if transposed else ops.forward


def weight_grad(
    grad_output: Tensor, input: Tensor, geometry: ConvGeometry, with_bias: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Return dw (K, C / groups, R, S) and dbias (K,), empty without bias, from grad_output and input."""
    if _in_eager_autograd():
        return apply_function(WeightGradFunction, grad_output, input, geometry, with_bias, backend)
    return ops.weight_grad(grad_output, input, geometry, with_bias, backend)


class GroupConvFunction(Function):
    """The forward pass or the input gradient; in its input, each is the adjoint of the other.

    Saves the input, the weight and, for the gradient of ReLU, the output.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: ConvGeometry,
        activation: str | None,
        backend: str,
        transposed: bool,
    ) -> Tensor:
        with below_autograd():
            return _correlation(transposed)(input, weight, bias, geometry, activation, None, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, weight, _, ctx.geometry, activation, ctx.backend, ctx.transposed = inputs
        saved = (input, weight, output if activation == "relu" else None)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, output = ctx.saved_tensors
        input_needed, weight_needed, bias_needed = ctx.needs_input_grad[:3]
        settings = (ctx.geometry, None, ctx.backend)
        grad_output = _through_relu(grad_output, output)
        grad_input = grad_weight = grad_bias = None
        if input_needed:
            grad_input = group_conv(grad_output, weight, None, *settings, not ctx.transposed)
        if weight_needed and ctx.transposed:
            grad_weight, _ = weight_grad(input, grad_output, ctx.geometry, False, ctx.backend)
        elif weight_needed:
            grad_weight, grad_bias = weight_grad(grad_output, input, ctx.geometry, bias_needed, ctx.backend)
        if not bias_needed:
            grad_bias = None
        elif grad_bias is None:
            grad_bias = grad_output.sum((0, 2, 3))
        return grad_input, grad_weight, grad_bias, None, None, None, None

    @staticmethod
    def jvp(
        ctx: Any, input_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None, *_: None
    ) -> Tensor | None:
        _refuse_nested_forward_mode()
        input, weight, output = ctx.saved_tensors
        settings = (ctx.geometry, None, ctx.backend, ctx.transposed)
        tangent = None
        if input_t is not None:
            tangent = group_conv(input_t, weight, None, *settings)
        if weight_t is not None:
            tangent = _sum(tangent, group_conv(input, weight_t, None, *settings))
        if bias_t is not None:
            size = ctx.geometry.input_size if ctx.transposed else ctx.geometry.output_size
            tangent = _sum(tangent, bias_t.view(-1, 1, 1).expand(size))
        return None if tangent is None else _through_relu(tangent, output)


class WeightGradFunction(Function):
    """The weight and bias gradients, which are the adjoint of the convolution in w and b."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_output: Tensor, input: Tensor, geometry: ConvGeometry, with_bias: bool, backend: str
    ) -> tuple[Tensor, Tensor]:
        with below_autograd():
            return ops.weight_grad(grad_output, input, geometry, with_bias, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        grad_output, input, ctx.geometry, ctx.with_bias, ctx.backend = inputs
        ctx.save_for_backward(grad_output, input)
        ctx.save_for_forward(grad_output, input)

    @staticmethod
    def backward(ctx: Any, grad_weight: Tensor, grad_bias: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, input = ctx.saved_tensors
        output_needed, input_needed = ctx.needs_input_grad[:2]
        grad_grad = grad_input = None
        if output_needed:
            bias = grad_bias if ctx.with_bias else None
            grad_grad = group_conv(input, grad_weight, bias, ctx.geometry, None, ctx.backend)
        if input_needed:
            grad_input = group_conv(grad_output, grad_weight, None, ctx.geometry, None, ctx.backend, True)
        return grad_grad, grad_input, None, None, None

    @staticmethod
    def jvp(ctx: Any, grad_t: Tensor | None, input_t: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        _refuse_nested_forward_mode()
        grad_output, input = ctx.saved_tensors
        weight_t: Tensor | None = None
        bias_t: Tensor | None = None
        if grad_t is not None:
            weight_t, bias_t = weight_grad(grad_t, input, ctx.geometry, ctx.with_bias, ctx.backend)
        if input_t is not None:
            more = weight_grad(grad_output, input_t, ctx.geometry, False, ctx.backend)[0]
            weight_t = _sum(weight_t, more)
        return weight_t, bias_t


def _in_eager_autograd() -> bool:
    """Whether to run the pass through a Function, because its gradient may be needed.

    Returns False while Dynamo traces, because it can't trace a Function with a ``jvp``. Compiled graphs
    contain the operator instead, whose autograd kernel applies the Function when the graph is differentiated.
    """
    return not torch.compiler.is_compiling() and (torch.is_grad_enabled() or forward_mode_active())


def gradient_possible(*tensors: Tensor | None) -> bool:
    """Whether a gradient through any of ``tensors`` may be needed."""
    if forward_mode_active() or transforms_active():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _refuse_nested_forward_mode() -> None:
    """Raise RuntimeError in nested forward mode.

    There PyTorch passes a Function's ``jvp`` saved tensors without their outer tangents, so the result would
    be silently wrong.
    """
    if jvp_nesting() > 1:
        raise RuntimeError(
            "gconv doesn't support forward mode inside forward mode: "
            "use jacfwd of jacrev, as torch.func.hessian does, or backend='aten'"
        )


def _through_relu(grad: Tensor, output: Tensor | None) -> Tensor:
    """Return ``grad`` where ReLU passed its input and 0 elsewhere, with PyTorch's rule for zeros and NaN."""
    return grad if output is None else torch.ops.aten.threshold_backward(grad, output, 0)


def _sum(first: Tensor | None, second: Tensor) -> Tensor:
    return second if first is None else first + second


def _differentiable_convolution(
    transposed: bool,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    activation: str | None,
    residual: Tensor | None,
    backend: str,
) -> Tensor:
    if residual is None and activation in DIFFERENTIABLE:
        arguments = (input, weight, bias, geometry, activation, backend, transposed)
        return apply_function(GroupConvFunction, *arguments)
    if gradient_possible(input, weight, bias, residual):
        raise RuntimeError(
            "a residual or activation inside the kernel has no gradient: use it for inference only"
        )
    with below_autograd():
        return _correlation(transposed)(input, weight, bias, geometry, activation, residual, backend)


def _make_differentiable(operator: ops.Operator, with_gradient: Callable[..., Any]) -> None:
    """Register the gradient of ``operator`` for graphs that call it directly, compiled or exported.

    ``with_gradient`` has the arguments of ``operator.run``.
    """

    def autograd_kernel(*args: Any) -> Any:
        if not (torch.is_grad_enabled() or forward_mode_active()):
            with below_autograd():
                return getattr(registered, operator.name)(*args)
        if transforms_active():
            raise RuntimeError(
                "gconv's operators can't be transformed by torch.func inside torch.compile: "
                "transform the compiled function instead, or use backend='aten' inside it"
            )
        return with_gradient(*operator.unpack(args))

    ops.library.impl(operator.name, autograd_kernel, "Autograd")


_make_differentiable(ops.forward, partial(_differentiable_convolution, False))
_make_differentiable(ops.input_grad, partial(_differentiable_convolution, True))
_make_differentiable(ops.weight_grad, partial(apply_function, WeightGradFunction))


def _refuse_gradients(operator: ops.Operator) -> None:
    """Make ``operator`` raise an error if it needs a gradient, which only its caller in gconv can compute."""

    def autograd_kernel(*args: Any) -> Any:
        if gradient_possible(*[a for a in args if isinstance(a, Tensor)]):
            raise RuntimeError(
                f"gconv.{operator.name} has no gradient: call gconv.conv_between_norms instead"
            )
        with below_autograd():
            return getattr(registered, operator.name)(*args)

    ops.library.impl(operator.name, autograd_kernel, "Autograd")


for _operator in (ops.norm_forward, ops.norm_input_grad, ops.norm_weight_grad):
    _refuse_gradients(_operator)
