"""How subclasses of PyTorch's convolutions are swapped: the class that each becomes.

A subclass that leaves the convolution to ``nn.Conv2d`` keeps its own behaviour: ``GroupConv2d`` takes the
place of ``nn.Conv2d`` below it. That does not work for one that calls ``F.conv2d`` itself. timm's are known
here by name and written as equations; timm is not imported. The same holds for the other convolutions.
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

# The classes made so far.
_GROUPED: dict[type[nn.Module], type[GroupConvolution]] = {layer._gconv_original: layer for layer in LAYERS}


def why_not(original: type[nn.Module]) -> str | None:
    """Return why a module of class ``original`` cannot be swapped, None if it can."""
    name, kind = original.__name__, kind_of(original)
    assert kind is not None
    if original.__module__.startswith("torch.ao."):
        return f"its class {name} is one that torch.ao.quantization looks for"
    plain = f"torch.nn.modules.conv.{kind.layer.__name__}._conv_forward"
    if not kind.transposed and name_of_method(original, "_conv_forward") != plain:
        return f"its class {name} has a _conv_forward of its own"
    if not _leaves_the_convolution(original, kind):
        instead = "super().forward(input)" if kind.transposed else "self._conv_forward(input, weight, bias)"
        return f"its class {name} convolves by itself: it could call {instead}"
    if original.__reduce_ex__ is not object.__reduce_ex__ or original.__reduce__ is not object.__reduce__:
        return f"its class {name} is pickled in a way of its own"
    if hasattr(original, "__getnewargs__") or hasattr(original, "__getnewargs_ex__"):
        return f"its class {name} is pickled in a way of its own"
    try:
        grouped(original)
    except TypeError as error:
        return f"its class {name} cannot be subclassed: {error}"
    return None


def _leaves_the_convolution(original: type[nn.Module], kind: Kind) -> bool:
    """Whether ``forward`` leaves the convolution to PyTorch's own class, or is known as an equation."""
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
    """Return the class that a module of class ``original`` gets, always the same one.

    Args:
        original: ``nn.Conv2d``, another convolution, or a subclass that :func:`why_not` accepts.

    Returns:
        A subclass of ``GroupConv2d``, or gconv's layer of that kind, and of ``original``.

    Raises:
        TypeError: ``original`` cannot be subclassed.
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
    # A transposed layer of gconv's has a forward, which must not hide that of the subclass. The others have
    # only a _conv_forward, which the subclass has left alone.
    bases = (original, LAYER_OF[kind]) if kind.transposed else (LAYER_OF[kind], original)
    return new_class(f"Group{original.__name__}", bases, exec_body=lambda body: body.update(namespace))


def is_a_convolution(layer: nn.Module) -> bool:
    """Whether ``layer`` computes conv(input, weight) + bias and nothing else, with its own parameters."""
    own = {"weight", "bias"} <= own_parameters(layer).keys()
    return own and _convolves_plainly(layer) and _activation(layer) is None


def takes_activation(layer: nn.Module) -> bool:
    """Whether ``layer`` has no activation yet, and would apply one to its output last."""
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
    """Return the module and name of the function behind a method; a patched method has another one."""
    function = getattr(cls, method)
    return f"{getattr(function, '__module__', None)}.{getattr(function, '__qualname__', None)}"


def _reduce(module: Any, protocol: int) -> tuple[Any, ...]:
    """Pickle a module by its original class: no import finds the one made here."""
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

    At stride 1 that is PyTorch's "same". An odd zero goes after the image; without one, the input need not be
    padded in a copy.
    """
    alike = all(d * (k - 1) % 2 == 0 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    padding: Any = "same"
    if layer.stride != (1, 1) or not alike:
        input, padding = F.pad(input, (*_zeros(layer, input, -1), *_zeros(layer, input, -2))), 0
    settings = (layer.stride, padding, layer.dilation, layer.groups)
    return group_conv2d(input, weight, layer.bias, *settings, activation=layer.activation)


def _zeros(layer: Any, input: Tensor, axis: int) -> tuple[int, int]:
    """Return how many zeros go before and after the image along ``axis``."""
    length, stride = input.shape[axis], layer.stride[axis]
    reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
    total: Any = (-(-length // stride) - 1) * stride + reach - length  # a tensor in torch.jit.trace
    total = total.clamp(min=0) if isinstance(total, Tensor) else max(total, 0)
    return total // 2, total - total // 2


def _standardised(layer: Any) -> Tensor:
    """Return the weight with each filter at mean 0 and variance (gain * scale)^2 (arXiv 2101.08692).

    Uses a batch norm whose channels are the filters, as timm does, so the result is the same to the bit.
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
