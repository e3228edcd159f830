"""Reports of what ``convert`` and ``fuse`` did to each convolution of a network, as tables to print."""

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
from gconv.text import columns, counted

PYTORCH = "PyTorch"
DENSE = "dense: groups=1"  # the reason for skipping a layer that isn't listed


@dataclass(frozen=True)
class ConvertedLayer:
    """A convolution in the report of ``gconv.convert``.

    Attributes:
        name: qualified name in the model; empty for the model itself.
        geometry: channels, kernel, stride and dilation, such as "128 -> 256, 3x3, stride 2".
        converted: whether the layer was converted to gconv's.
        reason: why it was converted or skipped.
        large_call: a call with a large batch, such as 256 images of 56 x 56, for which the report shows the
            backend. None if the layer was skipped or is lazy and has had no input yet.
    """

    name: str
    geometry: str
    converted: bool
    reason: str
    large_call: Call | None = None


@dataclass(frozen=True)
class ConversionReport:
    """The report of ``gconv.convert``: what it converted or skipped, and why. ``print`` it as a table.

    The table leaves out dense convolutions, and shows which backend runs each layer on this machine, so
    printing can initialize CUDA. It assumes channels_last inputs for 2-d layers and contiguous inputs for
    1-d and 3-d layers, whose layout ``convert`` doesn't change. For other inputs call ``gconv.explain``.

    Attributes:
        layers: all convolutions of the model.
        layout: how the layout of the weights changed, as text; empty if it didn't.
    """

    layers: tuple[ConvertedLayer, ...]
    layout: str = ""

    @property
    def converted(self) -> tuple[ConvertedLayer, ...]:
        """The layers that were converted."""
        return tuple(layer for layer in self.layers if layer.converted)

    @property
    def skipped(self) -> tuple[ConvertedLayer, ...]:
        """The layers that were skipped."""
        return tuple(layer for layer in self.layers if not layer.converted)

    def __str__(self) -> str:
        if not self.layers:
            return "the model has no convolution layers; calls of functions such as F.conv2d aren't converted"
        listed = [layer for layer in self.layers if layer.reason != DENSE]
        here = {
            layer: _who_runs(layer.large_call) for layer in self.converted if layer.large_call is not None
        }
        rows = [("layer", "geometry", "result", "reason", "backend here")]
        for layer in listed:
            runner, _ = here.get(layer, ("", ""))
            result = "converted" if layer.converted else "skipped"
            rows.append((layer.name or "(the model)", layer.geometry, result, layer.reason, runner))
        table = [columns(rows, left=5)] if listed else []
        return "\n".join([*table, *self._remarks(dict(here.values()))])

    def __repr__(self) -> str:
        return f"<ConversionReport: {self._count()}; print it for the layers>"

    def _count(self) -> str:
        """Return how many convolutions were converted, in words."""
        return f"converted {len(self.converted)} of {counted(len(self.layers), 'convolution')}"

    def _remarks(self, runners: dict[str, str]) -> Iterator[str]:
        """Yield the lines below the table; ``runners`` maps what runs the layers here to the reason."""
        dense = sum(layer.reason == DENSE for layer in self.layers)
        unlisted = f"; {dense} dense (groups=1), not listed" if dense else ""
        yield f"{self._count()}{unlisted}"
        if self.layout:
            yield self.layout
        yield from (f"{name}: {reason}" for name, reason in runners.items() if name == PYTORCH)
        if any(name != PYTORCH for name in runners):
            yield "small batches run on PyTorch; gconv.profile(model, x) measures the gain of each layer"


@dataclass
class FusedLayer:
    """A convolution in the report of ``gconv.fuse``.

    Attributes:
        name: qualified name in the model.
        geometry: channels, kernel, stride and dilation, such as "128 -> 256, 3x3, stride 2".
        norm: name of the batch norm that was folded into its weights, or None.
        activation: the activation that its kernel applies, or None.
        residual: whether its kernel adds a shortcut.
        reason: why something was not fused; empty if there is nothing to report.
    """

    name: str
    geometry: str
    norm: str | None = None
    activation: str | None = None
    residual: bool = False
    reason: str = ""


@dataclass
class FusionReport:
    """The report of ``gconv.fuse``: what it fused, and why not the rest. ``print`` it as a table.

    Attributes:
        layers: the convolutions, in the order in which they run.
        not_folded: names of the batch norms that were not folded, each with the reason.
        not_traced: names of the modules that could not be traced, each with the reason.
    """

    layers: list[FusedLayer] = field(default_factory=list)
    not_folded: dict[str, str] = field(default_factory=dict)
    not_traced: dict[str, str] = field(default_factory=dict)

    @property
    def folded(self) -> list[str]:
        """Names of the batch norms that were folded into convolutions."""
        return [layer.norm for layer in self.layers if layer.norm is not None]

    def __str__(self) -> str:
        rows = [("layer", "geometry", "folded norm", "fused into kernel", "not fused because")]
        for layer in self.layers:
            in_kernel = ["residual"] * layer.residual + ([layer.activation] if layer.activation else [])
            rows.append((layer.name, layer.geometry, layer.norm or "", ", ".join(in_kernel), layer.reason))
        table = columns(rows, left=5) if self.layers else "the model has no convolution layers"
        return "\n".join([table, *self._remarks()])

    def __repr__(self) -> str:
        return f"<FusionReport: {next(self._totals())}; print it for the layers>"

    def _remarks(self) -> Iterator[str]:
        """Yield the lines below the table."""
        yield from (f"not folded: {name}: {reason}" for name, reason in self.not_folded.items())
        yield from (f"not traced: {name}: {reason}" for name, reason in self.not_traced.items())
        yield from self._totals()

    def _totals(self) -> Iterator[str]:
        """Yield how many batch norms, activations and residuals were fused, in words."""
        norms = counted(len(self.folded) + len(self.not_folded), "batch norm")
        activations = counted(sum(layer.activation is not None for layer in self.layers), "activation")
        residuals = counted(sum(layer.residual for layer in self.layers), "residual")
        yield f"folded {len(self.folded)} of {norms}"
        yield f"fused {activations} and {residuals} into grouped convolutions"


def geometry_in_words(layer: Any) -> str:
    """Describe a layer, such as "128 -> 256, 3x3, stride 2"; omits a stride or dilation of 1."""
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
    """Return the backend of large calls of a layer on this machine, and the reason.

    That is PyTorch, or the kernels with the dtypes and passes for which "auto" chooses them. Assumes
    channels_last for 2-d layers and contiguous inputs for others, because ``convert`` moves only 2-d layers
    to channels_last.
    """
    device, reasons = this_device(), []
    layout = "channels_last" if call.kind.dims == 2 else "contiguous"
    types_by_passes: dict[str, list[str]] = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        found = dispatch.explain_call("auto", device, layout, dtype, call)
        decisions = {call.kind.pass_of_geometry(pass_): decision for pass_, decision in found.items()}
        passes = [pass_ for pass_, decision in decisions.items() if decision.backend == "triton"]
        if passes:
            suffix = "" if len(passes) == len(PASSES) else f" ({', '.join(passes)})"
            types_by_passes.setdefault(suffix, []).append(str(dtype).removeprefix("torch."))
        reasons.append(decisions["forward"].reason)
    if not types_by_passes:
        return PYTORCH, reasons[0]
    where = "; ".join(f"{' and '.join(types)}{passes}" for passes, types in types_by_passes.items())
    return f"gconv's kernels: {where}", reasons[0]
