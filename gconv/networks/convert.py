"""``convert`` and ``revert``: swap the convolutions of a network for gconv's, and swap them back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from gconv.arguments import numbers
from gconv.geometry import ConvGeometry, Padding, same_padding
from gconv.module import GroupConv2d
from gconv.networks import subclasses
from gconv.networks.layout import move_to_channels_last, restore
from gconv.networks.reports import ConversionReport, ConvertedLayer, geometry_in_words

_SWAPPED = "_swapped_by_gconv"  # a mark in a module's __dict__, so that it is copied and pickled with it


def convert(
    model: nn.Module,
    *,
    depthwise: bool = False,
    filter: Callable[[nn.Module, str], bool] | None = None,
    channels_last: bool = True,
) -> ConversionReport:
    """Turn the grouped convolutions of a model into :class:`~gconv.GroupConv2d`, in place.

    A swapped module gets another class. Its parameters, their names and order, hooks, device and mode stay
    the same, so optimisers, state dicts and references to the module keep working.

    If any layer is swapped, the weights of all 2-d convolutions in the model move to channels_last, the
    kernels' layout, along with their gradients and the state of optimisers. Activations follow, whatever the
    layout of the input, as they do after ``model.to(memory_format=torch.channels_last)``.

    A second call changes nothing, and :func:`revert` undoes everything.

    A subclass of ``nn.Conv2d`` becomes a subclass of both, if gconv can run its convolution: subclasses that
    leave it to ``nn.Conv2d``, and timm's ``Conv2dSame``, ``ScaledStdConv2d`` and ``ScaledStdConv2dSame``. A
    ``nn.LazyConv2d`` becomes a ``GroupConv2d`` with its first input. Parametrisations stay.

    Args:
        model: any module, including a single convolution.
        depthwise: also swap convolutions whose groups have one input channel.
        filter: called as ``filter(module, qualified_name)`` for each convolution that could be swapped;
            return False to leave it.
        channels_last: pass False to leave the layout of all weights alone. Contiguous layers then run on
            PyTorch's own convolution, unless the kernels were measured to gain more than copying input and
            output costs. Do so for tools that require contiguous weights (FSDP2,
            ``safetensors.torch.save_file``, ``LBFGS``, ``parameters_to_vector``, pruning), and pass
            channels_last images instead; or for a model that flattens images with ``x.view(N, -1)``, which
            PyTorch refuses in channels_last (``x.flatten(1)`` works).

    Returns:
        A report of every 2-d convolution, swapped or left, with the reason; ``print`` it.

    Raises:
        TypeError: ``model`` is not a module, or is a TorchScript module, which cannot be changed; or
            ``filter`` is not callable.
    """
    check_model(model)
    if filter is not None and not callable(filter):
        raise TypeError(f"filter must be callable as filter(module, name), got {type(filter).__name__}")
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    reasons = [_reason_to_leave(module, name, depthwise, filter) for name, module in found]
    layers = [
        _convert_layer(module, name, reason) for (name, module), reason in zip(found, reasons, strict=True)
    ]
    moves = channels_last and None in reasons
    layout = move_to_channels_last([module for _, module in found]) if moves else ""
    return ConversionReport(tuple(layers), layout)


def revert(model: nn.Module) -> tuple[str, ...]:
    """Undo :func:`convert` in place: swapped modules get their own class back, and weights their layout.

    Layers that were created as ``GroupConv2d`` stay as they are.

    Args:
        model: the module that was passed to :func:`convert`.

    Returns:
        The qualified names of the modules that were reverted.

    Raises:
        TypeError: as in :func:`convert`.
        RuntimeError: a swapped layer has since been given an ``activation``, which its own class would not
            apply, or another class, as FSDP2 does; nothing is reverted then.
    """
    check_model(model)
    swapped = {name: module for name, module in model.named_modules() if _is_swapped(module)}
    for name, module in swapped.items():
        _check_revertible(module, name)
    for module in swapped.values():
        own = _own_class(module)
        if issubclass(own, GroupConv2d):  # else lazy, and not swapped yet
            _set_class(module, own._gconv_original)
        for mark in (_SWAPPED, "cls_to_become"):
            module.__dict__.pop(mark, None)
    restore(model.modules())
    return tuple(swapped)


def check_model(model: Any) -> None:
    """Raise TypeError unless ``model`` is a module whose parts can be exchanged."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("the code of a TorchScript module is fixed: convert before torch.jit.script")


def _convert_layer(module: nn.Conv2d, name: str, reason_to_leave: str | None) -> ConvertedLayer:
    """Swap a layer, unless there is a reason to leave it, and report what was done."""
    geometry = geometry_in_words(module)
    if reason_to_leave is not None:
        return ConvertedLayer(name, geometry, False, reason_to_leave)
    large_call = _large_call(module)
    _swap(module)
    return ConvertedLayer(name, geometry, True, f"groups={module.groups}", large_call)


def _check_revertible(module: nn.Module, name: str) -> None:
    """Raise RuntimeError if a swapped layer was changed since, so that its own class would not fit."""
    if isinstance(module, nn.LazyConv2d):
        return
    where, own = f"layer {name!r}" if name else "the model", _own_class(module)
    original = getattr(own, "_gconv_original", None)
    if original is None or own is not subclasses.grouped(original):
        raise RuntimeError(f"{where} became a {own.__name__} after it was swapped: revert before that")
    if module.activation is not None:
        raise RuntimeError(f"{where} has activation={module.activation!r}: {original.__name__} has none")


def _is_swapped(module: nn.Module) -> bool:
    """Whether ``convert`` swapped a module; a copy may have lost the mark, so its class counts too."""
    own_class = isinstance(module, GroupConv2d) and type(module)._gconv_original is not nn.Conv2d
    return own_class or _SWAPPED in module.__dict__


def _large_call(module: nn.Conv2d) -> ConvGeometry | None:
    """Return the sizes of a call with 256 images of 56 x 56; None for a lazy layer without channels yet."""
    if isinstance(module, nn.LazyConv2d):
        return None
    stride, dilation = numbers("stride", module.stride, 1, 2), numbers("dilation", module.dilation, 1, 2)
    r, s = module.weight.shape[2:]
    padding = Padding(*same_padding(r, dilation[0]), *same_padding(s, dilation[1]))
    size = (256, module.in_channels, 56, 56)
    return ConvGeometry.of(size, module.weight.shape, stride, padding, dilation, module.groups)


def _swap(module: nn.Conv2d) -> None:
    """Make a module a ``GroupConv2d``; a lazy one becomes one with its first input."""
    if isinstance(module, nn.LazyConv2d):
        module.__dict__["cls_to_become"] = GroupConv2d
    else:
        _set_class(module, subclasses.grouped(_own_class(module)))
    module.__dict__[_SWAPPED] = True


def _own_class(module: nn.Module) -> type[Any]:
    """Return the class of a module, without the one that a parametrisation made for it alone."""
    return type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Make ``cls`` the class of a module, below the class of its parametrisation, if it has one."""
    if parametrize.is_parametrized(module):
        properties = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")}
        cls = type(f"Parametrized{cls.__name__}", (cls,), properties)
    object.__setattr__(module, "__class__", cls)  # not through __setattr__ of the class, which may do more


def _reason_to_leave(
    module: nn.Conv2d, name: str, depthwise: bool, filter: Callable[[nn.Module, str], bool] | None
) -> str | None:
    """Return why a layer is not swapped, None if it is."""
    lazy = isinstance(module, nn.LazyConv2d)
    if isinstance(module, GroupConv2d) or (lazy and _is_swapped(module)):
        return "is a GroupConv2d already"
    if module.groups == 1:
        return "dense: groups=1"
    if not depthwise and module.groups == (module.out_channels if lazy else module.in_channels):
        return f"{'may be depthwise' if lazy else 'depthwise'}: convert(..., depthwise=True) swaps it"
    own: Any = module.cls_to_become if lazy else _own_class(module)
    if (lazy and own is not nn.Conv2d) or not issubclass(own, nn.Conv2d):
        return f"its class {type(module).__name__} hides the one that it is made of"
    if {"forward", "_conv_forward"} & module.__dict__.keys():
        return "its forward was replaced"
    if hasattr(module, "activation"):
        return "has an activation of its own"
    if getattr(module, "qconfig", None) is not None:
        return "is prepared for torch.ao.quantization, which looks for its very class"
    if reason := subclasses.why_not(own):
        return reason
    if filter is not None and not filter(module, name):
        return "the filter left it"
    return None
