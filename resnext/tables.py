"""What the command line lays out in tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from rich.table import Table

import gconv
from resnext import complexity, measured
from resnext.comparison import Compared


def of_structure(size: int, networks: dict[str, list[complexity.Stage]]) -> Table:
    """Networks of the same stages side by side, a column each."""
    table = Table(title=f"{size} x {size} pixels", show_lines=True, show_footer=True)
    table.add_column("stage", "total")
    table.add_column("output", justify="right")
    for name, stages in networks.items():
        table.add_column(name, _cost(sum(s.parameters for s in stages), sum(s.flops for s in stages)))
    for row in zip(*networks.values(), strict=True):
        cells = []
        for stage in row:
            wide = max(map(len, stage.layers))
            lines = [f"{layer:<{wide}}" for layer in stage.layers]
            if stage.repeats > 1:
                lines[len(lines) // 2] += f"  x {stage.repeats}"
            cells.append("\n".join([*lines, _cost(stage.parameters, stage.flops)]))
        table.add_row(row[0].name, side(row[0]), *cells)
    return table


def side(stage: complexity.Stage) -> str:
    """Such as "56 x 56"."""
    return " x ".join(map(str, stage.output[1:] or (1, 1)))


def _cost(parameters: int, flops: int) -> str:
    return f"{parameters:,} params\n{flops / 1e9:.3f} GFLOPs"


def of_traffic(title: str, rows: list[complexity.StageTraffic]) -> Table:
    """Megabytes by stage, unfused and fused."""
    table = Table(title=title, show_footer=True)
    headings = ("stage", "inference", "fused", "saved", "training", "fused", "saved")
    for heading, footer in zip(headings, _cells(complexity.total_traffic(rows)), strict=True):
        table.add_column(heading, footer, justify="left" if heading == "stage" else "right")
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _cells(stage: complexity.StageTraffic) -> list[str]:
    cells = [stage.name]
    for pair in _PAIRS:
        before, after = (getattr(stage, form).total for form in pair)
        saved = f"{1 - after / before:.0%}" if after < before else ""
        cells += [f"{before / 1e6:.1f}", f"{after / 1e6:.1f}", saved]
    return cells


_PAIRS = (("inference", "fused_inference"), ("training", "fused_training"))


def of_times(
    title: str, rows: list[complexity.StageTraffic], times: list[measured.StageTimes], device: torch.device
) -> Iterator[Table]:
    """Microseconds by stage: those of a copy of as many bytes, and those that the profiler measured."""
    layer, image = gconv.GroupConv2d(8, 8, 3, groups=2, device=device), torch.zeros(1, 8, 3, 3, device=device)
    speed = gconv.explain(layer, image).copy_speed
    total = complexity.total_traffic(rows)
    for pair in _PAIRS:
        what = f"{title}, {pair[0]}: microseconds an image, a copy moving {speed / 1e9:,.0f} GB/s"
        table = Table(title=what, show_footer=True)
        table.add_column("stage", "total")
        for form, name in zip(pair, ("unfused", "fused"), strict=True):
            copied, took = getattr(total, form).total / speed, sum(getattr(stage, form) for stage in times)
            table.add_column(f"{name}, a copy", _microseconds(copied), justify="right")
            table.add_column("measured", _microseconds(took), justify="right")
        for row, time in zip(rows, times, strict=True):
            cells = []
            for form in pair:
                cells += [getattr(row, form).total / speed, getattr(time, form)]
            table.add_row(row.name, *map(_microseconds, cells))
        yield table


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.2f}"


def of_study(title: str, compared: Sequence[Compared]) -> Table:
    """Pairs of cardinality and width with their errors, beside the paper's."""
    table = Table(title=title)
    headings = ("C", "d", "parameters", "MFLOPs", "error", "deviation", "of each seed", "paper, ImageNet")
    for heading in headings:
        table.add_column(heading, justify="right")
    for pair in compared:
        paper = complexity.PAPER_ERRORS.get(pair.cardinality)
        table.add_row(
            str(pair.cardinality),
            str(pair.width),
            f"{pair.parameters:,}",
            f"{pair.flops / 1e6:.2f}",
            f"{pair.mean:.2f}%",
            "" if pair.deviation is None else f"{pair.deviation:.2f}",
            ", ".join(f"{error:.2f}" for error in pair.errors.values()),
            f"{paper[0]}%" if paper else "",
        )
    return table
