"""``python -m gconv tune``: measure the tiles of the kernels on this GPU, and save the fastest in a table.

``auto`` reads the table (``gconv.kernels.choice``) in every process started afterwards.
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
Find the fastest tiles of gconv's kernels on this GPU, for the grouped convolutions of well-known networks or
of your own, and time PyTorch's convolution for comparison:

  python -m gconv tune                                            well-known networks, see --suite
  python -m gconv tune --model torchvision.models:regnet_y_8gf    the network that MODULE:FUNCTION() returns

The results are saved in a table. In processes started afterwards, the backend `auto` uses gconv's kernels
where the table shows them to be at least 2% faster. The table is written after each pass of each layer, and
the same command skips what it contains, so you can stop with Ctrl-C and continue later.

Exit code: 0 if everything was measured, 1 if a kernel gave a wrong result, 3 if --minutes ran out first.
"""


def main(command: Sequence[str] | None = None, prog: str = "python -m gconv tune") -> int:
    """Tune the kernels for this GPU.

    Args:
        command: the arguments of the command line. Defaults to None, the arguments of this process.
        prog: name of the program, for help and errors.

    Returns:
        The exit code: 0, 1 if a kernel gave a wrong result, or ``STOPPED`` if time ran out.
    """
    arguments = _parser(prog).parse_args(command)
    device = this_device()
    problems = _problems(arguments)
    if reason := dispatch.why_not_triton(device, torch.float32, problems[0].geometry):
        fail(reason)
    if device.type == "cpu" and arguments.out is None:
        fail("--out FILE is required with Triton's interpreter, whose times auto can't use")
    return run_resumable(lambda: _run(problems, device, arguments))


def _run(problems: list[Problem], device: torch.device, arguments: argparse.Namespace) -> int:
    """Measure what isn't in the table yet, save each result, and return the exit code."""
    from gconv.measure import tuner  # imports Triton

    path, facts = _path_of_table(arguments, device), environment(device)
    entries = _read_table(path)
    tuner.write_entries(path, entries.values(), facts)  # to fail now rather than after minutes of measuring
    todo = [p for p in problems if arguments.again or tuner.key(p) not in entries]
    print(f"{len(problems)} passes: {len(problems) - len(todo)} already in {path}, {len(todo)} to measure")
    end = time.monotonic() + 60 * arguments.minutes
    tiles = tuner.compile_candidates(todo, device, arguments.processes)
    results: list[TuningResult] = []
    stopped = False
    for problem in track(todo, "measuring"):
        if stopped := time.monotonic() > end:
            print(f"stopped after {arguments.minutes:g} minutes: run the same command again to continue")
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
    print(f"{path} has {len(entries)} entries")
    if any(result.wrong for result in results):
        return 1
    return STOPPED if stopped else 0


def _path_of_table(arguments: argparse.Namespace, device: torch.device) -> Path:
    from gconv.kernels import choice, device_of  # imports Triton

    return arguments.out or choice.user_folder() / choice.file_name(device_of(device).name)


def _read_table(path: Path) -> dict[tuple, Entry]:
    """Return the entries of a table by kind and size; exit with an error if the file isn't a table."""
    from gconv.kernels import choice  # imports Triton

    try:
        entries = {(entry.kind, entry.size): entry for entry in choice.read_entries(path)}
    except ValueError as error:
        fail(f"{error}; move the file, or choose a different --out")
    if path.exists() and not entries:
        print(f"overwriting {path}, which has no entries for this version of the kernels", file=sys.stderr)
    return entries


def _tune(problem: Problem, tiles: Sequence[Tile], device: torch.device) -> TuningResult | None:
    """Measure a problem; return None if it doesn't fit in the GPU's memory."""
    from gconv.measure import tuner  # imports Triton

    try:
        return tuner.tune(problem, tiles, device)
    except torch.OutOfMemoryError:
        print(f"skipped, because it doesn't fit in the GPU's memory: {problem}", file=sys.stderr)
        torch.cuda.empty_cache()
        return None


def _report(result: TuningResult, times: Path | None) -> None:
    """Print the tiles that are wrong, and append the times of the others to a file, the fastest first."""
    problem = result.problem
    for tile, error in result.wrong.items():
        print(f"skipped a tile that is WRONG by {error:.1e}: {problem}, {tile}", file=sys.stderr)
    if times is None:
        return
    case = {"layer": str(problem.geometry), "pass": problem.pass_, "type": problem.type}
    with open(times, "a") as file:
        for tile, microseconds in sorted(result.times.items(), key=lambda item: item[1]):
            file.write(json.dumps({**case, "us": microseconds, "tile": asdict(tile)}) + "\n")


def _rows(results: Sequence[TuningResult]) -> list[tuple[str, ...]]:
    """Return a head and a row for each result, with times in microseconds in channels_last."""
    rows: list[tuple[str, ...]] = [("layer", "pass", "type", "tile", "triton", "aten", "speedup")]
    for result in results:
        problem = result.problem
        ours, theirs = result.triton.get("channels_last"), result.aten["channels_last"]
        times = ("", f"{theirs:.1f}", "")
        if ours is not None:
            times = (f"{ours:.1f}", f"{theirs:.1f}", f"{theirs / ours:.2f}x")
        tile = str(result.tile or "no right result")
        rows.append((str(problem.geometry), problem.pass_, problem.type, tile, *times))
    return rows


def _problems(arguments: argparse.Namespace) -> list[Problem]:
    """Return the passes to measure, type by type, so that the first type is complete if time runs out."""
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
    """Return the grouped convolutions of the network that ``MODULE:FUNCTION()`` returns."""
    make = load_function(name)
    try:
        layers = grouped_convolutions(make, size)
    except Exception as error:  # a model can raise any error
        fail(f"can't run --model {name} on an input of size {tuple(size)}: {first_line(error)}")
    return layers or fail(f"--model {name} has no grouped convolutions to tune")


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = new_parser(prog, DESCRIPTION)
    networks = parser.add_mutually_exclusive_group()
    add_names(networks, "--suite", SUITES, REAL, "networks whose grouped layers to measure")
    networks.add_argument(
        "--model", metavar="MODULE:FUNCTION", help="function that returns a network, whose layers to measure"
    )
    add_input(parser)
    add_batch(parser, [256, 32, 1], "batch sizes to measure")
    add_names(parser, "--dtypes", TYPES, ["bfloat16", "float16", "tf32"], f"data types to measure, {TF32}")
    add_names(parser, "--passes", PASSES, purpose="passes to measure")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="table to write (default: a file for this GPU in $GCONV_CACHE or ~/.cache/gconv)",
    )
    parser.add_argument(
        "--times", type=Path, metavar="FILE",
        help="file to append the time of every tile to, as a line of JSON",
    )  # fmt: skip
    parser.add_argument("--again", action="store_true", help="measure again what is already in the table")
    parser.add_argument(
        "--minutes",
        type=minutes,
        default=float("inf"),
        metavar="M",
        help="stop after M minutes (default: never)",
    )
    add_processes(parser)
    return parser
