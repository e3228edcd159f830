"""Plots of measurements: layers and networks for a report, and the README's images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.peers import DEPTHWISE
from benchmarks.store import TableRow
from benchmarks.summary import Comparison
from gconv.geometry import PASSES
from gconv.measure.figures import SMALL, TINY, Theme, add_legend, new_figure

BARS = {
    "F.conv2d": ["F.conv2d"],
    "torch.compile": ["torch.compile"],
    "other depthwise kernels": DEPTHWISE,
}
# Attributes of a theme, by what is drawn.
COLORS = {
    "gconv": "gconv",
    "fused": "fused",
    "F.conv2d": "pytorch",
    "torch.compile": "compiled",
    "other depthwise kernels": "depthwise",
    "resnet50": "other",
    "forward": "gconv",
    "input_grad": "pytorch",
    "weight_grad": "depthwise",
}
PASS_NAMES = {"forward": "forward", "input_grad": "input gradient", "weight_grad": "weight gradient"}


@dataclass(frozen=True)
class PassTime:
    """The time of one pass of a layer on gconv's kernels and on cuDNN, in microseconds.

    Args:
        layer, pass_: what was run.
        floor: the memory floor.
        gconv, cudnn: the times.
    """

    layer: str
    pass_: str
    floor: float
    gconv: float
    cudnn: float


def draw_headline(times: Sequence[PassTime], path: Path, title: str, where: str, dark: bool) -> Path:
    """Draw a panel for each pass: each layer's times on cuDNN and gconv, as multiples of its memory floor.

    The multiples put all layers on one scale, although their times differ 20-fold. Labels give microseconds.
    """
    layers = list(dict.fromkeys(time.layer for time in times))
    passes = [p for p in PASSES if any(time.pass_ == p for time in times)]
    most = max(max(time.gconv, time.cudnn) / time.floor for time in times)
    with new_figure(path, 1.35 + 0.4 * len(layers), title, where, dark) as (figure, theme):
        panels = figure.subplots(1, len(passes), sharey=True, squeeze=False)[0]
        for axes, pass_ in zip(panels, passes, strict=True):
            for time in times:
                if time.pass_ == pass_:
                    _draw_pair(axes, theme, layers.index(time.layer), time)
            axes.axvline(1, color=theme.text, linewidth=1.4, label="memory floor")
            axes.set(title=PASS_NAMES[pass_], xlim=(0, 1.18 * most), ylim=(len(layers) - 0.5, -0.5))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
            axes.set_xticks(range(int(most) + 2))
            axes.grid(axis="x")
            axes.spines.bottom.set_visible(False)
            for name, color in (("cuDNN", theme.pytorch), ("gconv's kernels", theme.gconv)):
                axes.barh(0, 0, color=color, label=name)
        panels[0].set_yticks(range(len(layers)), layers)
        panels[0].annotate(
            "channels/groups, output", (0, 1), (-5, 3), xycoords="axes fraction", textcoords="offset points",
            ha="right", fontsize=TINY, color=theme.muted,
        )  # fmt: skip
        panels[len(panels) // 2].set_xlabel("time as a multiple of the memory floor (numbers: µs)")
        add_legend(figure, panels[0])
    return path


def _draw_pair(axes: Axes, theme: Theme, place: int, time: PassTime) -> None:
    """Draw the bars of cuDNN and, below it, gconv, with the microseconds at their ends."""
    for y, value, color in (
        (place - 0.19, time.cudnn, theme.pytorch),
        (place + 0.19, time.gconv, theme.gconv),
    ):
        axes.barh(y, value / time.floor, 0.36, color=color)
        end = value / time.floor, y
        axes.annotate(f"{value:.0f}", end, (3, 0), textcoords="offset points", va="center", fontsize=TINY)


def draw_layers(cases: Sequence[Comparison], folder: Path, where: str) -> list[Path]:
    """Draw two plots for each suite, batch and type: times, and fractions of a copy's speed."""

    def key(case: Comparison) -> tuple:
        return case.suite, case.batch, case.type

    paths = []
    for (suite, batch, type_), group in groupby(sorted(cases, key=key), key=key):
        of_group, name = list(group), f"{suite}-{type_}-{batch}"
        lines = f"{suite}, batch {batch}, {type_}", where
        paths.append(_draw_times(of_group, folder / f"time-{name}.png", *lines))
        paths.append(_draw_fractions(of_group, folder / f"floor-{name}.png", *lines))
    return paths


def _draw_times(cases: Sequence[Comparison], path: Path, title: str, where: str) -> Path:
    """Draw a panel for each pass, with a cluster of bars for each layer and a line for its memory floor.

    A thin line at the end of a bar reaches from p20 to p80. "tie" means that gconv's range and that of the
    best other implementation overlap.
    """
    passes = [p for p in PASSES if any(case.pass_ == p for case in cases)]
    layers = list(dict.fromkeys(case.layer for case in cases))
    shown = [runner for runner, rows in _bars(cases).items() if any(rows)]
    height = 1.3 + (0.16 + 0.12 * len(shown)) * len(layers)
    with new_figure(path, height, title, where) as (figure, theme):
        panels = figure.subplots(1, len(passes), sharey=True, squeeze=False)[0]
        for axes, pass_ in zip(panels, passes, strict=True):
            found = {case.layer: case for case in cases if case.pass_ == pass_}
            axes.set(title=PASS_NAMES[pass_], xscale="log")
            _draw_pass(axes, theme, [found.get(layer) for layer in layers], shown)
            axes.margins(x=0.12)  # room for "tie"
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
            _name_layers(axes, layers)
        panels[len(panels) // 2].set_xlabel("µs, log scale")
        add_legend(figure, panels[0])
    return path


def _draw_pass(axes: Axes, theme: Theme, cases: Sequence[Comparison | None], shown: Sequence[str]) -> None:
    """Draw the bars of the runners ``shown``, floors and ties; a case is None if it wasn't measured."""
    bars = _bars(cases)
    for i, runner in enumerate(shown):
        at = np.arange(len(cases)) + 0.78 * ((i + 0.5) / len(shown) - 0.5)
        rows, height = bars[runner], 0.72 / len(shown)
        lengths = [np.nan if row is None else row["p50"] for row in rows]
        color = getattr(theme, COLORS[runner])
        axes.barh(at, lengths, height, xerr=_errors(rows), color=color, label=runner, **_whisker(theme))
    for place, case in enumerate(cases):
        if case is None:
            continue
        floor = next(iter(case.rows.values()))["floor"]
        axes.plot([floor] * 2, [place - 0.42, place + 0.42], color=theme.text, linewidth=1.5)
        if case.speedup is not None and case.speedup.tie:
            above = place + 0.39 * (1 / len(shown) - 1)  # gconv's bar is the first
            axes.text(1.05 * case.ours["p80"], above, "tie", fontsize=TINY, verticalalignment="center")
    axes.plot([], [], color=theme.text, linewidth=1.5, label="memory floor")


def _bars(cases: Sequence[Comparison | None]) -> dict[str, list[TableRow | None]]:
    """Return each case's row, by runner."""
    peers = {name: [case and case.best(runners) for case in cases] for name, runners in BARS.items()}
    return {"gconv": [case and case.ours for case in cases], **peers}


def _errors(rows: Sequence[TableRow | None]) -> list[list[float]]:
    """Return how far p20 and p80 are from the median, in matplotlib's format."""
    there = [row or dict.fromkeys(("p20", "p50", "p80"), np.nan) for row in rows]
    return [[row["p50"] - row["p20"] for row in there], [row["p80"] - row["p50"] for row in there]]


def _draw_fractions(cases: Sequence[Comparison], path: Path, title: str, where: str) -> Path:
    """Draw the fraction of a copy's speed that each layer reaches, with the passes next to each other."""
    passes = [p for p in PASSES if any(case.pass_ == p for case in cases)]
    layers = list(dict.fromkeys(case.layer for case in cases))
    with new_figure(path, 1.3 + 0.45 * len(layers), title, where) as (figure, theme):
        axes = figure.subplots()
        for i, pass_ in enumerate(passes):
            found = {case.layer: case.fraction for case in cases if case.pass_ == pass_}
            lengths = [100 * (found.get(layer) or np.nan) for layer in layers]
            color = getattr(theme, COLORS[pass_])
            places = np.arange(len(layers)) + 0.26 * (i - 1)
            axes.barh(places, lengths, 0.24, color=color, label=PASS_NAMES[pass_])
        axes.axvline(100, color=theme.text, linewidth=1.5, label="a copy")
        axes.set(xlabel="% of the speed of a copy of the same bytes")
        _name_layers(axes, layers)
        add_legend(figure, axes)
    return path


def draw_networks(rows: Sequence[TableRow], folder: Path, where: str) -> Path:
    """Draw images/s of each network in its fastest mode: on gconv, fused, on F.conv2d; and of ResNet-50."""
    best, path = _best_modes(rows), folder / "networks.png"
    names = [sorted(found, key=_place) for found in best.values()]
    height = 1.1 * len(best) + 0.34 * sum(map(len, names))
    with new_figure(path, height, "images/s, each in its fastest mode", where) as (figure, theme):
        ratios = [max(1, len(of_panel)) for of_panel in names]
        panels = figure.subplots(len(best), 1, squeeze=False, height_ratios=ratios)[:, 0]
        for axes, ((task, batch, image), found), of_panel in zip(panels, best.items(), names, strict=True):
            _draw_speeds(axes, theme, {name: found[name] for name in of_panel})
            axes.set(title=f"{task}, batch {batch}, {image}x{image}", xlabel="images/s")
    return path


def _draw_speeds(axes: Axes, theme: Theme, rows: Mapping[tuple[str, str], TableRow]) -> None:
    """Draw a bar for each network and runner, with a thin line from p20 to p80."""
    colors = [getattr(theme, COLORS[_kind(name)]) for name in rows]
    speeds = [row["images_per_second"] for row in rows.values()]
    # p80 of the time is the slow end of the speed
    ends = [[row["batch"] * 1e3 / row[end] for row in rows.values()] for end in ("p80", "p20")]
    reach = np.abs(np.array(ends) - speeds) if rows else None
    bars = axes.barh(range(len(rows)), speeds, 0.7, xerr=reach, color=colors, **_whisker(theme))
    axes.bar_label(bars, [f"{speed:,.0f}" for speed in speeds], padding=3, fontsize=SMALL)
    labels = [f"{name[0]}, {name[1]}\n{row['mode']}, {row['layout']}" for name, row in rows.items()]
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.grid(axis="x")


def _place(name: tuple[str, str]) -> tuple:
    """Return the order of a network and runner: by network, ResNet-50 last, then by runner."""
    return name[0] == "resnet50", name[0], list(COLORS).index(name[1])


def _kind(name: tuple[str, str]) -> str:
    return "resnet50" if name[0] == "resnet50" else name[1]


def _best_modes(rows: Sequence[TableRow]) -> dict[tuple, dict[tuple[str, str], TableRow]]:
    """Return, for each task, batch and image size, the fastest row of each network and runner."""
    best: dict[tuple, dict[tuple[str, str], TableRow]] = {}
    for row in rows:
        if row["images_per_second"] is not None:
            of_panel = best.setdefault((row["task"], row["batch"], row["image"]), {})
            name = row["network"], row["runner"]
            if name not in of_panel or of_panel[name]["images_per_second"] < row["images_per_second"]:
                of_panel[name] = row
    return best or {("nothing", 0, 0): {}}


def _name_layers(axes: Axes, layers: Sequence[str]) -> None:
    axes.set_yticks(range(len(layers)), layers)
    if not axes.yaxis_inverted():
        axes.invert_yaxis()
    axes.grid(axis="x")


def _whisker(theme: Theme) -> dict[str, Any]:
    return {"error_kw": {"elinewidth": 0.8, "ecolor": theme.text}}
