"""``convert`` and ``revert``: gconv into other people's networks, and out of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from gconv import subclasses
from gconv.functional import pair
from gconv.geometry import steps_in_words
from gconv.module import GroupConv2d
from gconv.terminal import columns


@dataclass(frozen=True)
class Layer:
    """One convolution that :func:`convert` looked at."""

    name: str
    geometry: str
    swapped: bool
    reason: str


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`convert` swapped and what it left, and why; prints as a table."""

    layers: tuple[Layer, ...]

    @property
    def swapped(self) -> tuple[Layer, ...]:
        """The layers that are a ``GroupConv2d`` now."""
        return tuple(layer for layer in self.layers if layer.swapped)

    @property
    def left(self) -> tuple[Layer, ...]:
        """The layers that stayed what they were."""
        return tuple(layer for layer in self.layers if not layer.swapped)

    def __str__(self) -> str:
        if not self.layers:
            return "no nn.Conv2d in the model; 1-d, 3-d, transposed and functional convolutions stay"
        rows = [("layer", "geometry", "result", "why")]
        rows += [
            (
                layer.name or "(the model)",
                layer.geometry,
                "swapped" if layer.swapped else "left",
                layer.reason,
            )
            for layer in self.layers
        ]
        total = f"{len(self.swapped)} of {len(self.layers)} convolutions swapped"
        return f"{columns(rows, left=4)}\n{total}"


def convert(
    model: nn.Module, *, depthwise: bool = False, filter: Callable[[nn.Module, str], bool] | None = None
) -> ConversionReport:
    """Turns the grouped convolutions of ``model`` into :class:`~gconv.GroupConv2d`, in place.

    Only the class of a module changes: its parameters, their names and order, hooks, device and mode stay, so
    that optimisers, state dicts and references to the module go on as before. A second call changes nothing,
    :func:`revert` takes it back.

    Subclasses of ``nn.Conv2d`` become subclasses of both, where their convolution can be reached: those that
    leave it to ``nn.Conv2d``, and timm's ``Conv2dSame``, ``ScaledStdConv2d`` and ``ScaledStdConv2dSame``. A
    ``nn.LazyConv2d`` becomes a ``GroupConv2d`` with its first input. Parametrisations stay.

    Args:
        model: any module, a single convolution included.
        depthwise: swap convolutions whose groups have one input channel as well.
        filter: called as ``filter(module, qualified_name)`` for each convolution that could be swapped; False
            leaves it.

    Returns:
        A report of every 2-d convolution, swapped or left, with the reason; ``print`` it.

    Raises:
        TypeError: ``model`` is no module, or a TorchScript module, whose code is fixed; ``filter`` is not
            callable.
    """
    check_model(model)
    if filter is not None and not callable(filter):
        raise TypeError(f"filter must be callable as filter(module, name), got {type(filter).__name__}")
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    reasons = [_reason_to_leave(module, name, depthwise, filter) for name, module in found]
    layers = []
    for (name, module), reason in zip(found, reasons, strict=True):
        layers.append(
            Layer(name, geometry_in_words(module), reason is None, reason or f"groups={module.groups}")
        )
        if reason is None:
            _swap(module)
    return ConversionReport(tuple(layers))


def revert(model: nn.Module) -> tuple[str, ...]:
    """Gives what :func:`convert` swapped its own class back, in place; parameters and all else stay.

    Layers that were made as ``GroupConv2d`` stay what they are.

    Returns:
        The qualified names of the modules that were brought back.

    Raises:
        TypeError: as :func:`convert`.
        RuntimeError: a swapped layer was given an ``activation``, which its own class would not apply, or
            another class, by FSDP2 say; nothing is reverted.
    """
    check_model(model)
    swapped = {name: module for name, module in model.named_modules() if _is_swapped(module)}
    for name, module in swapped.items():
        if isinstance(module, nn.LazyConv2d):
            continue
        name, own = f"layer {name!r}" if name else "the model", _own_class(module)
        original = getattr(own, "_gconv_original", None)
        if original is None or own is not subclasses.grouped(original):
            raise RuntimeError(f"{name} became a {own.__name__} after it was swapped: revert before that")
        if module.activation is not None:
            raise RuntimeError(f"{name} has activation={module.activation!r}: {original.__name__} has none")
    for module in swapped.values():
        if not isinstance(module, nn.LazyConv2d):
            _set_class(module, _own_class(module)._gconv_original)
        for mark in (_SWAPPED, "cls_to_become"):
            module.__dict__.pop(mark, None)
    return tuple(swapped)


_SWAPPED = "_swapped_by_gconv"  # in a module's __dict__, so that it is copied and pickled with it


def _is_swapped(module: nn.Module) -> bool:
    """Whether ``convert`` made it what it is; by its class too, where a copy has lost the mark."""
    made = isinstance(module, GroupConv2d) and type(module)._gconv_original is not nn.Conv2d
    return made or _SWAPPED in module.__dict__


def _swap(module: nn.Conv2d) -> None:
    if isinstance(module, nn.LazyConv2d):
        module.__dict__["cls_to_become"] = GroupConv2d
    else:
        _set_class(module, subclasses.grouped(_own_class(module)))
    module.__dict__[_SWAPPED] = True


def _own_class(module: nn.Module) -> type[Any]:
    """The class of a module, beneath the one that a parametrisation made for it alone."""
    return type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Makes ``cls`` the class of a module; beneath its parametrisation's, which has the properties."""
    if parametrize.is_parametrized(module):
        made = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")}
        cls = type(f"Parametrized{cls.__name__}", (cls,), made)
    object.__setattr__(module, "__class__", cls)  # whatever the class does where an attribute is set


def check_model(model: Any) -> None:
    """Raises TypeError where ``model`` is no module whose parts can be exchanged."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("the code of a TorchScript module is fixed: convert before torch.jit.script")


def _reason_to_leave(
    module: nn.Conv2d, name: str, depthwise: bool, filter: Callable[[nn.Module, str], bool] | None
) -> str | None:
    lazy = isinstance(module, nn.LazyConv2d)
    if isinstance(module, GroupConv2d) or (lazy and _is_swapped(module)):
        return "is a GroupConv2d already"
    if module.groups == 1:
        return "dense: groups=1"
    if not depthwise and module.groups == (module.out_channels if lazy else module.in_channels):
        return f"{'may be depthwise' if lazy else 'depthwise'}: convert(..., depthwise=True) swaps it"
    own = module.cls_to_become if lazy else _own_class(module)
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


def geometry_in_words(module: nn.Conv2d) -> str:
    """Of a layer, such as "128 -> 256, 3x3, stride 2"; what a convolution has by default is not said."""
    kernel, *steps = (
        pair(name, getattr(module, name), least=1) for name in ("kernel_size", "stride", "dilation")
    )
    # A lazy one has 0 channels until it has seen an input.
    parts = [f"{module.in_channels or '?'} -> {module.out_channels}", "x".join(map(str, kernel))]
    return ", ".join([*parts, *steps_in_words(*steps)])
