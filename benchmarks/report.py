"""Write the tables and plots of a folder of measurements, from its files only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.counters import CounterRow
from benchmarks.layers import LayerRow
from benchmarks.networks import NetworkRow
from benchmarks.store import TableRow, read_environment, read_table
from benchmarks.summary import (
    Comparison,
    Gain,
    comparisons,
    geometric_mean,
    least,
    mean_gain,
    percent,
    spread,
    summary_table,
    times,
    worst_gain,
)
from gconv.measure.terminal import fail

try:
    from benchmarks import plots
except ModuleNotFoundError:  # without matplotlib a report has only tables
    plots = None

Show = Callable[[float | None], str]
HALF = ("bfloat16", "float16")
READ_IDLE = ("clock_sm_mhz", "clock_memory_mhz")  # in older results, which read the clocks of an idle GPU
ALONE = ("resnext50_32x4d", 256)  # the suite and the batch size that the goals and the README are about


def write_report(folder: Path) -> list[Path]:
    """Write ``report.md`` into ``folder``, and plots if matplotlib is installed; return their paths."""
    environment = environment_of(folder)
    layers = comparisons(rows := read_table(folder / "layers.jsonl", LayerRow))
    networks = read_table(folder / "networks.jsonl", NetworkRow)
    where = environment["gpu"] or environment["cpu"]
    drawn: list[Path] = []
    parts = [f"# {where}", _environment(environment), *_right_or_wrong(folder)]
    if layers or networks:
        parts += ["## Goals", _table(_aims(layers, networks), left=1)]
    if layers:
        drawn += plots.draw_layers(layers, folder, where) if plots else []
        parts += map(_image, drawn)
        parts += ["## Summary of the layers", _SHORT, _table(summary_table(rows), left=4)]
    if networks:
        of_networks = [plots.draw_networks(networks, folder, where)] if plots else []
        drawn += of_networks
        parts += ["## Networks", _NETWORKS, *map(_image, of_networks), _table(_networks(networks), left=5)]
    if layers:
        parts += ["## Layers", _LAYERS, *_layers(layers)]
    if counted := read_table(folder / "counters.jsonl", CounterRow):
        parts += ["## Hardware counters", _COUNTERS, _table(_counters(counted), left=3)]
    path = folder / "report.md"
    path.write_text("\n\n".join(parts) + "\n")
    return [path, *drawn]


def environment_of(folder: Path) -> dict[str, Any]:
    """Return the machine and versions that a folder was measured with; exit with an error without results."""
    if not (folder / "environment.json").exists():
        fail(f"{folder} has no results: run `python -m benchmarks run` first, or name another folder")
    return read_environment(folder)


_SHORT = """\
Geometric mean and minimum over a suite's layers. gconv is `auto` in channels_last; each peer (another
implementation) is in its faster layout. "Of the floor" is the memory floor (the compulsory bytes at the speed
of a copy) divided by gconv's time. "Same layout" is the speedup of `auto` over `F.conv2d` in the same layout,
channels_last or contiguous, whichever is lower. "Faster/tie/slower" counts the layers by how gconv compares
with the best peer. Two times tie if their ranges from p20 to p80 overlap; a tie counts as 1x in a minimum,
and as measured in a mean."""
_NETWORKS = """\
bfloat16 autocast. A training step is forward, cross-entropy, backward and SGD with momentum. "Fused" runs the
batch norms inside the grouped convolutions; in inference with `gconv.fuse`. "Grouped" is the share of the
grouped convolutions in the device time of an eager step. "Match" is the error of the logits, or of the
gradients, against float32. Milliseconds are medians, ± half the distance from p20 to p80; lines in the plot
reach from p20 to p80."""
_LAYERS = """\
Microseconds are medians, ± half the distance from p20 to p80, which `layers.jsonl` contains. If these ranges
overlap, the speedup is a tie; "=" separates peers that tie with the best one. "Match" is the error against
float64, relative to the largest number; a wrong result has no time."""
_COUNTERS = """\
Nsight Compute runs each kernel of a pass alone and empties the caches before it, so times are longer than
above. Percentages are of the hardware's peak; "m" is millions."""


def _right_or_wrong(folder: Path) -> list[str]:
    """Return a line about the tests that ran on this GPU, and one about ``python -m gconv``."""
    lines = []
    if (path := folder / "tests.json").exists():
        tests = json.loads(path.read_text())
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(tests["counts"].items()))
        sanitizer = tests["sanitizer"].get("outcome", "did not run")
        lines.append(f"Tests on this GPU: {counts}; compute-sanitizer: {sanitizer}.")
    if (path := folder / "check.json").exists():
        found = json.loads(path.read_text())
        right = sum(answer["problem"] is None for answer in found["answers"])
        lines.append(
            f"`python -m gconv`: {right} of {len(found['answers'])} results are right. {found['verdict']}"
        )
    return ["## Correctness", *lines] if lines else []


def _counters(rows: Sequence[TableRow]) -> list[tuple[str, ...]]:
    """Return a row for each kernel, with a column for each counter of any kernel."""
    names = list(dict.fromkeys(name for row in rows for name in row["counts"]))
    table = [("layer", "pass", "kernel", *(name.replace("_", " ").replace("percent", "%") for name in names))]
    for row in rows:
        counts = [_number(row["counts"].get(name)) for name in names]
        table.append((row["layer"], row["pass_"], row["problem"] or row["kernel"], *counts))
    return table


def _environment(facts: dict[str, Any]) -> str:
    shown = {
        name.replace("_", " ") + (", idle" if name in READ_IDLE else ""): value
        for name, value in facts.items()
        if value is not None
    }
    return _table([("measured on", ""), *((name, str(value)) for name, value in shown.items())], left=2)


def _aims(layers: Sequence[Comparison], networks: Sequence[TableRow]) -> list[tuple[str, ...]]:
    """Return the table of goals and measured values; a dash if a value wasn't measured."""
    return [("goal", "measured", "met"), *_aims_of_layers(layers), *_aims_of_networks(networks)]


def _aims_of_layers(layers: Sequence[Comparison]) -> Iterator[tuple[str, ...]]:
    suite, batch = ALONE
    for pass_, floor, worst, faster in (
        ("forward", 0.85, 0.70, 4),
        ("input_grad", 0.85, 0.70, 4),
        ("weight_grad", 0.70, 0.50, 5),
    ):
        chosen = [c for c in layers if (c.suite, c.batch) == ALONE and c.type in HALF and c.pass_ == pass_]
        name = f"{pass_}, {suite}, batch {batch}, 16 bits"
        fractions = [case.fraction for case in chosen]
        mean = geometric_mean(fractions)
        yield _at_least(f"{name}: at least {floor:.0%} of the floor, mean", mean, floor, percent)
        lowest = least(fractions)
        yield _at_least(f"{name}: at least {worst:.0%} of the floor, every layer", lowest, worst, percent)
        gain = mean_gain(case.speedup_over_conv2d for case in chosen)
        yield _at_least(
            f"{name}: at least {faster}x F.conv2d in its faster layout, mean", gain, faster, times
        )
    slowest = worst_gain(case.least_gain for case in layers)
    yield _gains("`auto`: at least 0.98x F.conv2d in the same layout, every row", slowest, 0.98)
    for passes, limit, text in (
        (("forward", "input_grad"), 0, "no"),
        (("weight_grad",), 32 * 2**20, "at most 32 MiB of"),
    ):
        extra = [c.ours["extra_bytes"] for c in layers if c.ours and c.pass_ in passes]
        most = max((e for e in extra if e is not None), default=None)
        yield _at_most(f"{', '.join(passes)}: {text} extra memory", most, limit, _mebibytes)
    host = geometric_mean(case.host_ratio for case in layers if case.pass_ == "forward")
    yield _at_most("forward: at most 1.3x F.conv2d's host time in an eager call", host, 1.3, times)


def _aims_of_networks(networks: Sequence[TableRow]) -> Iterator[tuple[str, ...]]:
    for task, bound in (("training", 1.25), ("inference", 1.3)):
        for name, gain in network_gains(networks, task).items():
            yield _gains(f"{task} of {name}: at least {bound}x F.conv2d, fastest modes", gain, bound)
    for task, bound in (("inference", 1.5), ("training", 1.35)):
        for name, gain in fused_gains(networks, task).items():
            what = f"{task} of {name}, fused: at least {bound}x F.conv2d with torch.compile"
            yield _gains(what, gain, bound)
        for name, part in parts_of_resnet(networks, task).items():
            yield _gains(f"{task} of {name}, fused: at least 0.9x ResNet-50's images/s", part, 0.9)


def _at_least(aim: str, value: float | None, bound: float, show: Show) -> tuple[str, str, str]:
    return (aim, "-", "-") if value is None else (aim, show(value), "yes" if value >= bound else "no")


def _at_most(aim: str, value: float | None, bound: float, show: Show) -> tuple[str, str, str]:
    return (aim, "-", "-") if value is None else (aim, show(value), "yes" if value <= bound else "no")


def _gains(aim: str, gain: Gain | None, bound: float) -> tuple[str, str, str]:
    return _at_least(aim, gain and gain.claim, bound, lambda _: str(gain))


def network_gains(networks: Sequence[TableRow], task: str) -> dict[str, Gain]:
    """Return the gain in images/s of gconv over F.conv2d, each in its fastest mode, by network and batch."""
    best = fastest(row for row in networks if row["task"] == task)
    return _over(best, best, "gconv", lambda network: network)


def fused_gains(networks: Sequence[TableRow], task: str) -> dict[str, Gain]:
    """Return the gain in images/s of fused networks over compiled ones on F.conv2d, by network and batch."""
    rows = [row for row in networks if row["task"] == task]
    compiled = fastest(row for row in rows if row["mode"].startswith("compiled"))
    return _over(fastest(rows), compiled, "fused", lambda network: network)


def parts_of_resnet(networks: Sequence[TableRow], task: str) -> dict[str, Gain]:
    """Return images/s of a fused ResNeXt-50 over ResNet-50's, each in its fastest mode, by batch."""
    best = fastest(row for row in networks if row["task"] == task)
    ours = {key: row for key, row in best.items() if key[0] == "resnext50_32x4d"}
    return _over(ours, best, "fused", lambda _: "resnet50")


def _over(
    ours: dict[tuple[str, int, int, str], TableRow],
    theirs: dict[tuple[str, int, int, str], TableRow],
    runner: str,
    peer: Callable[[str], str],
) -> dict[str, Gain]:
    """Return the gain of ``runner`` over F.conv2d in the network that ``peer`` names."""
    gains = {}
    for (network, batch, image, who), row in ours.items():
        gain = Gain.over(theirs.get((peer(network), batch, image, "F.conv2d")), row)
        if who == runner and gain is not None:
            gains[f"{network}, batch {batch}, {image}x{image}"] = gain
    return gains


def fastest(rows: Iterable[TableRow]) -> dict[tuple[str, int, int, str], TableRow]:
    """Return the fastest row by network, batch, image and runner."""
    best: dict[tuple[str, int, int, str], TableRow] = {}
    for row in rows:
        key = row["network"], row["batch"], row["image"], row["runner"]
        if row["p50"] is not None and (key not in best or row["p50"] < best[key]["p50"]):
            best[key] = row
    return best


def _layers(layers: Sequence[Comparison]) -> list[str]:
    """Return a table for each suite, batch and type."""
    parts = []

    def key(case: Comparison) -> tuple:
        return case.suite, case.type, case.batch

    for (suite, type_, batch), group in groupby(sorted(layers, key=key), key=key):
        head = ("layer", "pass", "ran", "time", "floor", "of the floor", "best peer", "its time", "speedup")
        rows = [(*head, "host", "extra", "match")]
        for case in group:
            row, peer = case.rows.get(("auto", "channels_last"), {}), case.best_peer
            peers = " = ".join(f"{row['runner']}, {row['layout']}" for row in case.best_peers)
            rows.append(
                (
                    case.layer,
                    case.pass_,
                    row.get("ran", ""),
                    row.get("problem") or _time(row),
                    _number(row.get("floor")),
                    percent(case.fraction),
                    peers,
                    _time(peer or {}),
                    "" if case.speedup is None else str(case.speedup),
                    _number(row.get("host")),
                    _mebibytes(row.get("extra_bytes")),
                    "" if row.get("error") is None else f"{row['error']:.0e}",
                )
            )
        parts += [f"### {suite}, batch {batch}, {type_}", _table(rows, left=3)]
    return parts


def _networks(rows: Sequence[TableRow]) -> list[tuple[str, ...]]:
    head = ("network", "runner", "layout", "task", "mode", "batch", "image", "images/s", "ms", "peak memory")
    table = [(*head, "grouped", "match")]
    for row in rows:
        table.append(
            (
                *(str(row[name]) for name in head[:7]),
                row["problem"] or f"{row['images_per_second']:,.0f}",
                _time(row),
                "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f} GiB",
                percent(row["grouped_share"]),
                "" if row["error"] is None else f"{row['error']:.0e}",
            )
        )
    return table


def _table(rows: Sequence[Sequence[str]], left: int) -> str:
    """Return a Markdown table with the first ``left`` columns aligned left, the others right."""
    head, *body = rows
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))


def _image(path: Path) -> str:
    return f"![{path.stem}]({path.name})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}"


def _time(row: TableRow) -> str:
    """Return the median and its spread, such as 112.3 ±1.2%; "" without a time."""
    return "" if row.get("p50") is None else f"{_number(row['p50'])} {spread(row)}"


def _mebibytes(value: float | None) -> str:
    return "" if value is None else f"{value / 2**20:.1f} MiB"
