"""Draw the times of layers against the memory floor, and rooflines.

``profile`` and ``explain`` call this module, which depends on neither.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from gconv.measure.figures import SMALL, TINY, Theme, add_legend, new_figure
from gconv.measure.timing import copy_speed, time_together
from gconv.text import prefixed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PYTORCH, PYTORCH_CHANNELS_LAST, KERNELS = "PyTorch", "PyTorch, channels_last", "gconv's kernels"
KINDS = [
    (series, grouped) for series in (PYTORCH, PYTORCH_CHANNELS_LAST, KERNELS) for grouped in (True, False)
]
BAR, GAP = 0.15, 0.17  # inches: the height of a bar, and the space between two layers
LONGEST_NAME = 36  # characters of a layer's name that are shown
UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


@dataclass(frozen=True)
class LayerTimes:
    """A convolution of a network, and its times in one call.

    Attributes:
        name: its module, or the first module of several with the same sizes.
        count: how many convolutions have these sizes.
        sizes: its sizes in words.
        grouped: whether it has more than one group.
        work: floating-point operations per byte that has to be moved.
        flops: floating-point operations of all passes.
        floor: memory floor of all passes in seconds.
        seconds: time of all passes, by ``PYTORCH``, ``PYTORCH_CHANNELS_LAST`` and ``KERNELS``.
    """

    name: str
    count: int
    sizes: str
    grouped: bool
    work: float
    flops: float
    floor: float
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Roofs:
    """What bounds the speed of a convolution on a device.

    Attributes:
        bandwidth: bytes per second of a large copy, read plus written.
        compute: FLOP/s of a large dense 1x1 convolution.
    """

    bandwidth: float
    compute: float

    def attainable(self, work: float) -> float:
        """Return the highest FLOP/s at ``work`` FLOP per byte."""
        return min(self.compute, self.bandwidth * work)

    @property
    def ridge(self) -> float:
        """FLOP per byte above which arithmetic takes longer than moving the bytes."""
        return self.compute / self.bandwidth


@cache
def compute_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large dense 1x1 convolution, which is a product of matrices."""
    channels, side = (4096, 64) if device.type == "cuda" else (1024, 32)
    x = torch.randn(1, channels, side, side, dtype=dtype, device=device)
    weight = torch.randn(channels, channels, 1, 1, dtype=dtype, device=device)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        seconds = time_together({"": [lambda: F.conv2d(x, weight)]}, device)[""].p50
    return 2 * channels**2 * side**2 / seconds


def roofs_of(device: torch.device, dtype: torch.dtype) -> Roofs:
    """Return the speeds of memory and arithmetic of a device, measured at the first use."""
    return Roofs(copy_speed(device), compute_speed(device, dtype))


def device_name(device: torch.device) -> str:
    """Return the name of a device, such as "NVIDIA H200" or "CPU (x86_64, 2 cores)"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {os.cpu_count()} cores)" if device.type == "cpu" else device.type


def draw_times(
    path: str | PathLike[str], layers: Sequence[LayerTimes], title: str, subtitle: str, dark: bool
) -> Path:
    """Draw a cluster of bars for each layer, with a mark at its memory floor.

    Args:
        path: the file to write.
        layers: from top to bottom.
        title, subtitle: the lines above the plot.
        dark: whether to draw for a dark background.
    """
    longest = max(max(layer.floor, *layer.seconds.values()) for layer in layers)
    scale, unit = _unit(longest)
    heights = [BAR * len(layer.seconds) + GAP for layer in layers]
    with new_figure(path, 1.1 + sum(heights), title, subtitle, dark) as (figure, theme):
        axes = figure.subplots()
        for layer, bottom, height in zip(layers, accumulate(heights), heights, strict=True):
            _draw_layer(axes, theme, bottom - height / 2, layer, scale)
        kinds = {(series, layer.grouped) for layer in layers for series in layer.seconds}
        for series, grouped in KINDS:
            if (series, grouped) in kinds:
                axes.barh(0, 0, label=_label(series, grouped), **_bar(theme, series, grouped))
        axes.plot([], [], color=theme.text, linewidth=1.6, label="memory floor")
        axes.set(xlim=(0, 1.2 * longest / scale), ylim=(sum(heights), 0), yticks=[])
        axes.set(xlabel=f"time per call in {unit} (and as a multiple of the memory floor)")
        axes.grid(axis="x")
        add_legend(figure, axes, columns=3)
    return Path(path)


def _draw_layer(axes: Axes, theme: Theme, y: float, layer: LayerTimes, scale: float) -> None:
    """Draw the bars, the floor and the names of a layer around the height ``y``, which is in inches."""
    top = y - BAR * len(layer.seconds) / 2
    for i, (series, seconds) in enumerate(layer.seconds.items()):
        middle = top + (i + 0.5) * BAR
        axes.barh(middle, seconds / scale, 0.9 * BAR, **_bar(theme, series, layer.grouped))
        text = f"{_number(seconds / scale)}  ({seconds / layer.floor:.1f}x)"
        end = max(seconds, layer.floor) / scale
        axes.annotate(text, (end, middle), (4, 0), textcoords="offset points", va="center", fontsize=TINY)
    bottom = top + BAR * len(layer.seconds)
    axes.plot([layer.floor / scale] * 2, [top - 0.03, bottom + 0.03], color=theme.text, linewidth=1.6)
    times = f"  \N{MULTIPLICATION SIGN}{layer.count}" if layer.count > 1 else ""
    for text, dy, style in (
        (_shortened(layer.name) + times, 4.6, {"fontsize": SMALL}),
        (layer.sizes, -4.6, {"fontsize": TINY, "color": theme.muted}),
    ):
        axes.annotate(
            text, (0, y), (-5, dy), xycoords=axes.get_yaxis_transform(), textcoords="offset points",
            ha="right", va="center", parse_math=False, **style,
        )  # fmt: skip


def draw_roofline(
    path: str | PathLike[str],
    layers: Sequence[LayerTimes],
    roofs: Roofs,
    title: str,
    subtitle: str,
    dark: bool,
) -> Path:
    """Draw the FLOP/s of each layer below the FLOP/s that memory and arithmetic allow.

    Args:
        path: the file to write.
        layers: the layers; a layer without times is drawn at the highest speed that it could reach.
        roofs: the bounds of the device.
        title, subtitle: the lines above the plot.
        dark: whether to draw for a dark background.
    """
    points: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    for layer in layers:
        for series, seconds in layer.seconds.items():
            points.setdefault((series, layer.grouped), []).append((layer.work, layer.flops / seconds))
    works = [roofs.ridge, *(layer.work for layer in layers)]
    left, right = min(works) / 2.5, max(works) * 2.5
    speeds = [roofs.attainable(left), *(speed for found in points.values() for _, speed in found)]
    with new_figure(path, 4.2, title, subtitle, dark) as (figure, theme):
        from matplotlib.ticker import LogLocator, NullLocator

        axes = figure.subplots()
        axes.set(
            xscale="log",
            yscale="log",
            xlim=(left, right),
            ylim=(min(speeds) / 1.6, 2.5 * max(roofs.compute, *speeds)),
        )
        for series, grouped in KINDS:
            if found := points.get((series, grouped)):
                style = _point(theme, series, grouped)
                axes.plot(*zip(*found, strict=True), linestyle="", label=_label(series, grouped), **style)
        for layer in layers:
            if not layer.seconds:
                _draw_bound(axes, theme, layer, roofs)
        _draw_roofs(axes, theme, roofs)
        axes.set(xlabel="arithmetic intensity: FLOP per byte of input, weight and output")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
            axis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: _number(value))
        axes.yaxis.set_major_formatter(lambda value, _: f"{prefixed(value, 'FLOP')}/s")
        axes.grid()
        add_legend(figure, axes, columns=2)
    return Path(path)


def _draw_roofs(axes: Axes, theme: Theme, roofs: Roofs) -> None:
    """Draw the slope of memory and the roof of arithmetic, and shade where memory is the limit."""
    left, right = axes.get_xlim()
    corners = [left, roofs.ridge, right]
    copy, compute = prefixed(roofs.bandwidth, "B"), prefixed(roofs.compute, "FLOP")
    speeds = f"copy at {copy}/s, dense convolution at {compute}/s"
    bounds = list(map(roofs.attainable, corners))
    axes.plot(corners, bounds, color=theme.text, linewidth=1.6, label=f"bound: {speeds}")
    axes.axvspan(left, roofs.ridge, color=theme.grid, alpha=0.3, linewidth=0)
    top = axes.get_ylim()[1]
    for text, dx, side in (("memory bound", -6, "right"), ("compute bound", 6, "left")):
        axes.annotate(
            text, (roofs.ridge, top), (dx, -5), textcoords="offset points", ha=side, va="top",
            color=theme.muted,
        )  # fmt: skip


def _draw_bound(axes: Axes, theme: Theme, layer: LayerTimes, roofs: Roofs) -> None:
    """Draw the highest speed that a layer could reach, and its time at that speed."""
    most = roofs.attainable(layer.work)
    axes.plot([layer.work] * 2, [axes.get_ylim()[0], most], color=theme.gconv, linestyle=":")
    axes.plot(layer.work, most, linestyle="", label="this layer at best", **_point(theme, KERNELS, True))
    bound, seconds = "memory" if layer.work < roofs.ridge else "compute", layer.flops / most
    scale, unit = _unit(seconds)
    lines = [
        f"{layer.work:.3g} FLOP/byte: {bound} bound",
        f"at most {prefixed(most, 'FLOP')}/s",
        f"at least {_number(seconds / scale)} {unit} per pass",
    ]
    axes.annotate("\n".join(lines), (layer.work, axes.get_ylim()[0]), (8, 10), textcoords="offset points")


def _bar(theme: Theme, series: str, grouped: bool) -> dict[str, Any]:
    """Return how to draw a bar of a series."""
    faint = {"alpha": 0.55} if series == PYTORCH_CHANNELS_LAST else {}
    return {"color": _color(theme, series, grouped), **faint}


def _point(theme: Theme, series: str, grouped: bool) -> dict[str, Any]:
    """Return how to draw a point of a series."""
    marker = {PYTORCH: "o", PYTORCH_CHANNELS_LAST: "s", KERNELS: "D"}[series]
    return {"color": _color(theme, series, grouped), "marker": marker, "markersize": 6, "alpha": 0.85}


def _color(theme: Theme, series: str, grouped: bool) -> str:
    return theme.gconv if series == KERNELS else theme.pytorch if grouped else theme.other


def _label(series: str, grouped: bool) -> str:
    return series if grouped else f"{series}, dense layers"


def _unit(seconds: float) -> tuple[float, str]:
    """Return the largest unit, in seconds, that is no longer than a time, and its name."""
    return next(unit for unit in UNITS if seconds >= unit[0] or unit == UNITS[-1])


def _number(value: float) -> str:
    """Format a number with three digits, or more if it is 1,000 or larger."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _shortened(name: str) -> str:
    """Return the end of a name, which tells similar layers apart."""
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"
