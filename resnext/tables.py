"""The tables that the command line prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, repeat
from typing import Any

import torch
from rich.table import Table

import gconv
from resnext import complexity, measured
from resnext.comparison import Compared

MOST_ROWS = 30  # classes in a table
_PAIRS = (("inference", "fused_inference"), ("training", "fused_training"))


def table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    footer: Sequence[str] = (),
    left: Sequence[str] = (),
    lines: bool = False,
) -> Table:
    """Return a table of text cells.

    Args:
        headings: a heading for each column.
        rows: cells of each row, at most one for each column.
        title: title above the table. Defaults to None.
        footer: cells of a last row. Defaults to none.
        left: headings of the left-aligned columns; the others are aligned right. Defaults to none.
        lines: whether to separate rows by lines. Defaults to False.
    """
    made = Table(title=title, show_footer=bool(footer), show_lines=lines)
    for heading, below in zip(headings, chain(footer, repeat("")), strict=False):
        made.add_column(heading, below, justify="left" if heading in left else "right")
    for row in rows:
        made.add_row(*row)
    return made


def of_structure(size: int, networks: dict[str, list[complexity.Stage]]) -> Table:
    """Return the structure table of networks, with a column for each network."""
    totals = (_cost(sum(s.parameters for s in of), sum(s.flops for s in of)) for of in networks.values())
    rows = (
        (stages[0].name, side(stages[0]), *map(_layers, stages))
        for stages in zip(*networks.values(), strict=True)
    )
    return table(
        ("stage", "output", *networks),
        rows,
        title=f"{size} x {size} pixels",
        footer=("total", "", *totals),
        left=("stage", *networks),
        lines=True,
    )


def _layers(stage: complexity.Stage) -> str:
    """Return the layers of a stage, one a line, with the repeats in the middle line, and its cost."""
    wide = max(map(len, stage.layers))
    lines = [f"{layer:<{wide}}" for layer in stage.layers]
    if stage.repeats > 1:
        lines[len(lines) // 2] += f"  x {stage.repeats}"
    return "\n".join([*lines, _cost(stage.parameters, stage.flops)])


def side(stage: complexity.Stage) -> str:
    """Return the output size of a stage, such as "56 x 56"."""
    return " x ".join(map(str, stage.output[1:] or (1, 1)))


def _cost(parameters: int, flops: int) -> str:
    return f"{parameters:,} params\n{flops / 1e9:.3f} GFLOPs"


def of_complexity(networks: Mapping[tuple[int, int], list[complexity.Stage]]) -> Table:
    """Return tables 2 and 3 of the paper: 50-layer networks of about equal cost by cardinality and width."""
    of_block, of_net = ("block params", "block GFLOPs"), ("net params", "net GFLOPs")
    headings = ("C", "d", "width", *of_block, *of_net, "error 50", "error 101")
    title = "cardinality against width, at the complexity of ResNeXt-50 (32 x 4d)"
    return table(headings, (_complexity(c, d, of) for (c, d), of in networks.items()), title=title)


def _complexity(cardinality: int, width: int, stages: list[complexity.Stage]) -> Sequence[str]:
    parameters, flops = complexity.block_complexity(cardinality, width)
    return (
        str(cardinality),
        str(width),
        str(cardinality * width),
        f"{parameters:,}",
        f"{flops / 1e9:.3f}",
        f"{sum(s.parameters for s in stages) / 1e6:.1f} M",
        f"{sum(s.flops for s in stages) / 1e9:.2f}",
        *(f"{error}%" for error in complexity.PAPER_ERRORS.get(cardinality, ())),
    )


def of_traffic(title: str, rows: list[complexity.StageTraffic]) -> Table:
    """Return the memory traffic of each stage in megabytes, unfused and fused."""
    headings = ("stage", "inference", "fused", "saved", "training", "fused", "saved")
    footer = _megabytes(complexity.total_traffic(rows))
    return table(headings, map(_megabytes, rows), title=title, footer=footer, left=("stage",))


def _megabytes(stage: complexity.StageTraffic) -> list[str]:
    cells = [stage.name]
    for pair in _PAIRS:
        before, after = (getattr(stage, form).total for form in pair)
        saved = f"{1 - after / before:.0%}" if after < before else ""
        cells += [f"{before / 1e6:.1f}", f"{after / 1e6:.1f}", saved]
    return cells


def of_times(
    title: str, rows: list[complexity.StageTraffic], times: list[measured.StageTimes], device: torch.device
) -> Iterator[Table]:
    """Yield tables of the time of each stage in microseconds: of a copy of as many bytes, and measured."""
    layer, image = gconv.GroupConv2d(8, 8, 3, groups=2, device=device), torch.zeros(1, 8, 3, 3, device=device)
    speed = gconv.explain(layer, image).copy_speed
    headings = ("stage", "unfused: copy", "measured", "fused: copy", "measured")
    total = complexity.total_traffic(rows)
    for pair in _PAIRS:
        took = {form: sum(getattr(stage, form) for stage in times) for form in pair}
        yield table(
            headings,
            (
                (row.name, *_microseconds(pair, row, speed, {form: getattr(time, form) for form in pair}))
                for row, time in zip(rows, times, strict=True)
            ),
            title=f"{title}, {pair[0]}: microseconds per image; a copy moves {speed / 1e9:,.0f} GB/s",
            footer=("total", *_microseconds(pair, total, speed, took)),
            left=("stage",),
        )


def _microseconds(
    pair: Sequence[str], stage: complexity.StageTraffic, speed: float, seconds: Mapping[str, float]
) -> Iterator[str]:
    """Yield, unfused and then fused, the time of a copy of the stage's bytes and the measured time."""
    for form in pair:
        for value in (getattr(stage, form).total / speed, seconds[form]):
            yield f"{value * 1e6:.2f}"


def of_study(title: str, compared: Sequence[Compared]) -> Table:
    """Return the networks of a study with their errors, next to the errors of the paper."""
    headings = ("C", "d", "parameters", "MFLOPs", "error", "deviation", "each seed", "paper, ImageNet")
    return table(headings, map(_compared, compared), title=title)


def _compared(pair: Compared) -> Sequence[str]:
    paper = complexity.PAPER_ERRORS.get(pair.cardinality)
    return (
        str(pair.cardinality),
        str(pair.width),
        f"{pair.parameters:,}",
        f"{pair.flops / 1e6:.2f}",
        f"{pair.mean:.2f}%",
        "" if pair.deviation is None else f"{pair.deviation:.2f}",
        ", ".join(f"{error:.2f}" for error in pair.errors.values()),
        f"{paper[0]}%" if paper else "",
    )


def of_classes(title: str, rows: list[dict[str, Any]]) -> Table:
    """Return the results for each class, or for the ``MOST_ROWS`` worst if there are more.

    Args:
        title: title of the table.
        rows: rows with the keys "class", "images", "right", "accuracy" and "mistaken for".
    """
    headings = tuple(rows[0])
    if len(rows) > MOST_ROWS:
        title += f"; the {MOST_ROWS} worst of {len(rows)} classes"
        tested = [row for row in rows if row["images"]]
        rows = sorted(tested, key=lambda row: row["accuracy"])[:MOST_ROWS]
    shown = (row | {"accuracy": f"{row['accuracy']:.1f}%" if row["images"] else ""} for row in rows)
    cells = (list(map(str, row.values())) for row in shown)
    return table(headings, cells, title=title, left=("class", "mistaken for"))


def of_guesses(entries: Sequence[Mapping[str, Any]], width: int) -> Table:
    """Return a row for each image, with ``width`` guesses, or with the error if it is unreadable."""
    headings = ("image", *(heading for _ in range(width) for heading in ("class", "probability")))
    return table(headings, map(_guesses, entries), left=headings)


def _guesses(entry: Mapping[str, Any]) -> list[str]:
    pairs = ((guess["class"], f"{guess['probability']:.1%}") for guess in entry["guesses"])
    return [entry["image"], *(list(chain(*pairs)) or [entry["error"]])]
