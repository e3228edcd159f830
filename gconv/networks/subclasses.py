"""Convert subclasses of PyTorch's convolutions: create the class that each becomes.

A subclass that leaves the convolution to ``nn.Conv2d`` keeps its behavior, because ``GroupConv2d`` replaces
``nn.Conv2d`` as its base. That doesn't work for a subclass that calls ``F.conv2d`` itself. The ones in timm
are recognized by name and reimplemented here, without importing timm. The same applies to the other kinds of
convolution.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import new_class
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gconv.functional import group_conv2d
from gconv.kinds import Kind, kind_of
from gconv.module import LAYER_OF, LAYERS, GroupConvolution
from gconv.torch_internals import own_parameters

# The classes created so far, by original class.
_GROUPED: dict[type[nn.Module], type[GroupConvolution]] = {layer._gconv_original: layer for layer in LAYERS}


def why_not(original: type[nn.Module]) -> str | None:
    """Return why a module of class ``original`` can't be converted, or None if it can."""
    name, kind = original.__name__, kind_of(original)
    assert kind is not None
    if original.__module__.startswith("torch.ao."):
        return f"torch.ao.quantization needs its class {name}"
    plain = f"torch.nn.modules.conv.{kind.layer.__name__}._conv_forward"
    if not kind.transposed and name_of_method(original, "_conv_forward") != plain:
        return f"class {name} has a custom _conv_forward"
    if not _leaves_the_convolution(original, kind):
        instead = "super().forward(input)" if kind.transposed else "self._conv_forward(input, weight, bias)"
        return f"class {name} computes the convolution itself: let its forward call {instead}"
    if original.__reduce_ex__ is not object.__reduce_ex__ or original.__reduce__ is not object.__reduce__:
        return f"class {name} has custom pickling"
    if hasattr(original, "__getnewargs__") or hasattr(original, "__getnewargs_ex__"):
        return f"class {name} has custom pickling"
    try:
        grouped(original)
    except Exception as error:  # whatever an __init_subclass__ raises
        return f"class {name} can't be subclassed: {error}"
    return None


def _leaves_the_convolution(original: type[nn.Module], kind: Kind) -> bool:
    """Whether ``forward`` leaves the convolution to PyTorch's class, or is reimplemented here."""
    if name_of_method(original, "forward") in _EQUATIONS:
        return True
    for owner in (cls for cls in original.__mro__ if "forward" in vars(cls)):  # in the order of super()
        if owner is kind.layer:
            return True
        code = getattr(inspect.unwrap(vars(owner)["forward"]), "__code__", None)
        called = set(code.co_names) if code else set()
        if "_conv_forward" in called and not kind.transposed:
            return True
        if not {"super", "forward"} <= called:
            return False
    return False


def grouped(original: type[nn.Module]) -> type[GroupConvolution]:
    """Return the class that a module of class ``original`` is converted to, created on first use.

    Args:
        original: ``nn.Conv2d``, another convolution, or a subclass that ``why_not`` accepts.

    Returns:
        A subclass of ``original`` and of gconv's layer of that kind.

    Raises:
        TypeError: ``original`` can't be subclassed.
    """
    if original not in _GROUPED:
        _GROUPED[original] = _make_grouped(original)
    return _GROUPED[original]


def _make_grouped(original: type[nn.Module]) -> type[GroupConvolution]:
    kind = kind_of(original)
    assert kind is not None
    namespace: dict[str, Any] = {
        "__module__": __name__,
        "__init__": original.__init__,
        "__reduce_ex__": _reduce,
        "_gconv_original": original,
    }
    if equation := _EQUATIONS.get(name_of_method(original, "forward")):
        namespace["forward"] = equation
    # gconv's transposed layers define forward, which must not hide that of the subclass. The others define
    # only _conv_forward, which the subclass doesn't override.
    bases = (original, LAYER_OF[kind]) if kind.transposed else (LAYER_OF[kind], original)
    return new_class(f"Group{original.__name__}", bases, exec_body=lambda body: body.update(namespace))


def is_a_convolution(layer: nn.Module) -> bool:
    """Whether ``layer`` computes exactly conv(input, weight) + bias, with its own parameters."""
    own = {"weight", "bias"} <= own_parameters(layer).keys()
    return own and _convolves_plainly(layer) and _activation(layer) is None


def takes_activation(layer: nn.Module) -> bool:
    """Whether ``layer`` has no activation yet and would apply one to its final output."""
    own = _convolves_plainly(layer) or type(layer).forward in (_scaled_std_conv2d, _scaled_std_conv2d_same)
    return isinstance(layer, GroupConvolution) and own and _activation(layer) is None


def _convolves_plainly(layer: nn.Module) -> bool:
    cls: Any = type(layer)
    kind = kind_of(layer)
    assert kind is not None
    ours: Any = LAYER_OF[kind]
    plain: Any = kind.layer
    known = (plain.forward, ours.forward, _conv2d_same)
    forward = cls.forward in known or name_of_method(cls, "forward") == _CONV2D_SAME
    if kind.transposed:
        return forward
    return forward and cls._conv_forward in (plain._conv_forward, ours._conv_forward)


def _activation(layer: nn.Module) -> str | None:
    return getattr(layer, "activation", None)


def name_of_method(cls: type, method: str) -> str:
    """Return the module and qualified name of a method's function, which differ if it was patched."""
    function = getattr(cls, method)
    return f"{getattr(function, '__module__', None)}.{getattr(function, '__qualname__', None)}"


def _reduce(module: Any, protocol: int) -> tuple[Any, ...]:
    """Pickle a module by its original class, because the class created here can't be imported."""
    return _restore, (type(module)._gconv_original,), module.__getstate__()


def _restore(original: type[nn.Module]) -> GroupConvolution:
    cls = grouped(original)
    return cls.__new__(cls)


def _conv2d_same(layer: Any, input: Tensor) -> Tensor:
    return _convolve_same(layer, input, layer.weight)


def _scaled_std_conv2d(layer: Any, input: Tensor) -> Tensor:
    return layer._conv_forward(input, _standardised(layer), layer.bias)


def _scaled_std_conv2d_same(layer: Any, input: Tensor) -> Tensor:
    if not layer.same_pad:
        return _scaled_std_conv2d(layer, input)
    return _convolve_same(layer, input, _standardised(layer))


def _convolve_same(layer: Any, input: Tensor, weight: Tensor) -> Tensor:
    """Convolve with TensorFlow's "SAME" padding: the output has ceil(H / stride) rows.

    At stride 1 this is PyTorch's "same" padding. If the number of zeros is odd, the extra zero goes after the
    image, and the input has to be copied to pad it.
    """
    alike = all(d * (k - 1) % 2 == 0 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    padding: Any = "same"
    if layer.stride != (1, 1) or not alike:
        input, padding = F.pad(input, (*_zeros(layer, input, -1), *_zeros(layer, input, -2))), 0
    settings = (layer.stride, padding, layer.dilation, layer.groups)
    return group_conv2d(input, weight, layer.bias, *settings, activation=layer.activation)


def _zeros(layer: Any, input: Tensor, axis: int) -> tuple[int, int]:
    """Return the number of zeros before and after the image along ``axis``."""
    length, stride = input.shape[axis], layer.stride[axis]
    reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
    total: Any = (-(-length // stride) - 1) * stride + reach - length  # a tensor under torch.jit.trace
    total = total.clamp(min=0) if isinstance(total, Tensor) else max(total, 0)
    return total // 2, total - total // 2


def _standardised(layer: Any) -> Tensor:
    """Return the weight with each filter at mean 0 and variance (gain * scale)^2 (arXiv 2101.08692).

    Uses a batch norm with the filters as channels, as timm does, so the result is bit-identical.
    """
    filters = layer.weight.reshape(1, layer.out_channels, -1)
    gain = (layer.gain * layer.scale).view(-1)
    weight = F.batch_norm(filters, None, None, gain, training=True, momentum=0.0, eps=layer.eps)
    return weight.reshape_as(layer.weight)


_CONV2D_SAME = "timm.layers.conv2d_same.Conv2dSame.forward"
_EQUATIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    _CONV2D_SAME: _conv2d_same,
    "timm.layers.std_conv.ScaledStdConv2d.forward": _scaled_std_conv2d,
    "timm.layers.std_conv.ScaledStdConv2dSame.forward": _scaled_std_conv2d_same,
}
