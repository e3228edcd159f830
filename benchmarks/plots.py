"""Pictures for a report."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.peers import DEPTHWISE
from benchmarks.store import TableRow
from benchmarks.summary import Comparison
from gconv.geometry import PASSES

COLOURS = {
    "gconv": "#1b7f79",
    "fused": "#16405b",
    "F.conv2d": "#c44e52",
    "torch.compile": "#dd9a52",
    "other depthwise kernels": "#8172b3",
    "resnet50": "#7f7f7f",
}
BARS = {
    "F.conv2d": ["F.conv2d"],
    "torch.compile": ["torch.compile"],
    "other depthwise kernels": DEPTHWISE,
}
WHISKER = {"error_kw": {"elinewidth": 0.8, "ecolor": "black"}}
DPI = 120


def draw_layers(cases: Sequence[Comparison], folder: Path, where: str) -> list[Path]:
    """Draw two pictures for each suite, batch and type: times, and fractions of the floor's speed."""

    def key(case: Comparison) -> tuple:
        return case.suite, case.batch, case.type

    paths = []
    for (suite, batch, type_), group in groupby(sorted(cases, key=key), key=key):
        of_group, name = list(group), f"{suite}-{type_}-{batch}"
        title = f"{suite}, batch {batch}, {type_}, {where}"
        paths.append(_draw_times(of_group, folder / f"time-{name}.png", title))
        paths.append(_draw_fractions(of_group, folder / f"floor-{name}.png", title))
    return paths


def _draw_times(cases: Sequence[Comparison], path: Path, title: str) -> Path:
    """Draw a panel for each pass, with a cluster of bars for each layer and a line for the floor.

    A thin line at the end of a bar reaches from p20 to p80. "tie" says that gconv's overlaps the best peer's.
    """
    passes = [p for p in PASSES if any(case.pass_ == p for case in cases)]
    layers = list(dict.fromkeys(case.layer for case in cases))
    shown = [runner for runner, rows in _bars(cases).items() if any(rows)]
    size = (2 + 3.6 * len(passes), 2.4 + 0.5 * len(layers))
    figure, panels = plt.subplots(
        1, len(passes), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axes, pass_ in zip(panels[0], passes, strict=True):
        found = {case.layer: case for case in cases if case.pass_ == pass_}
        _draw_pass(axes, [found.get(layer) for layer in layers], shown)
        axes.set(title=pass_, xlabel="microseconds, log scale", xscale="log")
        axes.margins(x=0.1)  # room for "tie"
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", labelsize=7)
        _name_layers(axes, layers)
    figure.legend(
        *panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
    )
    return _save(figure, path, title)


def _draw_pass(axes: Axes, cases: Sequence[Comparison | None], shown: Sequence[str]) -> None:
    """Draw the bars of the runners ``shown``, floors and ties; a case is None if it was not measured."""
    bars = _bars(cases)
    for i, runner in enumerate(shown):
        at = np.arange(len(cases)) + 0.78 * ((i + 0.5) / len(shown) - 0.5)
        rows, height = bars[runner], 0.72 / len(shown)
        lengths = [np.nan if row is None else row["p50"] for row in rows]
        axes.barh(at, lengths, height, xerr=_errors(rows), color=COLOURS[runner], label=runner, **WHISKER)
    for place, case in enumerate(cases):
        if case is None:
            continue
        floor = next(iter(case.rows.values()))["floor"]
        axes.plot([floor] * 2, [place - 0.42, place + 0.42], color="black", linewidth=1.5)
        if case.speedup is not None and case.speedup.tie:
            above = place + 0.39 * (1 / len(shown) - 1)  # gconv's bar is the first
            axes.text(1.05 * case.ours["p80"], above, "tie", fontsize=7, verticalalignment="center")
    axes.plot([], [], color="black", linewidth=1.5, label="memory floor")


def _bars(cases: Sequence[Comparison | None]) -> dict[str, list[TableRow | None]]:
    """Return each case's row, by runner."""
    peers = {name: [case and case.best(runners) for case in cases] for name, runners in BARS.items()}
    return {"gconv": [case and case.ours for case in cases], **peers}


def _errors(rows: Sequence[TableRow | None]) -> list[list[float]]:
    """Return how far p20 and p80 are from the median, in matplotlib's format."""
    there = [row or dict.fromkeys(("p20", "p50", "p80"), np.nan) for row in rows]
    return [[row["p50"] - row["p20"] for row in there], [row["p80"] - row["p50"] for row in there]]


def _draw_fractions(cases: Sequence[Comparison], path: Path, title: str) -> Path:
    """Draw how much of the floor's speed each layer reaches, with the passes side by side."""
    passes = [p for p in PASSES if any(case.pass_ == p for case in cases)]
    layers = list(dict.fromkeys(case.layer for case in cases))
    figure, axes = plt.subplots(figsize=(8, 1.6 + 0.5 * len(layers)), layout="constrained")
    for i, pass_ in enumerate(passes):
        found = {case.layer: case.fraction for case in cases if case.pass_ == pass_}
        lengths = [100 * (found.get(layer) or np.nan) for layer in layers]
        axes.barh(np.arange(len(layers)) + 0.26 * (i - 1), lengths, 0.24, label=pass_)
    axes.axvline(100, color="black", linewidth=1.5, label="a copy")
    axes.set(xlabel="% of the speed of a copy of the same bytes")
    _name_layers(axes, layers)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return _save(figure, path, title)


def draw_networks(rows: Sequence[TableRow], folder: Path, where: str) -> Path:
    """Draw images/s of each network in its best mode: with gconv, fused, with F.conv2d; and ResNet-50's."""
    best = _best_modes(rows)
    figure, panels = plt.subplots(
        1, len(best), figsize=(1.5 + 3.8 * len(best), 3.6), layout="constrained", squeeze=False
    )
    for axes, ((task, batch, image), found) in zip(panels[0], best.items(), strict=True):
        names = sorted(found, key=lambda name: (name[0] == "resnet50", name[0], list(COLOURS).index(name[1])))
        colours = [COLOURS["resnet50" if name[0] == "resnet50" else name[1]] for name in names]
        speeds = [found[n]["images_per_second"] for n in names]
        # p80 of the time is the slow end of the speed
        ends = [[found[n]["batch"] * 1e3 / found[n][end] for n in names] for end in ("p80", "p20")]
        reach = np.abs(np.array(ends) - speeds) if names else None
        bars = axes.barh(range(len(names)), speeds, xerr=reach, color=colours, **WHISKER)
        axes.bar_label(bars, [f"{found[n]['images_per_second']:,.0f}" for n in names], padding=3, fontsize=8)
        labels = [f"{n[0]}\n{n[1]}, {found[n]['mode']},\n{found[n]['layout']}" for n in names]
        axes.set_yticks(range(len(names)), labels, fontsize=8)
        axes.set(title=f"{task}, batch {batch}, {image}x{image}", xlabel="images/s")
        axes.invert_yaxis()
        axes.margins(x=0.2)
    return _save(figure, folder / "networks.png", f"each in its best mode, {where}")


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
    axes.grid(axis="x", alpha=0.3)


def _save(figure: plt.Figure, path: Path, title: str) -> Path:
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path
