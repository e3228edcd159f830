"""``group_conv2d``: the arguments of ``F.conv2d``, checked once, here, the same for every backend."""

from __future__ import annotations

import operator
from collections.abc import Sequence, Sized
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from gconv import autograd, dispatch, ops
from gconv.activation import ACTIVATIONS, check_activation, finish
from gconv.geometry import ConvGeometry, Padding, same_padding


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
    """Grouped 2-d convolution on the fastest backend for it: ``F.conv2d``, and what often follows.

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
        residual: added to the result before the activation, as ``+`` would: of its shape, or broadcast.
        backend: "auto", "triton", "aten" or "reference"; None takes that of the enclosing
            ``with gconv.backend(...)``.

    Returns:
        (N, K, P, Q), or (K, P, Q) for one image, channels_last where input or weight is. The height P is
        (H + 2 padding - dilation (R - 1) - 1) // stride + 1, the width Q likewise.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an unknown activation, backend or padding name.
        RuntimeError: numbers, shapes, dtypes or devices that don't fit together, as ``F.conv2d`` raises; or
            ``backend="triton"`` where it cannot run.
    """
    tensors = (input, weight, bias, residual)
    watched = has_torch_function_variadic(*tensors)
    if torch.jit.is_tracing() or (watched and any(map(_has_its_own_convolution, tensors))):
        return _trace(input, weight, bias, (stride, padding, dilation, groups), activation, residual)
    if watched:
        return handle_torch_function(
            group_conv2d, tensors, input, weight, bias, stride, padding, dilation, groups,
            activation=activation, residual=residual, backend=backend,
        )  # fmt: skip
    dtype, geometry = prepare(input, weight, bias, stride, padding, dilation, groups, activation, residual)
    name = dispatch.requested(backend)
    if dispatch.aten_alone(name, input, dtype, geometry):
        zeros = "same" if padding == "same" else (geometry.padding.top, geometry.padding.left)
        # Under autocast F.conv2d casts, and remembers the weights that it cast.
        output = F.conv2d(input, weight, bias, geometry.stride, zeros, geometry.dilation, geometry.groups)
        return finish(output, residual, activation)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return _run_operators(input.to(dtype), weight, bias, geometry, activation, residual, name)


def _trace(
    input: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple, activation: str | None, residual: Any
) -> Tensor:
    """:func:`group_conv2d` by PyTorch's functions, for a tracer whose sizes are tensors, or another class."""
    output = F.conv2d(input, weight, bias, *settings)
    output = output if residual is None else output + residual
    return output if activation is None else ACTIVATIONS[activation](output)


def _run_operators(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    activation: str | None,
    residual: Tensor | None,
    backend: str,
) -> Tensor:
    """:func:`group_conv2d` by gconv's operators, on tensors of one type."""
    batch = input if input.ndim == 4 else input.unsqueeze(0)
    if residual is None and activation in autograd.DIFFERENTIABLE:
        output = autograd.group_conv(batch, weight, bias, geometry, activation, backend)
    elif _epilogue_fits(input, weight, bias, geometry, residual):
        output = ops.forward(batch, weight, bias, geometry, activation, residual, backend)
    else:
        output = autograd.group_conv(batch, weight, bias, geometry, None, backend)
        return finish(output if input.ndim == 4 else output.squeeze(0), residual, activation)
    return output if input.ndim == 4 else output.squeeze(0)


def _epilogue_fits(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry, residual: Tensor | None
) -> bool:
    """Whether a kernel may add the residual and apply the activation: nobody asks for gradients through them.

    Nor must the sum broadcast, or be of another type than the convolution's.
    """
    if residual is not None:
        alike = residual.shape == geometry.output_size and residual.dtype == input.dtype
        if not alike or residual.device != input.device or input.ndim == 3:
            return False
    return not autograd.gradient_possible(input, weight, bias, residual)


def _has_its_own_convolution(tensor: Any) -> bool:
    """Whether ``F.conv2d`` may mean something else to a tensor's class: it could not know our function."""
    if not isinstance(tensor, Tensor):
        return False
    own, plain = (getattr(cls.__torch_function__, "__func__", None) for cls in (type(tensor), Tensor))
    return own is not None and own is not plain


def prepare(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    activation: str | None,
    residual: Tensor | None = None,
) -> tuple[torch.dtype, ConvGeometry]:
    """Checks the arguments of :func:`group_conv2d`.

    Returns:
        The type that the convolution runs in, autocast's where it is on, and the sizes, N = 1 for one image.
    """
    _check_types(input, weight, bias, activation, residual)
    dtype = common_dtype(input, weight, bias, activation)
    key = (input.shape, weight.shape, None if bias is None else bias.shape, stride, padding, dilation, groups)
    plain = type(input) is Tensor and not torch.compiler.is_compiling() and all(map(_is_plain, key[3:]))
    try:
        geometry = _checked.get(key) if plain else None
    except TypeError:  # sizes are symbols, of a tracer beneath functorch's wrappers
        plain, geometry = False, None
    if geometry is None:
        geometry = _check_numbers(input, weight, bias, stride, padding, dilation, groups)
        if plain and len(_checked) < CHECKED:
            _checked[key] = geometry
    return dtype, geometry


# Sizes and settings that fit together, so that a layer's next call need not be checked again.
_checked: dict[tuple[Any, ...], ConvGeometry] = {}
CHECKED = 4096  # images of ever new sizes must not fill the memory


def _is_plain(setting: Any) -> bool:
    """Whether a setting equals no other that is refused: True equals 1, but is no int to us."""
    if type(setting) is tuple:
        return all([type(number) is int for number in setting])
    return type(setting) in (int, str)


def _check_numbers(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: Any
) -> ConvGeometry:
    """Check sizes and settings, one by one and together."""
    stride, dilation = pair("stride", stride, least=1), pair("dilation", dilation, least=1)
    zeros = _padding(padding, weight, stride, dilation)
    groups = integer("groups", groups)
    size = input.shape if input.ndim == 4 else (1, *input.shape)
    geometry = ConvGeometry.of(size, weight.shape, stride, zeros, dilation, groups)
    _check_sizes(input, weight, bias, geometry)
    return geometry


def _check_types(input: Any, weight: Any, bias: Any, activation: Any, residual: Any) -> None:
    """What does not depend on any number: types, dimensions, devices, names."""
    tensors = isinstance(input, Tensor) and isinstance(weight, Tensor)
    tensors = tensors and (bias is None or isinstance(bias, Tensor))
    if not (tensors and (residual is None or isinstance(residual, Tensor))):
        optional = {name: t for name, t in (("bias", bias), ("residual", residual)) if t is not None}
        named = {"input": input, "weight": weight, **optional}
        name, value = next((n, v) for n, v in named.items() if not isinstance(v, Tensor))
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    check_activation(activation)
    if input.ndim not in (3, 4):
        raise RuntimeError(f"input must be (N, C, H, W) or (C, H, W), got {_size(input)}")
    if weight.ndim != 4:
        raise RuntimeError(f"weight must be (out_channels, in_channels / groups, R, S), got {_size(weight)}")
    if weight.device != input.device or (bias is not None and bias.device != input.device):
        places = ", ".join(str(t.device) for t in (input, weight, bias) if t is not None)
        raise RuntimeError(f"input, weight and bias must be on one device, got {places}")


def common_dtype(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> torch.dtype:
    """The one type that the tensors have once autocast, where it is on, has cast them."""
    dtypes = [input.dtype, weight.dtype] if bias is None else [input.dtype, weight.dtype, bias.dtype]
    device = "cpu" if input.is_cpu else input.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        wanted = torch.get_autocast_dtype(device)
        dtypes = [wanted if d.is_floating_point and d != torch.float64 else d for d in dtypes]
    dtype = dtypes[0]
    if dtypes.count(dtype) != len(dtypes):
        types = ", ".join(map(str, dtypes))
        raise RuntimeError(f"input, weight and bias must have one dtype, got {types}")
    if dtype == torch.bool or input.layout != torch.strided:
        raise RuntimeError(f"input must be dense numbers, got {dtype} in layout {input.layout}")
    if activation is not None and dtype.is_complex:
        raise RuntimeError(f"activation={activation!r} is not defined on complex numbers, got {dtype}")
    return dtype


_PAIR = "an int or a pair of ints"


def pair(
    name: str, value: Any, least: int, sequences: type | tuple[type, ...] = (tuple, list)
) -> tuple[int, int]:
    """Check one number, or two, and return them as (vertical, horizontal).

    Args:
        name: the argument's name, for messages.
        value: its value.
        least: the smallest number allowed.
        sequences: types that hold numbers. By default those that ``F.conv2d`` takes.

    Raises:
        TypeError: ``value`` is neither an integer nor a sequence of integers.
        RuntimeError: there are more than two numbers, or none, or one is below ``least``.
    """
    first = last = value
    if isinstance(value, sequences) and not isinstance(value, str):
        first, last, value = _ends(name, value)
    vertical = integer(name, first, _PAIR, value)
    horizontal = vertical if last is first else integer(name, last, _PAIR, value)
    if vertical < least or horizontal < least:
        raise RuntimeError(f"{name} must be at least {least}, got {value!r}")
    return vertical, horizontal


def _ends(name: str, value: Any) -> tuple[Any, Any, Any]:
    """The first of one or two numbers, the last, and the argument's value as a message should show it."""
    if getattr(value, "ndim", 1) == 0:
        return value, value, value
    numbers = value if isinstance(value, (tuple, list)) else tuple(value)
    shown = value if isinstance(value, Sized) else numbers  # an iterator is empty by now
    if len(numbers) not in (1, 2):
        raise RuntimeError(f"{name} must be one number or two, got {len(numbers)}: {shown!r}")
    return numbers[0], numbers[-1], shown


def integer(name: str, number: Any, rule: str = "an int", value: Any = None) -> int:
    """Check that ``number`` is an integer, NumPy's and one in a tensor included, but no float and no bool.

    Args:
        name: the argument's name, for messages.
        number: what to check.
        rule: what the argument must be.
        value: the argument's value, if ``number`` is only a part of it.

    Raises:
        TypeError: it is none.
    """
    if type(number) is int:
        return number
    if isinstance(number, torch.SymInt):
        return cast(int, number)
    try:
        if not isinstance(number, bool):
            return operator.index(number)
    except TypeError:
        pass
    value = number if value is None else value
    raise TypeError(f"{name} must be {rule}, got {value!r} of type {type(value).__name__}")


def _padding(
    padding: int | Sequence[int] | str, weight: Tensor, stride: tuple[int, int], dilation: tuple[int, int]
) -> Padding:
    """The zeros on each side that ``padding`` stands for."""
    if not isinstance(padding, str):
        vertical, horizontal = pair("padding", padding, least=0)
        return Padding(vertical, vertical, horizontal, horizontal)
    if padding == "valid":
        return Padding(0, 0, 0, 0)
    if padding != "same":
        raise ValueError(f"padding must be numbers, 'same' or 'valid', got {padding!r}")
    if stride != (1, 1):
        raise RuntimeError(f"padding='same' needs stride 1, got stride={stride}")
    _, _, r, s = weight.shape
    return Padding(*same_padding(r, dilation[0]), *same_padding(s, dilation[1]))


def _check_sizes(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> None:
    """That the sizes fit together and leave at least one output pixel."""
    _, c, h, w = geometry.input_size
    k, group_in, r, s = geometry.weight_size
    groups = geometry.groups
    if groups < 1:
        raise RuntimeError(f"groups must be at least 1, got {groups}")
    if c % groups:
        raise RuntimeError(
            f"in_channels={c} is not divisible by groups={groups}; "
            f"weight {_size(weight)} takes {group_in * groups} channels"
        )
    if k % groups:
        raise RuntimeError(f"out_channels={k} is not divisible by groups={groups}")
    if min(k, group_in, r, s, h, w) < 1:
        raise RuntimeError(
            f"only the batch may be empty, got input {_size(input)} and weight {_size(weight)}"
        )
    if group_in * groups != c:
        raise RuntimeError(
            f"weight {_size(weight)} takes {group_in} input channels a group, {group_in * groups} with "
            f"groups={groups}, but input {_size(input)} has {c}"
        )
    if bias is not None and (bias.ndim != 1 or bias.shape[0] != k):
        raise RuntimeError(
            f"bias must have one number for each of the {k} output channels, got {_size(bias)}"
        )
    _, _, p, q = geometry.output_size
    if p < 1 or q < 1:
        raise RuntimeError(
            f"the kernel is larger than the image: {r} x {s} with dilation {geometry.dilation} on {h} x {w} "
            f"with padding {tuple(geometry.padding)} (top, bottom, left, right)"
        )


def _size(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
