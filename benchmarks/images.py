"""Draw the README's images: ResNeXt-50's grouped convolutions on gconv and on cuDNN, from a GPU's results."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.layers import LayerRow
from benchmarks.report import ALONE, environment_of, plots
from benchmarks.store import TableRow, read_table
from benchmarks.summary import comparisons
from gconv.measure.figures import NO_MATPLOTLIB
from gconv.measure.plots import KERNELS, PYTORCH, LayerTimes, draw_times
from gconv.measure.recorder import record
from gconv.measure.suites import SUITES
from gconv.measure.terminal import fail
from resnext import resnext50_32x4d


def write_images(folder: Path, out: Path) -> list[Path]:
    """Draw the README's images into ``out`` from a GPU's results in ``folder``; return their paths.

    ``layers-light.svg`` and ``layers-dark.svg`` compare the passes of ResNeXt-50's layers with cuDNN's;
    ``profile.svg`` and ``profile-dark.svg`` show the same times as ``gconv.profile`` plots them.
    """
    if plots is None:
        fail(NO_MATPLOTLIB)
    facts = environment_of(folder)
    times = pass_times(folder)
    if not times:
        case = f"--suite {ALONE[0]} --dtypes bfloat16 --batch {ALONE[1]}"
        fail(f"{folder} has no times to draw: `python -m benchmarks run {case}` measures them")
    out.mkdir(parents=True, exist_ok=True)
    where = f"{facts['gpu']}, bfloat16, batch {ALONE[1]}, channels_last"
    versions = f"PyTorch {facts['torch'].partition('+')[0]}, cuDNN {_cudnn_version(facts.get('cudnn'))}"
    title, layers = "ResNeXt-50's grouped convolutions: gconv and cuDNN", _profile_of(times)
    count = sum(layer.count for layer in layers)
    paths = []
    for dark, name, profile in ((False, "layers-light", "profile"), (True, "layers-dark", "profile-dark")):
        paths.append(plots.draw_headline(times, out / f"{name}.svg", title, f"{where}; {versions}", dark))
        lines = f"resnext50_32x4d: {count} grouped convolutions in a training step", f"{where}; {versions}"
        paths.append(draw_times(out / f"{profile}.svg", layers, *lines, dark))
    return paths


def pass_times(folder: Path) -> list[plots.PassTime]:
    """Return the times of ResNeXt-50's passes on gconv's kernels and on cuDNN, each in its faster layout.

    Times in ``tiles.jsonl`` that name a commit replace those in ``layers.jsonl``, because they were measured
    later, with newer kernels.
    """
    newer, found = _times_of_tiles(folder), []
    for case in comparisons(read_table(folder / "layers.jsonl", LayerRow)):
        ours, theirs = case.best(["triton"]), case.best(["F.conv2d"])
        if (case.suite, case.batch, case.type) != (*ALONE, "bfloat16") or ours is None or theirs is None:
            continue
        gconv, cudnn = newer.get((case.layer, case.pass_), (None, None))
        times = gconv or ours["p50"], cudnn or theirs["p50"]
        found.append(plots.PassTime(case.layer, case.pass_, ours["floor"], *times))
    return found


def _times_of_tiles(folder: Path) -> dict[tuple[str, str], tuple[float, float | None]]:
    """Return the times of gconv and of cuDNN by layer and pass; cuDNN's is None if it wasn't measured again.

    gconv's is that of the tile that the rules chose after the measurement (``rule`` in its row), or of the
    fastest tile if there is none.
    """
    path = folder / "tiles.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    by_pass: dict[tuple[str, str], list[TableRow]] = {}
    for row in rows:
        if row.get("commit") and not row["norm"]:
            by_pass.setdefault((row["layer"], row["pass_"]), []).append(row)
    times = {}
    for (layer, pass_), of_pass in by_pass.items():
        by_rule = [row for row in of_pass if row.get("rule")]
        cudnn = min((row["cudnn"] for row in of_pass if "cudnn" in row), default=None)
        times[layer, pass_] = min(row["us"] for row in by_rule or of_pass), cudnn
    return times


def _profile_of(times: Sequence[plots.PassTime]) -> list[LayerTimes]:
    """Return the grouped convolutions of ResNeXt-50, with the times of all passes together."""
    names = {layer.geometry(ALONE[1]): layer.name for layer in SUITES[ALONE[0]]}
    with torch.device("meta"):
        network = resnext50_32x4d()
        calls = record(network, lambda: network(torch.empty(ALONE[1], 3, 224, 224)))
    grouped = [call for call in calls if call.geometry.groups > 1]
    counts, found = Counter(call.geometry for call in grouped), []
    for geometry, count in counts.items():
        call = next(call for call in grouped if call.geometry == geometry)
        passes = [time for time in times if time.layer == names[geometry]]
        seconds = {
            PYTORCH: sum(time.cudnn for time in passes) * 1e-6,
            KERNELS: sum(time.gconv for time in passes) * 1e-6,
        }
        work = geometry.flops / geometry.compulsory_bytes(2)
        what = (call.name, count, str(call.convolution), True, work, geometry.flops * len(passes))
        found.append(LayerTimes(*what, sum(time.floor for time in passes) * 1e-6, seconds))
    return found


def _cudnn_version(number: int | None) -> str:
    """Return a version such as "9.19" from PyTorch's number for it, such as 91900."""
    return "unknown" if number is None else f"{number // 10000}.{number // 100 % 100}"
