"""Check the arguments of gconv's functions, once per call and in the same way for every backend."""

from __future__ import annotations

import operator
from collections.abc import Sequence, Sized
from typing import Any, cast

import torch
from torch import Tensor

from gconv.activation import check_activation
from gconv.geometry import ConvGeometry, Padding, output_length, same_padding
from gconv.kinds import Call, Depth, Kind

# Calls that passed the checks, so that a layer's next call skips them.
_checked: dict[tuple[Any, ...], Call] = {}
CHECKED = 4096  # limits the memory that inputs of ever-changing sizes take


def prepare(
    kind: Kind,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    settings: tuple[Any, ...],
    activation: str | None = None,
    residual: Tensor | None = None,
) -> tuple[torch.dtype, Call]:
    """Check the arguments of a convolution.

    Args:
        kind: which convolution.
        input, weight, bias, activation, residual: as in ``gconv.group_conv2d``.
        settings: the arguments of ``kind.pytorch`` after the bias.

    Returns:
        The dtype that the convolution runs in (that of autocast, if it is on), and the call.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the activation or the padding mode is unknown.
        RuntimeError: numbers, shapes, dtypes or devices don't fit together.
    """
    _check_types(kind, input, weight, bias, activation, residual)
    dtype = common_dtype(input, weight, bias, activation)
    key = (kind, input.shape, weight.shape, None if bias is None else bias.shape, *settings)
    plain = type(input) is Tensor and not torch.compiler.is_compiling() and all(map(_is_plain, settings))
    try:
        call = _checked.get(key) if plain else None
    except TypeError:  # a tracer under functorch's wrappers has symbolic sizes, which can't be hashed
        plain, call = False, None
    if call is None:
        call = _check_numbers(kind, input, weight, bias, settings)
        if plain and len(_checked) < CHECKED:
            _checked[key] = call
    if residual is not None and residual.shape != call.output_size:
        _check_broadcast(residual, call)
    return dtype, call


def _check_broadcast(residual: Tensor, call: Call) -> None:
    """Raise an error unless ``output + residual`` broadcasts."""
    try:
        torch.broadcast_shapes(residual.shape, call.output_size)
    except RuntimeError:
        raise RuntimeError(
            f"residual must broadcast with the output {tuple(call.output_size)}, got {_size(residual)}"
        ) from None


def _is_plain(setting: Any) -> bool:
    """Whether no invalid setting compares equal to this one: True == 1, but isn't accepted as an int."""
    if type(setting) is tuple:
        return all([type(number) is int for number in setting])
    return type(setting) in (int, str)


def _check_types(kind: Kind, input: Any, weight: Any, bias: Any, activation: Any, residual: Any) -> None:
    """Check what doesn't depend on numbers: types, dimensions, devices, names."""
    tensors = isinstance(input, Tensor) and isinstance(weight, Tensor)
    tensors = tensors and (bias is None or isinstance(bias, Tensor))
    if not (tensors and (residual is None or isinstance(residual, Tensor))):
        optional = {name: t for name, t in (("bias", bias), ("residual", residual)) if t is not None}
        named = {"input": input, "weight": weight, **optional}
        name, value = next((n, v) for n, v in named.items() if not isinstance(v, Tensor))
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    check_activation(activation)
    if input.ndim not in (kind.dims + 1, kind.dims + 2):
        raise RuntimeError(f"input must have shape (N, {kind.sizes}) or ({kind.sizes}), got {_size(input)}")
    if weight.ndim != kind.dims + 2:
        first = ("out_channels", "in_channels / groups")
        if kind.transposed:
            first = ("in_channels", "out_channels / groups")
        raise RuntimeError(f"weight must have shape ({', '.join(first)}, {kind.taps}), got {_size(weight)}")
    if weight.device != input.device or (bias is not None and bias.device != input.device):
        places = ", ".join(str(t.device) for t in (input, weight, bias) if t is not None)
        raise RuntimeError(f"input, weight and bias must be on the same device, got {places}")


def common_dtype(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> torch.dtype:
    """Return the common dtype of the tensors, after casting them if autocast is on."""
    dtypes = [input.dtype, weight.dtype] if bias is None else [input.dtype, weight.dtype, bias.dtype]
    device = "cpu" if input.is_cpu else input.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        wanted = torch.get_autocast_dtype(device)
        dtypes = [wanted if d.is_floating_point and d != torch.float64 else d for d in dtypes]
    dtype = dtypes[0]
    if dtypes.count(dtype) != len(dtypes):
        types = ", ".join(map(str, dtypes))
        raise RuntimeError(f"input, weight and bias must have the same dtype, got {types}")
    if dtype == torch.bool or input.layout != torch.strided:
        raise RuntimeError(f"input must be a dense tensor of numbers, got {dtype} in layout {input.layout}")
    if activation is not None and dtype.is_complex:
        raise RuntimeError(f"activation={activation!r} is not defined for complex numbers, got {dtype}")
    return dtype


def _check_numbers(
    kind: Kind, input: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple[Any, ...]
) -> Call:
    """Check sizes and settings, one by one and together."""
    if kind.transposed:
        stride, padding, output_padding, groups, dilation = settings
    else:
        (stride, padding, dilation, groups), output_padding = settings, 0
    stride = numbers("stride", stride, 1, kind.dims)
    dilation = numbers("dilation", dilation, 1, kind.dims)
    groups = integer("groups", groups)
    zeros = _padding(kind, padding, weight.shape[2:], stride, dilation)
    _check_channels(kind, input, weight, bias, groups)
    # Keep "same" as a word: PyTorch can't pad two sides by different numbers.
    padded = "same" if padding == "same" else tuple([before for before, _ in zeros])
    if kind.transposed:
        extra = numbers("output_padding", output_padding, 0, kind.dims)
        clean = (stride, padded, extra, groups, dilation)
        return _transposed_call(kind, input, weight, clean, zeros, extra)
    return _call(kind, input, weight, (stride, padded, dilation, groups), zeros)


Zeros = Sequence[tuple[int, int]]  # zeros before and after the input, along each dimension


def _call(kind: Kind, input: Tensor, weight: Tensor, settings: tuple[Any, ...], zeros: Zeros) -> Call:
    """Return the call of a convolution. ``settings``: stride, padding, dilation and groups, checked."""
    stride, _, dilation, groups = settings
    dims = kind.dims
    lengths, kernel = input.shape[-dims:], weight.shape[2:]
    outputs = [
        output_length(length, k, step, sum(around), d)
        for length, k, step, around, d in zip(lengths, kernel, stride, zeros, dilation, strict=True)
    ]
    if min(outputs) < 1:
        raise RuntimeError(
            f"the kernel must not be larger than the padded input, got kernel {_product(kernel)} with "
            f"dilation {_shown(dilation)} and input {_product(lengths)} with padding {_shown(zeros)}"
        )
    k, batch = weight.shape[0], input.shape[: input.ndim - dims - 1]
    size: tuple[int, ...] = (*(batch or (1,)), input.shape[-dims - 1], *lengths)
    kernel_size: tuple[int, ...] = weight.shape
    depth = None
    if dims == 3:
        depth = Depth(outputs[0], kernel[0], stride[0], dilation[0], *zeros[0])
        (n, c, _, h, w), (_, group_in, taps, r, s) = size, kernel_size
        size, kernel_size = (n * depth.slices, c * taps, h, w), (k, group_in * taps, r, s)
    geometry = _geometry(size, kernel_size, stride, zeros, dilation, groups)
    sizes = (tuple(input.shape), tuple(weight.shape), (*batch, k, *outputs))
    return Call(kind, settings, *sizes, geometry, depth, adds_gradients=dims == 3 and kernel[0] > 1)


def _transposed_call(
    kind: Kind, input: Tensor, weight: Tensor, settings: tuple[Any, ...], zeros: Zeros, extra: tuple[int, ...]
) -> Call:
    """Return the call of a transposed convolution. ``settings``: in ``kind.pytorch``'s order, checked."""
    stride, _, _, groups, dilation = settings
    dims = kind.dims
    lengths, kernel = input.shape[-dims:], weight.shape[2:]
    for more, step, d in zip(extra, stride, dilation, strict=True):
        if more >= max(step, d):
            raise RuntimeError(
                f"output_padding must be smaller than stride or dilation, got {_shown(extra)} "
                f"with stride {_shown(stride)} and dilation {_shown(dilation)}"
            )
    outputs = [
        (length - 1) * step - sum(around) + d * (k - 1) + 1 + more
        for length, step, around, d, k, more in zip(
            lengths, stride, zeros, dilation, kernel, extra, strict=True
        )
    ]
    if min(outputs) < 1:
        raise RuntimeError(
            f"the output would be empty: {_product(outputs)} from input {_product(lengths)} with padding "
            f"{_shown([before for before, _ in zeros])} and output_padding {_shown(extra)}"
        )
    # The convolution whose input gradient this is would compute another row of outputs from output padding of
    # a stride or more. So pad its input with fewer zeros or, where there are none, make the input end
    # earlier.
    less = [max(0, more - (step - 1)) for more, step in zip(extra, stride, strict=True)]
    beyond = [max(0, fewer - before) for fewer, (before, _) in zip(less, zeros, strict=True)]
    zeros = [(before, max(0, before - fewer)) for fewer, (before, _) in zip(less, zeros, strict=True)]
    reached = [length - rest for length, rest in zip(outputs, beyond, strict=True)]
    if min(reached) < 1:
        raise RuntimeError(
            f"no input reaches the {_product(outputs)} output, which would be the bias alone: reduce padding "
            f"or output_padding, or call F.{kind}"
        )
    k, batch = weight.shape[1] * groups, input.shape[: input.ndim - dims - 1]
    geometry = _geometry((*(batch or (1,)), k, *reached), weight.shape, stride, zeros, dilation, groups)
    rest = [0, *beyond][-2:]
    sizes = (tuple(input.shape), tuple(weight.shape), (*batch, k, *outputs))
    return Call(kind, settings, *sizes, geometry, beyond=(rest[0], rest[1]), adds_gradients=any(beyond))


def _geometry(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    zeros: Zeros,
    dilation: Sequence[int],
    groups: int,
) -> ConvGeometry:
    """Return the 2-d geometry of the last two dimensions; a single dimension becomes one row."""
    if len(size) == 3:
        size, kernel_size = (*size[:2], 1, size[2]), (*kernel_size[:2], 1, kernel_size[2])
        stride, zeros, dilation = (1, *stride), ((0, 0), *zeros), (1, *dilation)
    padding = Padding(*zeros[-2], *zeros[-1])
    return ConvGeometry.of(size, kernel_size, stride[-2:], padding, dilation[-2:], groups)


def _padding(
    kind: Kind, padding: Any, kernel: Sequence[int], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> Zeros:
    """Return the zeros to add on each side, from the ``padding`` argument."""
    if not isinstance(padding, str) or kind.transposed:
        return [(zeros, zeros) for zeros in numbers("padding", padding, 0, kind.dims)]
    if padding == "valid":
        return [(0, 0)] * kind.dims
    if padding != "same":
        raise ValueError(f"padding must be integers, 'same' or 'valid', got {padding!r}")
    if max(stride) > 1:
        raise RuntimeError(f"padding='same' requires stride 1, got stride={_shown(stride)}")
    return [same_padding(k, d) for k, d in zip(kernel, dilation, strict=True)]


def _check_channels(kind: Kind, input: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    """Check that the channels of input, weight and bias fit together, and that no size but the batch is 0."""
    c, first, per_group = input.shape[-kind.dims - 1], *weight.shape[:2]
    if groups < 1:
        raise RuntimeError(f"groups must be at least 1, got {groups}")
    taken, k = (first, per_group * groups) if kind.transposed else (per_group * groups, first)
    if c % groups:
        raise RuntimeError(
            f"in_channels={c} is not divisible by groups={groups}; "
            f"weight {_size(weight)} expects {taken} input channels"
        )
    if k % groups:
        raise RuntimeError(f"out_channels={k} is not divisible by groups={groups}")
    if min(*weight.shape, *input.shape[-kind.dims - 1 :]) < 1:
        raise RuntimeError(
            f"only the batch size may be 0, got input {_size(input)} and weight {_size(weight)}"
        )
    if taken != c:
        in_groups = "" if kind.transposed else f" ({per_group} per group)"
        raise RuntimeError(
            f"weight {_size(weight)} expects {taken} input channels{in_groups} with groups={groups}, "
            f"but input {_size(input)} has {c}"
        )
    if bias is not None and (bias.ndim != 1 or bias.shape[0] != k):
        raise RuntimeError(f"bias must have shape ({k},), one number per output channel, got {_size(bias)}")


def numbers(
    name: str, value: Any, least: int, dims: int, sequences: type | tuple[type, ...] = (tuple, list)
) -> tuple[int, ...]:
    """Check an argument that is one number or one per dimension, and return one per dimension.

    Args:
        name: name of the argument, for error messages.
        value: value of the argument.
        least: the smallest number allowed.
        dims: number of spatial dimensions.
        sequences: types accepted as sequences. Defaults to those that PyTorch's functions accept.

    Raises:
        TypeError: ``value`` is neither an integer nor a sequence of integers.
        RuntimeError: there are too many numbers or none, or one is below ``least``.
    """
    rule = {1: "an int or a tuple of one int", 2: "an int or a pair of ints", 3: "an int or three ints"}[dims]
    given: Sequence[Any] = (value,)
    if isinstance(value, sequences) and not isinstance(value, str):
        given, value = _items(name, value, dims)
    found = tuple([integer(name, number, rule, value) for number in given])
    if min(found) < least:
        raise RuntimeError(f"{name} must be at least {least}, got {value!r}")
    return found * dims if len(found) == 1 else found


def _items(name: str, value: Any, dims: int) -> tuple[Sequence[Any], Any]:
    """Return the numbers of an argument, and its value for error messages."""
    if getattr(value, "ndim", 1) == 0:
        return (value,), value
    items = value if isinstance(value, (tuple, list)) else tuple(value)
    shown = value if isinstance(value, Sized) else items  # an iterator is exhausted by now
    if len(items) not in (1, dims):
        many = {1: "one number", 2: "one or two numbers", 3: "one or three numbers"}[dims]
        raise RuntimeError(f"{name} must be {many}, got {len(items)}: {shown!r}")
    return items, shown


def integer(name: str, number: Any, rule: str = "an int", value: Any = None) -> int:
    """Check that ``number`` is an integer (of Python, NumPy or a tensor; not a bool) and return it.

    Args:
        name: name of the argument, for error messages.
        number: the value to check.
        rule: what the argument must be, for error messages. Defaults to "an int".
        value: value of the argument, if ``number`` is only a part of it. Defaults to ``number``.

    Raises:
        TypeError: ``number`` is not an integer.
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


def _size(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _product(lengths: Sequence[int]) -> str:
    """Return sizes as text, such as "5 x 7"."""
    return " x ".join(map(str, lengths))


def _shown(values: Sequence[Any]) -> str:
    """Return one value as itself, and several as a tuple."""
    return str(values[0]) if len(values) == 1 else str(tuple(values))
