"""``convert`` and ``revert``: replace the convolutions of a network with gconv's layers, and undo that."""

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
from gconv.networks.reports import DENSE, ConversionReport, ConvertedLayer, geometry_in_words
from gconv.torch_internals import ConvolutionBase

_SWAPPED = "_swapped_by_gconv"  # a mark in a module's __dict__, which is copied and pickled with the module


def convert(
    model: nn.Module,
    *,
    depthwise: bool = False,
    filter: Callable[[nn.Module, str], bool] | None = None,
    channels_last: bool = True,
) -> ConversionReport:
    """Convert the grouped convolutions of a model to gconv's layers, in place.

    ``nn.Conv2d`` becomes ``gconv.GroupConv2d``, and ``nn.Conv1d``, ``nn.Conv3d``, ``nn.ConvTranspose1d`` and
    ``nn.ConvTranspose2d`` become their counterparts. Only the class of a module changes. Its parameters with
    their names and order, hooks, device and mode stay the same, so optimizers, state dicts and references to
    the module keep working. A second call changes nothing, and ``gconv.revert`` undoes the conversion.

    **Layout.** If any 2-d layer is converted, the weights of all 2-d convolutions in the model, including
    transposed ones, move to channels_last, the layout that the kernels need, together with their gradients
    and optimizer states. Activations then become channels_last regardless of the layout of the input, as
    after ``model.to(memory_format=torch.channels_last)``. 1-d and 3-d layers keep their layout. The kernels
    run those whose inputs are already channels_last, such as transposed (N, L, C) tensors.

    **Subclasses.** A subclass of ``nn.Conv2d`` becomes a subclass of both classes, if gconv can run its
    convolution. It can do so for subclasses that leave the convolution to ``nn.Conv2d``, and for timm's
    ``Conv2dSame``, ``ScaledStdConv2d`` and ``ScaledStdConv2dSame``. ``nn.LazyConv2d`` becomes ``GroupConv2d``
    with its first input. The same applies to the other kinds of convolution. Parametrizations are kept.

    Args:
        model: any module, including a single convolution.
        depthwise: whether to convert depthwise convolutions too, whose groups have one input channel.
            Defaults to False.
        filter: called as ``filter(module, qualified_name)`` for each convolution that can be converted;
            return False to skip it. Defaults to None: convert all.
        channels_last: whether to move 2-d weights to channels_last. Defaults to True. Pass False for tools
            that require contiguous weights (FSDP2, ``safetensors.torch.save_file``, ``LBFGS``,
            ``parameters_to_vector``, pruning), and pass channels_last images to the model instead. Pass False
            also if the model flattens images with ``x.view(N, -1)``, which raises an error in channels_last
            (``x.flatten(1)`` works). Contiguous layers run on PyTorch's own convolution, unless the kernels
            were measured to gain more than it costs to copy input and output.

    Returns:
        A report of all convolutions, converted or skipped, with the reason for each; ``print`` it.

    Raises:
        TypeError: ``model`` is not a module or is a TorchScript module, which can't be changed, or ``filter``
            is not callable.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(128, 128, 3, groups=32), nn.ReLU(), nn.Conv2d(128, 8, 1))
        >>> report = gconv.convert(model)
        >>> [layer.name for layer in report.converted]
        ['0']
        >>> model[0]
        GroupConv2d(128, 128, kernel_size=(3, 3), stride=(1, 1), groups=32)
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
    """Undo ``gconv.convert`` in place: restore the classes of converted modules and the layout of weights.

    Layers that were created as ``GroupConv2d`` or one of its counterparts are not changed.

    Args:
        model: the module that was passed to ``gconv.convert``.

    Returns:
        The qualified names of the reverted modules.

    Raises:
        TypeError: ``model`` is not a module, or is a TorchScript module.
        RuntimeError: since the conversion, an ``activation`` was set on a layer, which its original class
            wouldn't apply, or its class was changed, for example by FSDP2. In this case no layer is reverted.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(128, 128, 3, groups=32))
        >>> report = gconv.convert(model)
        >>> gconv.revert(model)
        ('0',)
    """
    check_model(model)
    swapped = {name: module for name, module in model.named_modules() if _is_swapped(module)}
    for name, module in swapped.items():
        _check_revertible(module, name)
    for module in swapped.values():
        own = _own_class(module)
        if issubclass(own, GroupConvolution):  # not a lazy layer before its first input
            _set_class(module, own._gconv_original)
        for mark in (_SWAPPED, "cls_to_become"):
            module.__dict__.pop(mark, None)
    restore(model.modules())
    return tuple(swapped)


def check_model(model: Any) -> None:
    """Raise TypeError unless ``model`` is a module that can be changed."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "model must not be a TorchScript module, which can't be changed: convert before torch.jit.script"
        )


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
    """Convert a layer unless there is a reason to skip it, and return its line of the report."""
    geometry = geometry_in_words(module)
    if reason_to_leave is not None:
        return ConvertedLayer(name, geometry, False, reason_to_leave)
    large_call = _large_call(module)
    _swap(module)
    return ConvertedLayer(name, geometry, True, f"groups={module.groups}", large_call)


def _check_revertible(module: nn.Module, name: str) -> None:
    """Raise RuntimeError if the original class of a layer no longer fits, because the layer changed."""
    if _is_lazy(module):
        return
    where, own = f"layer {name!r}" if name else "the model", _own_class(module)
    original = getattr(own, "_gconv_original", None)
    if original is None or own is not subclasses.grouped(original):
        raise RuntimeError(
            f"{where} became a {own.__name__} after conversion: call gconv.revert before its class changes"
        )
    if module.activation is not None:
        raise RuntimeError(
            f"{where} has activation={module.activation!r}, which {original.__name__} lacks: set it to None"
        )


def _is_swapped(module: nn.Module) -> bool:
    """Whether a module was converted, by its mark or its class: a copy can lose the mark."""
    if _SWAPPED in module.__dict__:
        return True
    return isinstance(module, GroupConvolution) and module._gconv_original is not module._gconv_kind.layer


_LARGE = {1: (32, 4096), 2: (256, 56, 56), 3: (16, 16, 56, 56)}  # batch and lengths, by number of dimensions


def _large_call(module: Any) -> Call | None:
    """Return a call with a large batch, or None if the layer is still lazy or its kernel is even larger."""
    if _is_lazy(module):
        return None
    kind = _kind(module)
    batch, *lengths = _LARGE[kind.dims]
    # Not module.weight.shape: reading a parametrized weight computes it, which can change buffers.
    own, other = module.out_channels, module.in_channels
    if kind.transposed:
        own, other = other, own
    sizes = ((batch, module.in_channels, *lengths), (own, other // module.groups, *module.kernel_size))
    input, weight = (torch.empty(size, device="meta") for size in sizes)
    try:
        return prepare(kind, input, weight, None, kind.settings_of(module))[1]
    except RuntimeError:
        return None


def _swap(module: nn.Module) -> None:
    """Make a module one of gconv's layers; a lazy module becomes one with its first input."""
    if _is_lazy(module):
        module.__dict__["cls_to_become"] = LAYER_OF[_kind(module)]
    else:
        _set_class(module, subclasses.grouped(_own_class(module)))
    module.__dict__[_SWAPPED] = True


def _own_class(module: nn.Module) -> type[Any]:
    """Return the class of a module, ignoring the class that a parametrization created for it."""
    return type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Set the class of a module to ``cls``, or to a parametrized subclass if the module is parametrized."""
    if parametrize.is_parametrized(module):
        properties = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")}
        cls = type(f"Parametrized{cls.__name__}", (cls,), properties)
    object.__setattr__(module, "__class__", cls)  # skips a custom __setattr__ of the class


def _reason_to_leave(
    module: Any, name: str, depthwise: bool, filter: Callable[[nn.Module, str], bool] | None
) -> str | None:
    """Return why a layer is skipped, or None if it should be converted."""
    if kind_of(module) is None:
        return f"gconv doesn't support nn.{type(module).__name__}"
    kind, lazy = _kind(module), _is_lazy(module)
    if isinstance(module, GroupConvolution) or (lazy and _is_swapped(module)):
        return f"already a {LAYER_OF[kind].__name__}"
    if module.groups == 1:
        return DENSE
    if not depthwise and module.groups == (module.out_channels if lazy else module.in_channels):
        return f"{'may be depthwise' if lazy else 'depthwise'}: pass depthwise=True to convert it"
    own: Any = module.cls_to_become if lazy else _own_class(module)
    if (lazy and own is not kind.layer) or not issubclass(own, kind.layer):
        return f"can't tell which convolution class {type(module).__name__} will become"
    if {"forward", "_conv_forward"} & module.__dict__.keys():
        return "its forward was replaced"
    if hasattr(module, "activation"):
        return "has an attribute named activation"
    if getattr(module, "qconfig", None) is not None:
        return "prepared for torch.ao.quantization, which needs its exact class"
    if reason := subclasses.why_not(own):
        return reason
    if filter is not None and not filter(module, name):
        return "excluded by filter"
    return None
