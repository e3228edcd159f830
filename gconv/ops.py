"""The passes as PyTorch operators: ``torch.ops.gconv.forward``, ``input_grad`` and so on.

As operators they stay whole in a compiled or exported graph. Each has a fake kernel (sizes and strides
without data) and a FLOP formula for PyTorch's flop counter; :mod:`gconv.autograd` gives them their gradients.
Where "aten" runs every pass, :func:`gconv.group_conv2d` calls ``F.conv2d`` instead, and none of this is used.

Arguments are those that :func:`gconv.group_conv2d` has checked: ``padding`` is (top, bottom, left, right),
``activation`` None or a name of ``gconv.activation.ACTIVATIONS``, ``backend`` one of
``gconv.dispatch.BACKENDS``. What ``norm`` is, :mod:`gconv.batch_norm` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gconv import passes
from gconv.geometry import ConvGeometry

_SETTINGS = "int[2] stride, SymInt[4] padding, int[2] dilation, SymInt groups, str backend"

# define and impl, not custom_op: a quarter of its host time a call.
library = torch.library.Library("gconv", "DEF")
library.define(
    "forward(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, str? activation, "
    f"{_SETTINGS}) -> Tensor"
)
library.define(f"input_grad(Tensor grad_output, Tensor weight, SymInt[4] input_size, {_SETTINGS}) -> Tensor")
library.define(
    "weight_grad(Tensor grad_output, Tensor input, SymInt[4] weight_size, bool with_bias, "
    f"{_SETTINGS}) -> (Tensor, Tensor)"
)
library.define(
    f"norm_forward(Tensor input, Tensor norm, Tensor weight, Tensor? bias, {_SETTINGS}) -> (Tensor, Tensor)"
)
library.define(
    "norm_input_grad(Tensor grad_output, Tensor weight, Tensor input, Tensor norm, "
    f"{_SETTINGS}) -> (Tensor, Tensor)"
)
library.define(
    "norm_weight_grad(Tensor grad_output, Tensor input, Tensor norm, SymInt[4] weight_size, bool with_bias, "
    f"{_SETTINGS}) -> (Tensor, Tensor)"
)


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    geometry: ConvGeometry,
    backend: str,
) -> Tensor:
    """Run the forward pass."""
    return _run("forward", (input, weight, bias, residual), (), (activation,), geometry, backend)


def input_grad(grad_output: Tensor, weight: Tensor, geometry: ConvGeometry, backend: str) -> Tensor:
    """Run the input gradient."""
    return _run("input_grad", (grad_output, weight), (geometry.input_size,), (), geometry, backend)


def weight_grad(
    grad_output: Tensor, input: Tensor, with_bias: bool, geometry: ConvGeometry, backend: str
) -> tuple[Tensor, Tensor]:
    """Run the weight gradient."""
    size = (geometry.weight_size,)
    return _run("weight_grad", (grad_output, input), size, (with_bias,), geometry, backend)


def norm_forward(
    input: Tensor, norm: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry, backend: str
) -> tuple[Tensor, Tensor]:
    """Run the forward pass between batch norms."""
    return _run("norm_forward", (input, norm, weight, bias), (), (), geometry, backend)


def norm_input_grad(
    grad_output: Tensor, weight: Tensor, input: Tensor, norm: Tensor, geometry: ConvGeometry, backend: str
) -> tuple[Tensor, Tensor]:
    """Run the input gradient between batch norms."""
    return _run("norm_input_grad", (grad_output, weight, input, norm), (), (), geometry, backend)


def norm_weight_grad(
    grad_output: Tensor, input: Tensor, norm: Tensor, with_bias: bool, geometry: ConvGeometry, backend: str
) -> tuple[Tensor, Tensor]:
    """Run the weight gradient between batch norms."""
    size = (geometry.weight_size,)
    return _run("norm_weight_grad", (grad_output, input, norm), size, (with_bias,), geometry, backend)


def _run(
    name: str,
    tensors: tuple[Tensor | None, ...],
    size: tuple[tuple[int, ...], ...],
    options: tuple[Any, ...],
    geometry: ConvGeometry,
    backend: str,
) -> Any:
    """Run a pass through its operator if anything is watching operators, and directly otherwise.

    An operator written in Python costs the host 25 us a call. Every tensor of every pass goes through here,
    so that none reaches a kernel unless its numbers are what lies in its memory.

    Args:
        name: of the operator, and of the function in :mod:`gconv.passes`.
        tensors: all tensors of the call, which come first in both.
        size: what the operator alone takes after them.
        options: what both take next.
    """
    if unwatched(*tensors):
        with below_autograd():
            return getattr(passes, name)(*tensors, *options, geometry, backend)
    return getattr(torch.ops.gconv, name)(*tensors, *size, *options, *geometry.settings, backend)


# Below the tracking of views as well: an operator's result is its own, whatever views its making took.
below_autograd = torch._C._AutoDispatchBelowADInplaceOrView
_PLAIN = (Tensor, torch.nn.Parameter)


def unwatched(*tensors: Tensor | None) -> bool:
    """Whether nobody would notice an operator: no tracer, mode, transform, subclass or profiler."""
    return ordinary(*tensors) and not torch.autograd._profiler_enabled()


def ordinary(*tensors: Tensor | None) -> bool:
    """Whether tensors hold numbers for a kernel to read: no tracer, mode, transform or subclass is about."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    keys = _ordinary_keys(tensors[0].device)
    for tensor in tensors:  # all() of a generator takes half a microsecond more
        if tensor is not None and not (type(tensor) in _PLAIN and _keys(tensor) in keys):
            return False
    return True


def _keys(tensor: Tensor) -> int:
    return torch._C._dispatch_keys(tensor).raw_repr()


@cache
def _ordinary_keys(device: torch.device) -> frozenset[int]:
    """Dispatch keys of tensors that hold their numbers: not batched, lazily conjugated, wrapped and so on."""
    found = set()
    for inference in () if device.type == "meta" else (False, True):
        with torch.inference_mode(inference):
            found.add(_keys(torch.empty(0, device=device)))
    return frozenset(found)


def _forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    *settings: Any,
) -> Tensor:
    geometry = ConvGeometry.of(input.shape, weight.shape, *settings[:-1])
    return passes.forward(input, weight, bias, residual, activation, geometry, settings[-1])


def _input_grad(grad_output: Tensor, weight: Tensor, input_size: Sequence[int], *settings: Any) -> Tensor:
    geometry = ConvGeometry.of(input_size, weight.shape, *settings[:-1])
    return passes.input_grad(grad_output, weight, geometry, settings[-1])


def _weight_grad(
    grad_output: Tensor, input: Tensor, weight_size: Sequence[int], with_bias: bool, *settings: Any
) -> tuple[Tensor, Tensor]:
    geometry = ConvGeometry.of(input.shape, weight_size, *settings[:-1])
    return passes.weight_grad(grad_output, input, with_bias, geometry, settings[-1])


def _norm_forward(
    input: Tensor, norm: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor]:
    geometry = ConvGeometry.of(input.shape, weight.shape, *settings[:-1])
    return passes.norm_forward(input, norm, weight, bias, geometry, settings[-1])


def _norm_input_grad(
    grad_output: Tensor, weight: Tensor, input: Tensor, norm: Tensor, *settings: Any
) -> tuple[Tensor, Tensor]:
    geometry = ConvGeometry.of(input.shape, weight.shape, *settings[:-1])
    return passes.norm_input_grad(grad_output, weight, input, norm, geometry, settings[-1])


def _norm_weight_grad(
    grad_output: Tensor,
    input: Tensor,
    norm: Tensor,
    weight_size: Sequence[int],
    with_bias: bool,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    geometry = ConvGeometry.of(input.shape, weight_size, *settings[:-1])
    return passes.norm_weight_grad(grad_output, input, norm, with_bias, geometry, settings[-1])


_KERNELS = {
    "forward": _forward,
    "input_grad": _input_grad,
    "weight_grad": _weight_grad,
    "norm_forward": _norm_forward,
    "norm_input_grad": _norm_input_grad,
    "norm_weight_grad": _norm_weight_grad,
}
for _name, _kernel in _KERNELS.items():
    library.impl(_name, _kernel, "CompositeExplicitAutograd")


@torch.library.register_fake("gconv::forward", lib=library)
def _fake_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    *settings: Any,
) -> Tensor:
    size = ConvGeometry.of(input.shape, weight.shape, *settings[:-1]).output_size
    return _empty(size, input, passes.layout(input, weight))


@torch.library.register_fake("gconv::input_grad", lib=library)
def _fake_input_grad(
    grad_output: Tensor, weight: Tensor, input_size: Sequence[int], *settings: Any
) -> Tensor:
    return _empty(input_size, grad_output, passes.layout(grad_output, weight))


@torch.library.register_fake("gconv::weight_grad", lib=library)
def _fake_weight_grad(
    grad_output: Tensor, input: Tensor, weight_size: Sequence[int], with_bias: bool, *settings: Any
) -> tuple[Tensor, Tensor]:
    weight = _empty(weight_size, grad_output, passes.layout(grad_output, input))
    return weight, grad_output.new_empty(weight_size[0] if with_bias else 0)


@torch.library.register_fake("gconv::norm_forward", lib=library)
def _fake_norm_forward(
    input: Tensor, norm: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor]:
    output = _fake_forward(input, weight, bias, None, None, *settings)
    return output, norm.new_empty(2, weight.shape[0])


@torch.library.register_fake("gconv::norm_input_grad", lib=library)
def _fake_norm_input_grad(
    grad_output: Tensor, weight: Tensor, input: Tensor, norm: Tensor, *settings: Any
) -> tuple[Tensor, Tensor]:
    grad = _fake_input_grad(grad_output, weight, input.shape, *settings)
    return grad, norm.new_empty(2, input.shape[1])


@torch.library.register_fake("gconv::norm_weight_grad", lib=library)
def _fake_norm_weight_grad(
    grad_output: Tensor, input: Tensor, norm: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return _fake_weight_grad(grad_output, input, *rest)


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """The operators as PyTorch's own convolutions, for ``ExportedProgram.run_decompositions``.

    A program exported on a GPU holds gconv's operators: what loads it must import gconv. After
    ``program.run_decompositions(gconv.decompositions())`` it runs anywhere, and goes to ONNX.
    """
    operators = {getattr(torch.ops.gconv, name).default: run for name, run in _KERNELS.items()}
    return {operator: partial(_on_aten, run) for operator, run in operators.items()}


def _on_aten(run: Callable[..., Any], *args: Any) -> Any:
    return run(*args[:-1], "aten")


@register_flop_formula(torch.ops.gconv.forward)
def _forward_flops(
    input_size: Sequence[int],
    weight_size: Sequence[int],
    bias_size: Sequence[int] | None,
    residual_size: Sequence[int] | None,
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


@register_flop_formula(torch.ops.gconv.norm_forward)
def _norm_forward_flops(
    input_size: Sequence[int],
    norm_size: Sequence[int],
    weight_size: Sequence[int],
    bias_size: Sequence[int] | None,
    *settings: Any,
    out_shape: Any = None,
) -> int:
    return ConvGeometry.of(input_size, weight_size, *settings[:-1]).flops


@register_flop_formula(torch.ops.gconv.norm_input_grad)
def _norm_input_grad_flops(
    grad_size: Sequence[int],
    weight_size: Sequence[int],
    input_size: Sequence[int],
    norm_size: Sequence[int],
    *settings: Any,
    out_shape: Any = None,
) -> int:
    return ConvGeometry.of(input_size, weight_size, *settings[:-1]).flops


@register_flop_formula(torch.ops.gconv.norm_weight_grad)
def _norm_weight_grad_flops(
    grad_size: Sequence[int],
    input_size: Sequence[int],
    norm_size: Sequence[int],
    weight_size: Sequence[int],
    with_bias: bool,
    *settings: Any,
    out_shape: Any = None,
) -> int:
    return ConvGeometry.of(input_size, weight_size, *settings[:-1]).flops


def _empty(size: Sequence[int], like: Tensor, layout: torch.memory_format) -> Tensor:
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)
