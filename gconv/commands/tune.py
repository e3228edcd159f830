"""``python -m gconv tune``: measure the tiles of the kernels on this GPU, and keep the fastest in a table.

``auto`` reads the table (:mod:`gconv.kernels.choice`) from the next process on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gconv import dispatch
from gconv.commands.options import (
    TF32,
    add_batch,
    add_input,
    add_names,
    add_processes,
    load_function,
    minutes,
    new_parser,
)
from gconv.dispatch import this_device
from gconv.geometry import PASSES, ConvGeometry
from gconv.measure.environment import environment
from gconv.measure.problem import TYPES, Problem
from gconv.measure.recorder import grouped_convolutions
from gconv.measure.suites import REAL, SUITES
from gconv.measure.terminal import STOPPED, fail, first_line, run_resumable, track
from gconv.text import columns

if TYPE_CHECKING:
    from gconv.kernels.choice import Entry
    from gconv.kernels.tiles import Tile
    from gconv.measure.tuner import TuningResult

DESCRIPTION = """\
Measure candidate tiles for the grouped convolutions of some networks, or of your model, on this GPU, and
PyTorch's own convolution for comparison. The results go into a table after each pass of each layer. `auto`
uses the table from the next process on: it takes gconv's kernels where they are at least 2% faster. A second
run only measures what is not in the table yet, so Ctrl-C loses nothing. Exit code 1 means that a kernel gave
a wrong result, 3 that --minutes were up before the end.

  python -m gconv tune                                            the networks that gconv knows
  python -m gconv tune --model torchvision.models:regnet_y_8gf    the network that MODULE:FUNCTION() returns
"""


def main(command: Sequence[str] | None = None, prog: str = "python -m gconv tune") -> int:
    """Tune the kernels for this GPU.

    Args:
        command: the command line. Defaults to None, that of this process.
        prog: name of the program, for help and errors.

    Returns:
        0; 1 if a kernel gave a wrong result; ``STOPPED`` if time was up.
    """
    arguments = _parser(prog).parse_args(command)
    device = this_device()
    problems = _problems(arguments)
    if reason := dispatch.why_not_triton(device, torch.float32, problems[0].geometry):
        fail(reason)
    if device.type == "cpu" and arguments.out is None:
        fail("--out FILE is needed: times of Triton's interpreter are only good for a trial")
    return run_resumable(lambda: _run(problems, device, arguments))


def _run(problems: list[Problem], device: torch.device, arguments: argparse.Namespace) -> int:
    """Measure what is not in the table yet, and save each result; return the exit code."""
    from gconv.measure import tuner  # imports Triton

    path, facts = _path_of_table(arguments, device), environment(device)
    entries = _read_table(path)
    tuner.write_entries(path, entries.values(), facts)  # if this fails, then now and not after minutes
    todo = [p for p in problems if arguments.again or tuner.key(p) not in entries]
    print(f"{len(problems)} passes of layers, {len(problems) - len(todo)} of them in {path} already")
    end = time.monotonic() + 60 * arguments.minutes
    tiles = tuner.compile_candidates(todo, device, arguments.processes)
    results: list[TuningResult] = []
    stopped = False
    for problem in track(todo, "measuring"):
        if stopped := time.monotonic() > end:
            print(f"stopped after {arguments.minutes:g} minutes; the same command goes on from there")
            break
        result = _tune(problem, tiles[problem], device)
        if result is None:
            continue
        results.append(result)
        _report(result, arguments.times)
        if result.entry is not None:
            entries[tuner.key(problem)] = result.entry
            tuner.write_entries(path, entries.values(), facts)
    if results:
        print(columns(_rows(results), left=4, rule=True))
    print(f"{len(entries)} entries in {path}")
    if any(result.wrong for result in results):
        return 1
    return STOPPED if stopped else 0


def _path_of_table(arguments: argparse.Namespace, device: torch.device) -> Path:
    from gconv.kernels import choice, device_of  # imports Triton

    return arguments.out or choice.user_folder() / choice.file_name(device_of(device).name)


def _read_table(path: Path) -> dict[tuple, Entry]:
    """Return the entries of a table by kind and size; exit with an error if the file is something else."""
    from gconv.kernels import choice  # imports Triton

    try:
        entries = {(entry.kind, entry.size): entry for entry in choice.read_entries(path)}
    except ValueError as error:
        fail(f"{error}; move it away, or choose another --out")
    if path.exists() and not entries:
        print(f"{path} has no entries for the kernels of this gconv, and is overwritten", file=sys.stderr)
    return entries


def _tune(problem: Problem, tiles: Sequence[Tile], device: torch.device) -> TuningResult | None:
    """Measure a problem; None if it does not fit the GPU's memory."""
    from gconv.measure import tuner  # imports Triton

    try:
        return tuner.tune(problem, tiles, device)
    except torch.OutOfMemoryError:
        print(f"left out, it does not fit the memory: {problem}", file=sys.stderr)
        torch.cuda.empty_cache()
        return None


def _report(result: TuningResult, times: Path | None) -> None:
    """Name the tiles that are wrong, and append the times of the others to a file, the fastest first."""
    problem = result.problem
    for tile, error in result.wrong.items():
        print(f"WRONG by {error:.1e}, left out: {problem}, {tile}", file=sys.stderr)
    if times is None:
        return
    case = {"layer": str(problem.geometry), "pass": problem.pass_, "type": problem.type}
    with open(times, "a") as file:
        for tile, microseconds in sorted(result.times.items(), key=lambda item: item[1]):
            file.write(json.dumps({**case, "us": microseconds, "tile": asdict(tile)}) + "\n")


def _rows(results: Sequence[TuningResult]) -> list[tuple[str, ...]]:
    """Return a row for each result, below a head, with times in channels_last in microseconds."""
    rows: list[tuple[str, ...]] = [("layer", "pass", "type", "tile", "triton", "aten", "speedup")]
    for result in results:
        problem = result.problem
        ours, theirs = result.triton.get("channels_last"), result.aten["channels_last"]
        times = ("", f"{theirs:.1f}", "")
        if ours is not None:
            times = (f"{ours:.1f}", f"{theirs:.1f}", f"{theirs / ours:.2f}x")
        tile = str(result.tile or "none is right")
        rows.append((str(problem.geometry), problem.pass_, problem.type, tile, *times))
    return rows


def _problems(arguments: argparse.Namespace) -> list[Problem]:
    """Return what to measure, one type after the other, so that the first is done when time runs out."""
    if arguments.model is None:
        layers = [layer.geometry(1) for suite in arguments.suite for layer in SUITES[suite]]
    else:
        layers = _layers_of_model(arguments.model, arguments.input)
    return list(
        dict.fromkeys(
            Problem(pass_, replace(layer, input_size=(batch, *layer.input_size[1:])), type_)
            for type_ in arguments.dtypes
            for batch in arguments.batch
            for layer in layers
            for pass_ in arguments.passes
        )
    )


def _layers_of_model(name: str, size: Sequence[int]) -> list[ConvGeometry]:
    """Return the grouped convolutions of the network that ``MODULE:FUNCTION`` returns."""
    make = load_function(name)
    try:
        layers = grouped_convolutions(make, size)
    except Exception as error:  # a model may raise anything
        fail(f"--model {name}: does not run on an input of {tuple(size)}: {first_line(error)}")
    return layers or fail(f"--model {name}: has no grouped convolution")


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = new_parser(prog, DESCRIPTION)
    networks = parser.add_mutually_exclusive_group()
    add_names(networks, "--suite", SUITES, REAL, "networks whose grouped layers to tune for")
    networks.add_argument(
        "--model", metavar="MODULE:FUNCTION", help="a function that returns the network to tune for"
    )
    add_input(parser)
    add_batch(parser, [256, 32, 1], "batch sizes to measure")
    add_names(parser, "--dtypes", TYPES, ["bfloat16", "float16", "tf32"], f"types to measure {TF32}")
    add_names(parser, "--passes", PASSES, purpose="passes to measure")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the table; default: this GPU's in your cache folder"
    )
    parser.add_argument(
        "--times", type=Path, metavar="FILE",
        help="append the time of every measured tile to FILE, one line of JSON each",
    )  # fmt: skip
    parser.add_argument("--again", action="store_true", help="also measure what is in the table already")
    parser.add_argument(
        "--minutes", type=minutes, default=float("inf"), metavar="M", help="stop after M minutes"
    )
    add_processes(parser)
    return parser
