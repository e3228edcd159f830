"""Find the fastest tile of a pass: compile the candidates, check and time them, and write the table."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from gconv.kernels import choice
from gconv.kernels.device import device_of
from gconv.kernels.forward import forward
from gconv.kernels.input_grad import input_grad
from gconv.kernels.tiles import Tile
from gconv.kernels.weight_grad import weight_grad
from gconv.measure import compiled
from gconv.measure.candidates import candidates, splits
from gconv.measure.files import write_atomically
from gconv.measure.problem import LAYOUTS, TYPES, Operands, Problem, run_poisoned
from gconv.measure.timing import Call, Times, cudnn_searching, time_together


@dataclass(frozen=True)
class TuningResult:
    """The result of ``tune`` for a problem.

    Args:
        problem: the pass, the sizes and the type.
        tile: the fastest tile with a right result, or None if no tile gave one.
        triton: time of that tile in microseconds, by layout. Empty if there is no such tile.
        aten: time of PyTorch's convolution in microseconds, by layout.
        wrong: the tiles with a wrong result, which are never used, and their errors.
        times: times in microseconds of all tiles with a right result, in channels_last.
    """

    problem: Problem
    tile: Tile | None
    triton: dict[str, float]
    aten: dict[str, float]
    wrong: dict[Tile, float]
    times: dict[Tile, float]

    @property
    def entry(self) -> choice.Entry | None:
        """The entry for the table, or None if no tile gave a right result."""
        return (
            None if self.tile is None else choice.Entry(*key(self.problem), self.tile, self.triton, self.aten)
        )


def key(problem: Problem) -> tuple[tuple, tuple[int, int, int, int]]:
    """Return the kind and the size of a problem's entry in the table."""
    return choice.kind_of(problem.pass_, problem.geometry, problem.type), choice.size_of(problem.geometry)


def write_entries(path: Path, entries: Iterable[choice.Entry], environment: dict[str, Any]) -> None:
    """Write a table for ``gconv.kernels.choice.read_entries``, with one entry per line.

    Args:
        path: the file to write.
        entries: the measurements.
        environment: the machine that they were made on.

    Raises:
        OSError: the file can't be written.
    """
    lines = ",\n".join(json.dumps(asdict(entry)) for entry in entries)
    head = json.dumps({"kernels": choice.KERNELS, "environment": environment}, indent=1).removesuffix("\n}")
    write_atomically(path, f'{head},\n "entries": [\n{lines}\n]}}\n')


def tune(problem: Problem, tiles: Sequence[Tile], device: torch.device) -> TuningResult:
    """Time tiles, then finer and coarser splits of the fastest tile, then PyTorch in both layouts.

    Args:
        problem: the pass to run.
        tiles: the candidates.
        device: a GPU, or the CPU for Triton's interpreter.

    Returns:
        The fastest tile with a right result, and all times.
    """
    with problem.precision(), cudnn_searching():
        sets = {layout: problem.draw_sets(device, layout) for layout in LAYOUTS}
        ours = sets["channels_last"]
        truth = problem.truth(ours[0])
        errors = _errors(problem, ours[0], tiles, truth)
        times = _times(problem, ours, errors, device)
        best = _fastest(times)
        if best is not None:
            errors |= _errors(problem, ours[0], splits(best), truth)
            near = {tile: errors[tile] for tile in (best, *splits(best)) if tile in errors}
            again = _times(problem, ours, near, device)
            times |= again
            best = _fastest(again)
        triton, aten = _compare_with_pytorch(problem, sets, best, device)
    wrong = {tile: error for tile, error in errors.items() if not problem.matches(error)}
    return TuningResult(problem, best, triton, aten, wrong, times)


def compile_candidates(
    problems: Sequence[Problem], device: torch.device, processes: int | None = None
) -> dict[Problem, list[Tile]]:
    """Compile the candidates of each problem into Triton's cache.

    Args:
        problems: the passes that will be tuned.
        device: a GPU, or the CPU for Triton's interpreter, which compiles nothing.
        processes: number of processes that compile. Defaults to None, one per core.

    Returns:
        The candidates by problem, without the tiles that spill or don't compile. The latter are printed on
        stderr.
    """
    here = device_of(device)
    found = {p: candidates(p.pass_, p.geometry, p.dtype, TYPES[p.type][1], here) for p in problems}
    if here.kind == "cpu":
        return found
    target = compiled.target_of(device)
    jobs: dict[tuple, tuple[compiled.Job, list[tuple[Problem, Tile]]]] = {}
    for problem, tiles in found.items():
        for tile in tiles:
            job = compiled.Job(target, problem.type, problem.pass_, problem.geometry, "plain", 0, tile)
            jobs.setdefault(job.binary, (job, []))[1].append((problem, tile))
    for job, kernel in compiled.compile_all([job for job, _ in jobs.values()], processes):
        users = jobs[job.binary][1]
        if isinstance(kernel, BaseException):
            print(f"skipped a tile that doesn't compile: {users[0][1]}: {kernel!r}", file=sys.stderr)
        elif not kernel.spills:
            continue
        for problem, tile in users:
            found[problem].remove(tile)
    return found


def _run(problem: Problem, operands: Operands, tile: Tile, form: torch.memory_format) -> Tensor:
    """Run a problem's pass on the kernels with one tile, and return the result in memory format ``form``."""
    (x, w, dy), geometry = operands, problem.geometry
    if problem.pass_ == "forward":
        result = forward(x, w, None, geometry, None, tile=tile)
    elif problem.pass_ == "input_grad":
        result = input_grad(dy, w, None, geometry, tile=tile)
    else:
        result = weight_grad(dy, x, geometry, False, tile=tile)[0]
    return result.contiguous(memory_format=form)


def _run_in(problem: Problem, tile: Tile, form: torch.memory_format) -> Callable[[Operands], Tensor]:
    """Return a function that runs a problem with one tile."""
    return lambda operands: _run(problem, operands, tile, form)


def _errors(problem: Problem, operands: Operands, tiles: Iterable[Tile], truth: Tensor) -> dict[Tile, float]:
    """Return the error of each tile, skipping tiles that need more shared memory than the GPU has."""
    errors = {}
    for tile in tiles:
        try:
            result = run_poisoned(_run_in(problem, tile, torch.channels_last), operands)
        except OutOfResources:
            continue
        errors[tile] = problem.error(result, truth)
    return errors


def _times(
    problem: Problem, sets: Sequence[Operands], errors: dict[Tile, float], device: torch.device
) -> dict[Tile, float]:
    """Return the times in microseconds of the tiles whose results are right."""
    contenders = {
        tile: _calls(_run_in(problem, tile, torch.channels_last), sets)
        for tile, error in errors.items()
        if problem.matches(error)
    }
    times = time_together(contenders, device) if contenders else {}
    return {tile: _microseconds(t) for tile, t in times.items()}


def _fastest(times: dict[Tile, float]) -> Tile | None:
    return min(times, key=lambda tile: times[tile], default=None)


def _compare_with_pytorch(
    problem: Problem, sets: dict[str, list[Operands]], tile: Tile | None, device: torch.device
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the times in microseconds of the kernels with ``tile``, and of PyTorch, each by layout."""
    contenders = {("aten", layout): _calls(problem.run_pytorch, sets[layout]) for layout in LAYOUTS}
    if tile is not None:
        for layout, form in LAYOUTS.items():
            contenders["triton", layout] = _calls(_run_in(problem, tile, form), sets[layout])
    times = time_together(contenders, device)
    triton, aten = (
        {layout: _microseconds(t) for (backend, layout), t in times.items() if backend == name}
        for name in ("triton", "aten")
    )
    return triton, aten


def _calls(run: Callable[[Operands], Tensor], sets: Iterable[Operands]) -> list[Call]:
    """Return a call of ``run`` for each set of operands."""
    return [partial(run, operands) for operands in sets]


def _microseconds(times: Times) -> float:
    return round(times.p50 * 1e6, 3)
