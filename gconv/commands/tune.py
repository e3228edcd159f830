"""``python -m gconv tune``: measure the tiles of the kernels on this GPU, and keep the fastest in a table.

``auto`` reads the table (:mod:`gconv.kernels.choice`) from the next process on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gconv import dispatch
from gconv.dispatch import this_device
from gconv.geometry import PASSES, ConvGeometry
from gconv.measure.environment import environment
from gconv.measure.problem import TYPES, Problem
from gconv.measure.recorder import grouped_convolutions
from gconv.measure.suites import REAL, SUITES
from gconv.measure.terminal import (
    STOPPED,
    add_names,
    count,
    fail,
    first_line,
    load_function,
    minutes,
    run_resumable,
    track,
)
from gconv.text import columns

if TYPE_CHECKING:
    from gconv.measure.tuner import Finding

DESCRIPTION = """\
Measure the candidate tiles for the grouped convolutions of some networks, or of your model, on this GPU, and
PyTorch's own convolution for comparison. Results go into a table after each pass of each layer. `auto` uses
the table from the next process on: it takes gconv's kernels where they are at least 2% faster. A second run
measures only what is not in the table yet, so Ctrl-C loses nothing.

  python -m gconv tune                                                 the networks that gconv knows
  python -m gconv tune --model torchvision.models:regnet_y_8gf         yours: what MODULE:FUNCTION() returns
"""


def main(command: Sequence[str] | None = None, prog: str = "python -m gconv tune") -> int:
    """Parse the command line and measure; 1 if a kernel was wrong, ``STOPPED`` if time was up, else 0."""
    arguments = _parser(prog).parse_args(command)
    device = this_device()
    problems = _problems(arguments)
    if problem := dispatch.why_not_triton(device, torch.float32, problems[0].geometry):
        fail(problem)
    if device.type == "cpu" and arguments.out is None:
        fail("--out FILE is needed: what the interpreter takes is good for a trial alone")
    return run_resumable(lambda: _run(problems, device, arguments))


def _run(problems: list[Problem], device: torch.device, arguments: argparse.Namespace) -> int:
    """Measures what is not in the table yet and writes each finding down."""
    from gconv.kernels import choice, device_of  # imports Triton
    from gconv.measure import tuner as tuning  # imports Triton

    path = arguments.out or choice.user_folder() / choice.file_name(device_of(device).name)
    try:
        entries = {(entry.kind, entry.size): entry for entry in choice.read_entries(path)}
    except ValueError as error:
        fail(f"{error}; move it away, or choose another --out")
    if path.exists() and not entries:
        print(f"{path} holds nothing for this gconv's kernels and is written anew", file=sys.stderr)
    choice.write_entries(path, entries.values(), environment(device))  # now, not after minutes, it may fail
    todo = [p for p in problems if arguments.again or tuning.key(p) not in entries]
    print(f"{len(problems)} passes of layers, {len(problems) - len(todo)} of them in {path} already")
    end = time.monotonic() + 60 * arguments.minutes
    tiles = tuning.compile_candidates(todo, device, arguments.processes)
    found: list[Finding] = []
    stopped = False
    for problem in track(todo, "measuring"):
        if time.monotonic() > end:
            print(f"stopped after {arguments.minutes:g} minutes; the same command goes on from there")
            stopped = True
            break
        try:
            finding = tuning.tune(problem, tiles[problem], device)
        except torch.OutOfMemoryError:
            print(f"left out, it does not fit the memory: {problem}", file=sys.stderr)
            torch.cuda.empty_cache()
            continue
        found.append(finding)
        if arguments.times is not None:
            _append_times(arguments.times, finding)
        for tile, error in finding.wrong.items():
            print(f"WRONG by {error:.1e}, left out: {problem}, {tile}", file=sys.stderr)
        if finding.tile is not None:
            entries[tuning.key(problem)] = finding.entry
            choice.write_entries(path, entries.values(), environment(device))
    if found:
        print(columns(_rows(found), left=4, rule=True))
    print(f"{len(entries)} entries in {path}")
    if any(finding.wrong for finding in found):
        return 1
    return STOPPED if stopped else 0


def _append_times(path: Path, finding: Finding) -> None:
    """A line for each tile of a finding, the fastest first."""
    problem = finding.problem
    what = {"layer": str(problem.geometry), "pass": problem.pass_, "type": problem.type}
    with open(path, "a") as file:
        for tile, microseconds in sorted(finding.times.items(), key=lambda item: item[1]):
            file.write(json.dumps({**what, "us": microseconds, "tile": asdict(tile)}) + "\n")


def _rows(findings: Sequence[Finding]) -> list[tuple[str, ...]]:
    """What was measured in channels_last, in microseconds, a row each."""
    rows = [("layer", "pass", "type", "tile", "triton", "aten", "speedup")]
    for f in findings:
        ours, theirs = f.triton.get("channels_last"), f.aten["channels_last"]
        numbers = ("", f"{theirs:.1f}", "") if ours is None else (
            f"{ours:.1f}", f"{theirs:.1f}", f"{theirs / ours:.2f}x"
        )  # fmt: skip
        rows.append(
            (
                str(f.problem.geometry),
                f.problem.pass_,
                f.problem.type,
                str(f.tile or "none is right"),
                *numbers,
            )
        )
    return rows


def _problems(arguments: argparse.Namespace) -> list[Problem]:
    """All that is to be measured: types outermost, so that the first ones are whole before time runs out."""
    if arguments.model is None:
        layers = [layer.geometry(1) for suite in arguments.suite for layer in SUITES[suite]]
    else:
        layers = _layers_of_model(arguments.model, arguments.image)
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
    make = load_function(name)
    try:
        layers = grouped_convolutions(make, size)
    except Exception as error:  # whatever a stranger's model raises
        fail(f"--model {name}: does not run on an image of {tuple(size)}: {first_line(error)}")
    return layers or fail(f"--model {name}: has no grouped convolution")


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    add_names(what, "--suite", SUITES, REAL)
    what.add_argument("--model", metavar="MODULE:FUNCTION", help="whose grouped convolutions to measure")
    parser.add_argument(
        "--image", type=count, nargs=3, default=(3, 224, 224), metavar=("C", "H", "W"),
        help="the image that the model gets; default: 3 224 224",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=count, nargs="+", default=[256, 32, 1], metavar="N", help="default: 256 32 1"
    )
    add_names(parser, "--dtypes", TYPES, ["bfloat16", "float16", "tf32"])
    add_names(parser, "--passes", PASSES)
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the table; default: the GPU's in your cache folder"
    )
    parser.add_argument(
        "--times", type=Path, metavar="FILE",
        help="append the time of every tile that was measured, a line of JSON each",
    )  # fmt: skip
    parser.add_argument("--again", action="store_true", help="measure what is in the table as well")
    parser.add_argument("--minutes", type=minutes, default=float("inf"), help="stop after as many")
    parser.add_argument(
        "--processes", type=count, default=os.cpu_count(), help="that compile; default: one for each core"
    )
    return parser
