"""``convert`` and ``revert``: swap the convolutions of a network for gconv's, and swap them back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from gconv.arguments import prepare
from gconv.kinds import Call, Kind, kind_of
from gconv.module import LAYER_OF, GroupConvolution
from gconv.networks import subclasses
from gconv.networks.layout import move_to_channels_last, restore
from gconv.networks.reports import ConversionReport, ConvertedLayer, geometry_in_words
from gconv.torch_internals import ConvolutionBase

_SWAPPED = "_swapped_by_gconv"  # a mark in a module's __dict__, so that it is copied and pickled with it


def convert(
    model: nn.Module,
    *,
    depthwise: bool = False,
    filter: Callable[[nn.Module, str], bool] | None = None,
    channels_last: bool = True,
) -> ConversionReport:
    """Turn the grouped convolutions of a model into gconv's layers, in place.

    ``nn.Conv2d`` becomes :class:`~gconv.GroupConv2d`, and ``nn.Conv1d``, ``nn.Conv3d``,
    ``nn.ConvTranspose1d`` and ``nn.ConvTranspose2d`` become their counterparts. A swapped module gets another
    class. Its parameters, their names and order, hooks, device and mode stay the same, so optimisers, state
    dicts and references to the module keep working.

    If any 2-d layer is swapped, the weights of all 2-d convolutions in the model, transposed ones included,
    move to channels_last, the kernels' layout, along with their gradients and the state of optimisers.
    Activations follow, whatever the layout of the input, as they do after
    ``model.to(memory_format=torch.channels_last)``. The layout of 1-d and 3-d layers is left alone: the
    kernels run those whose inputs are channels_last already, such as transposed (N, L, C) tensors.

    A second call changes nothing, and :func:`revert` undoes everything.

    A subclass of ``nn.Conv2d`` becomes a subclass of both, if gconv can run its convolution: subclasses that
    leave it to ``nn.Conv2d``, and timm's ``Conv2dSame``, ``ScaledStdConv2d`` and ``ScaledStdConv2dSame``. A
    ``nn.LazyConv2d`` becomes a ``GroupConv2d`` with its first input. The same holds for the other kinds.
    Parametrisations stay.

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
        A report of every convolution, swapped or left, with the reason; ``print`` it.

    Raises:
        TypeError: ``model`` is not a module, or is a TorchScript module, which cannot be changed; or
            ``filter`` is not callable.
    """
    check_model(model)
    if filter is not None and not callable(filter):
        raise TypeError(f"filter must be callable as filter(module, name), got {type(filter).__name__}")
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, ConvolutionBase)]
    reasons = [_reason_to_leave(module, name, depthwise, filter) for name, module in found]
    layers = [
        _convert_layer(module, name, reason) for (name, module), reason in zip(found, reasons, strict=True)
    ]
    images = [(module, reason) for (_, module), reason in zip(found, reasons, strict=True) if _is_2d(module)]
    moves = channels_last and any(reason is None for _, reason in images)
    layout = move_to_channels_last([module for module, _ in images]) if moves else ""
    return ConversionReport(tuple(layers), layout)


def revert(model: nn.Module) -> tuple[str, ...]:
    """Undo :func:`convert` in place: swapped modules get their own class back, and weights their layout.

    Layers that were created as ``GroupConv2d`` or one of its counterparts stay as they are.

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
        if issubclass(own, GroupConvolution):  # else lazy, and not swapped yet
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


def _kind(module: nn.Module) -> Kind:
    """Return the kind of a convolution."""
    kind = kind_of(module)
    assert kind is not None
    return kind


def _is_2d(module: nn.Module) -> bool:
    kind = kind_of(module)
    return kind is not None and kind.dims == 2


def _is_lazy(module: nn.Module) -> bool:
    kind = kind_of(module)
    return kind is not None and isinstance(module, kind.lazy)


def _convert_layer(module: Any, name: str, reason_to_leave: str | None) -> ConvertedLayer:
    """Swap a layer, unless there is a reason to leave it, and report what was done."""
    geometry = geometry_in_words(module)
    if reason_to_leave is not None:
        return ConvertedLayer(name, geometry, False, reason_to_leave)
    large_call = _large_call(module)
    _swap(module)
    return ConvertedLayer(name, geometry, True, f"groups={module.groups}", large_call)


def _check_revertible(module: nn.Module, name: str) -> None:
    """Raise RuntimeError if a swapped layer was changed since, so that its own class would not fit."""
    if _is_lazy(module):
        return
    where, own = f"layer {name!r}" if name else "the model", _own_class(module)
    original = getattr(own, "_gconv_original", None)
    if original is None or own is not subclasses.grouped(original):
        raise RuntimeError(f"{where} became a {own.__name__} after it was swapped: revert before that")
    if module.activation is not None:
        raise RuntimeError(f"{where} has activation={module.activation!r}: {original.__name__} has none")


def _is_swapped(module: nn.Module) -> bool:
    """Whether ``convert`` swapped a module; a copy may have lost the mark, so its class counts too."""
    if _SWAPPED in module.__dict__:
        return True
    return isinstance(module, GroupConvolution) and module._gconv_original is not module._gconv_kind.layer


_LARGE = {1: (32, 4096), 2: (256, 56, 56), 3: (16, 16, 56, 56)}  # batch and lengths by number of dimensions


def _large_call(module: Any) -> Call | None:
    """Return a call with a large batch; None if a lazy layer has no channels yet, or its kernel is larger."""
    if _is_lazy(module):
        return None
    kind = _kind(module)
    batch, *lengths = _LARGE[kind.dims]
    sizes = ((batch, module.in_channels, *lengths), module.weight.shape)
    input, weight = (torch.empty(size, device="meta") for size in sizes)
    try:
        return prepare(kind, input, weight, None, kind.settings_of(module))[1]
    except RuntimeError:
        return None


def _swap(module: nn.Module) -> None:
    """Make a module one of gconv's layers; a lazy one becomes one with its first input."""
    if _is_lazy(module):
        module.__dict__["cls_to_become"] = LAYER_OF[_kind(module)]
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
    module: Any, name: str, depthwise: bool, filter: Callable[[nn.Module, str], bool] | None
) -> str | None:
    """Return why a layer is not swapped, None if it is."""
    if kind_of(module) is None:
        return f"gconv does not take nn.{type(module).__name__}"
    kind, lazy = _kind(module), _is_lazy(module)
    if isinstance(module, GroupConvolution) or (lazy and _is_swapped(module)):
        return f"is a {LAYER_OF[kind].__name__} already"
    if module.groups == 1:
        return "dense: groups=1"
    if not depthwise and module.groups == (module.out_channels if lazy else module.in_channels):
        return f"{'may be depthwise' if lazy else 'depthwise'}: convert(..., depthwise=True) swaps it"
    own: Any = module.cls_to_become if lazy else _own_class(module)
    if (lazy and own is not kind.layer) or not issubclass(own, kind.layer):
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
