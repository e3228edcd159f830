"""What ``convert`` and ``fuse`` did to each convolution of a network, as tables to print."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from gconv import dispatch
from gconv.arguments import numbers
from gconv.dispatch import this_device
from gconv.geometry import PASSES, kernel_in_words, steps_in_words
from gconv.kinds import Call, kind_of
from gconv.text import columns

PYTORCH = "PyTorch"


@dataclass(frozen=True)
class ConvertedLayer:
    """One convolution that :func:`~gconv.convert` looked at.

    Attributes:
        name: qualified name in the model; empty for the model itself.
        geometry: such as "128 -> 256, 3x3, stride 2".
        swapped: whether it is one of gconv's layers now.
        reason: why it was swapped or left.
        large_call: a call with a large batch, such as 256 images of 56 x 56, for which the report says who
            would run it; None if the layer was left or has seen no input yet.
    """

    name: str
    geometry: str
    swapped: bool
    reason: str
    large_call: Call | None = None


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`~gconv.convert` swapped, what it left, and why; ``print`` it as a table.

    Printing says which layers the kernels will run on this machine, and so may initialise CUDA. 1-d and 3-d
    layers, whose layout ``convert`` leaves alone, are judged for contiguous inputs; ask
    :func:`~gconv.explain` about others.

    Attributes:
        layers: every convolution of the model.
        layout: what was done to the layout of the weights, in words; empty if nothing was.
    """

    layers: tuple[ConvertedLayer, ...]
    layout: str = ""

    @property
    def swapped(self) -> tuple[ConvertedLayer, ...]:
        """The layers that are gconv's now."""
        return tuple(layer for layer in self.layers if layer.swapped)

    @property
    def left(self) -> tuple[ConvertedLayer, ...]:
        """The layers that were not swapped."""
        return tuple(layer for layer in self.layers if not layer.swapped)

    def __str__(self) -> str:
        if not self.layers:
            return "no convolution in the model that gconv takes; calls of functions such as F.conv2d stay"
        here = {layer: _who_runs(layer.large_call) for layer in self.swapped if layer.large_call is not None}
        rows = [("layer", "geometry", "result", "why", "runs here on")]
        for layer in self.layers:
            runner, _ = here.get(layer, ("", ""))
            result = "swapped" if layer.swapped else "left"
            rows.append((layer.name or "(the model)", layer.geometry, result, layer.reason, runner))
        return "\n".join([columns(rows, left=5), *self._remarks(dict(here.values()))])

    def _remarks(self, runners: dict[str, str]) -> Iterator[str]:
        """Yield the lines below the table; ``runners`` maps those who run layers here to the reason."""
        yield f"{len(self.swapped)} of {len(self.layers)} convolutions swapped"
        if self.layout:
            yield self.layout
        yield from (f"{name}: {reason}" for name, reason in runners.items() if name == PYTORCH)
        if any(name != PYTORCH for name in runners):
            yield "small batches stay with PyTorch: gconv.profile(model, x) says which layers gain what"


@dataclass
class FusedLayer:
    """One convolution of a network that :func:`~gconv.fuse` returned.

    Attributes:
        name: qualified name.
        geometry: such as "128 -> 256, 3x3, stride 2".
        norm: name of the batch norm that was folded into its weights.
        activation: the activation that its kernel applies.
        residual: whether its kernel adds the shortcut.
        reason: why no more was fused.
    """

    name: str
    geometry: str
    norm: str | None = None
    activation: str | None = None
    residual: bool = False
    reason: str = ""


@dataclass
class FusionReport:
    """What :func:`~gconv.fuse` fused, what it left, and why; ``print`` it as a table.

    Attributes:
        layers: the convolutions, in the order in which they run.
        norms_left: names of the batch norms that remain, each with the reason.
        opaque: names of the modules that could not be traced, each with the reason.
    """

    layers: list[FusedLayer] = field(default_factory=list)
    norms_left: dict[str, str] = field(default_factory=dict)
    opaque: dict[str, str] = field(default_factory=dict)

    @property
    def folded(self) -> list[str]:
        """Names of the batch norms that were folded into convolutions."""
        return [layer.norm for layer in self.layers if layer.norm is not None]

    def __str__(self) -> str:
        rows = [("layer", "geometry", "folded in", "in the kernel", "left")]
        for layer in self.layers:
            in_kernel = ["residual"] * layer.residual + ([layer.activation] if layer.activation else [])
            rows.append((layer.name, layer.geometry, layer.norm or "", ", ".join(in_kernel), layer.reason))
        table = columns(rows, left=5) if self.layers else "no convolution in the model"
        return "\n".join([table, *self._remarks()])

    def _remarks(self) -> Iterator[str]:
        """Yield the lines below the table."""
        yield from (f"stays: {name}: {reason}" for name, reason in self.norms_left.items())
        yield from (f"not looked into: {name}: {reason}" for name, reason in self.opaque.items())
        norms = len(self.folded) + len(self.norms_left)
        activations = sum(layer.activation is not None for layer in self.layers)
        residuals = sum(layer.residual for layer in self.layers)
        yield (
            f"{len(self.folded)} of {norms} batch norms folded; {activations} activations and {residuals} "
            "residuals taken into grouped convolutions"
        )


def geometry_in_words(layer: Any) -> str:
    """Describe a layer, such as "128 -> 256, 3x3, stride 2"; a stride or dilation of 1 is left out."""
    kind = kind_of(layer)
    dims = 3 if kind is None else kind.dims
    kernel, stride, dilation = (
        numbers(name, getattr(layer, name), 1, dims) for name in ("kernel_size", "stride", "dilation")
    )
    channels = (
        f"{layer.in_channels or '?'} -> {layer.out_channels}"  # a lazy layer has 0 until its first input
    )
    steps = [*steps_in_words(stride, dilation), *["transposed"] * layer.transposed]
    return ", ".join([channels, kernel_in_words(kernel), *steps])


def _who_runs(call: Call) -> tuple[str, str]:
    """Return who runs large calls of a layer on this machine, and why.

    That is PyTorch, or the kernels, with the types and passes that "auto" takes them for. ``convert`` moves
    2-d layers to channels_last, and no others.
    """
    device, reasons = this_device(), []
    layout = "channels_last" if call.kind.dims == 2 else "contiguous"
    types_by_passes: dict[str, list[str]] = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        found = dispatch.explain_call("auto", device, layout, dtype, call)
        decisions = {call.kind.pass_of_geometry(pass_): decision for pass_, decision in found.items()}
        passes = [pass_ for pass_, decision in decisions.items() if decision.backend == "triton"]
        if passes:
            suffix = "" if len(passes) == len(PASSES) else f" {', '.join(passes)}"
            types_by_passes.setdefault(suffix, []).append(str(dtype).removeprefix("torch."))
        reasons.append(decisions["forward"].reason)
    if not types_by_passes:
        return PYTORCH, reasons[0]
    where = "; ".join(f"{' and '.join(types)}{passes}" for passes, types in types_by_passes.items())
    return f"the kernels, in {where}", reasons[0]
