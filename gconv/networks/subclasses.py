"""Other people's subclasses of ``nn.Conv2d``: the class that each becomes when gconv runs its convolution.

A subclass that leaves the convolution to ``nn.Conv2d`` keeps all that it does: ``GroupConv2d`` steps in
beneath it. One that calls ``F.conv2d`` cannot be reached so. Of those, timm's are known here by name and
written as equations; nothing of timm is imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from types import new_class
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gconv.functional import group_conv2d
from gconv.module import GroupConv2d


def why_not(original: type[nn.Conv2d]) -> str | None:
    """Why a module of class ``original`` cannot be swapped, None if it can."""
    name = original.__name__
    if original.__module__.startswith("torch.ao."):
        return f"its class {name} is one that torch.ao.quantization looks for"
    if name_of_method(original, "_conv_forward") != "torch.nn.modules.conv.Conv2d._conv_forward":
        return f"its class {name} has a _conv_forward of its own"
    if not _leaves_the_convolution(original):
        return f"its class {name} convolves by itself: it could call self._conv_forward(input, weight, bias)"
    if original.__reduce_ex__ is not object.__reduce_ex__ or original.__reduce__ is not object.__reduce__:
        return f"its class {name} is pickled in a way of its own"
    if hasattr(original, "__getnewargs__") or hasattr(original, "__getnewargs_ex__"):
        return f"its class {name} is pickled in a way of its own"
    try:
        grouped(original)
    except TypeError as error:
        return f"its class {name} cannot be subclassed: {error}"
    return None


def _leaves_the_convolution(original: type[nn.Conv2d]) -> bool:
    """Whether ``forward`` leaves the convolution to ``nn.Conv2d``, or is known as an equation."""
    if name_of_method(original, "forward") in _EQUATIONS:
        return True
    for owner in (cls for cls in original.__mro__ if "forward" in vars(cls)):  # in super()'s order
        if owner is nn.Conv2d:
            return True
        code = getattr(inspect.unwrap(owner.forward), "__code__", None)
        called = set(code.co_names) if code else set()
        if "_conv_forward" in called:
            return True
        if not {"super", "forward"} <= called:
            return False
    return False


@cache
def grouped(original: type[nn.Conv2d]) -> type[GroupConv2d]:
    """The class that a module of class ``original`` gets: a subclass of that and of ``GroupConv2d``."""
    if original is nn.Conv2d:
        return GroupConv2d
    namespace: dict[str, Any] = {
        "__module__": __name__,
        "__init__": original.__init__,
        "__reduce_ex__": _reduce,
        "_gconv_original": original,
    }
    if equation := _EQUATIONS.get(name_of_method(original, "forward")):
        namespace["forward"] = equation
    return new_class(
        f"Group{original.__name__}", (GroupConv2d, original), exec_body=lambda n: n.update(namespace)
    )


def is_a_convolution(layer: nn.Conv2d) -> bool:
    """Whether ``layer`` puts out conv(input, weight) + bias and no more, with its parameters as they are."""
    own = {"weight", "bias"} <= layer._parameters.keys()
    return own and _convolves_plainly(layer) and _activation(layer) is None


def takes_activation(layer: nn.Conv2d) -> bool:
    """Whether its ``activation`` is the last that is done to its output, and still free."""
    own = _convolves_plainly(layer) or type(layer).forward in (_scaled_std_conv2d, _scaled_std_conv2d_same)
    return isinstance(layer, GroupConv2d) and own and _activation(layer) is None


def _convolves_plainly(layer: nn.Conv2d) -> bool:
    cls = type(layer)
    known = (nn.Conv2d.forward, _conv2d_same)
    forward = (
        cls.forward in known or name_of_method(cls, "forward") == "timm.layers.conv2d_same.Conv2dSame.forward"
    )
    return forward and cls._conv_forward in (nn.Conv2d._conv_forward, GroupConv2d._conv_forward)


def _activation(layer: nn.Conv2d) -> str | None:
    return getattr(layer, "activation", None)


def name_of_method(cls: type, method: str) -> str:
    """Of the function that a method is, wherever it was defined: one that was patched in has another."""
    function = getattr(cls, method)
    return f"{getattr(function, '__module__', None)}.{getattr(function, '__qualname__', None)}"


def _reduce(module: Any, protocol: int) -> tuple[Any, ...]:
    """Pickles a module whose class no import finds by the class that it was made of."""
    return _restore, (type(module)._gconv_original,), module.__getstate__()


def _restore(original: type[nn.Conv2d]) -> GroupConv2d:
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
    """TensorFlow's "SAME": ceil(H / stride) rows come out, the odd zero goes after.

    At stride 1 that is PyTorch's "same". Where both sides get as much, no padded copy of the input is needed.
    """
    alike = all(d * (k - 1) % 2 == 0 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    padding: Any = "same"
    if layer.stride != (1, 1) or not alike:
        input, padding = F.pad(input, (*_zeros(layer, input, -1), *_zeros(layer, input, -2))), 0
    settings = (layer.stride, padding, layer.dilation, layer.groups)
    return group_conv2d(input, weight, layer.bias, *settings, activation=layer.activation)


def _zeros(layer: Any, input: Tensor, axis: int) -> tuple[int, int]:
    """Before and after the image along ``axis``."""
    length, stride = input.shape[axis], layer.stride[axis]
    reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
    total = (-(-length // stride) - 1) * stride + reach - length
    total = total.clamp(min=0) if isinstance(total, Tensor) else max(total, 0)  # torch.jit.trace's sizes
    return total // 2, total - total // 2


def _standardised(layer: Any) -> Tensor:
    """Scaled weight standardisation, arXiv 2101.08692: each filter of mean 0 and variance (gain * scale)^2.

    A batch norm whose channels are the filters, as timm computes it: bit for bit the same.
    """
    filters = layer.weight.reshape(1, layer.out_channels, -1)
    gain = (layer.gain * layer.scale).view(-1)
    weight = F.batch_norm(filters, None, None, gain, training=True, momentum=0.0, eps=layer.eps)
    return weight.reshape_as(layer.weight)


_EQUATIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "timm.layers.conv2d_same.Conv2dSame.forward": _conv2d_same,
    "timm.layers.std_conv.ScaledStdConv2d.forward": _scaled_std_conv2d,
    "timm.layers.std_conv.ScaledStdConv2dSame.forward": _scaled_std_conv2d_same,
}
