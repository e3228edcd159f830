"""``convert``: gconv into other people's networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

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


def convert(model: nn.Module, *, filter: Callable[[nn.Module, str], bool] | None = None) -> ConversionReport:
    """Turns the grouped convolutions of ``model`` into :class:`~gconv.GroupConv2d`, in place.

    Only the class of a module changes: its parameters, their names and order, hooks, device and mode stay, so
    that optimisers, state dicts and references to the module go on as before. A second call changes nothing.

    Args:
        model: any module, a single convolution included.
        filter: called as ``filter(module, qualified_name)`` for each convolution that could be swapped; False
            leaves it.

    Returns:
        A report of every 2-d convolution, swapped or left, with the reason; ``print`` it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    layers = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        reason = _reason_to_leave(module, name, filter)
        if reason is None:
            module.__class__ = GroupConv2d
        layers.append(Layer(name, _geometry(module), reason is None, reason or f"groups={module.groups}"))
    return ConversionReport(tuple(layers))


def _reason_to_leave(
    module: nn.Conv2d, name: str, filter: Callable[[nn.Module, str], bool] | None
) -> str | None:
    if isinstance(module, GroupConv2d):
        return "is a GroupConv2d already"
    if module.groups == 1:
        return "dense: groups=1"
    if type(module) is not nn.Conv2d:
        return f"its class {type(module).__name__} may do more than nn.Conv2d"
    if {"forward", "_conv_forward"} & module.__dict__.keys():
        return "its forward was replaced"
    if filter is not None and not filter(module, name):
        return "the filter left it"
    return None


def _geometry(module: nn.Conv2d) -> str:
    """Such as "128 -> 256, 3x3, stride 2"; what a convolution has by default is not said."""
    parts = [f"{module.in_channels} -> {module.out_channels}", "x".join(map(str, module.kernel_size))]
    for name in ("stride", "dilation"):
        pair = getattr(module, name)
        if tuple(pair) != (1, 1):
            parts.append(f"{name} {pair[0]}" if pair[0] == pair[1] else f"{name} {tuple(pair)}")
    return ", ".join(parts)
