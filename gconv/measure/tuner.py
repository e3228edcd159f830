"""Finds the fastest tile of a pass by measuring: compiles candidates on all cores, times the right ones."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context

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
from gconv.measure.problem import LAYOUTS, TYPES, Operands, Problem, run_poisoned
from gconv.measure.terminal import track
from gconv.measure.timing import cudnn_searching, time_together


@dataclass(frozen=True)
class Finding:
    """What was found for a problem.

    Args:
        problem: the pass, the sizes, the type.
        tile: the fastest of those that gave the right result, None where none did.
        triton, aten: microseconds by layout.
        wrong: tiles that gave a wrong result, with its error; they are never used.
        times: microseconds of all tiles that gave the right result, in channels_last.
    """

    problem: Problem
    tile: Tile | None
    triton: dict[str, float]
    aten: dict[str, float]
    wrong: dict[Tile, float]
    times: dict[Tile, float]

    @property
    def entry(self) -> choice.Entry:
        """As the table holds it; there has to be a tile."""
        return choice.Entry(*key(self.problem), self.tile, self.triton, self.aten)


def key(problem: Problem) -> tuple[tuple, tuple]:
    """Kind and size of a problem's entry in the table."""
    return choice.kind_of(problem.pass_, problem.geometry, problem.type), choice.size_of(problem.geometry)


def tune(problem: Problem, tiles: Sequence[Tile], device: torch.device) -> Finding:
    """Measures ``tiles``, then finer and coarser splits of the best one, then PyTorch, in both layouts.

    Args:
        problem: what to run.
        tiles: that come into question.
        device: a GPU, or the CPU for Triton's interpreter.
    """
    with problem.precision(), cudnn_searching():
        sets = {layout: problem.draw_sets(device, layout) for layout in LAYOUTS}
        ours = sets["channels_last"]
        truth = problem.truth(ours[0])
        errors = _errors(problem, ours[0], tiles, truth)
        measured = _times(problem, ours, errors, device)
        best = min(measured, key=measured.get, default=None)
        if best is not None:
            errors |= _errors(problem, ours[0], splits(best), truth)
            near = {tile: errors[tile] for tile in (best, *splits(best)) if tile in errors}
            again = _times(problem, ours, near, device)
            measured |= again
            best = min(again, key=again.get)
        contenders = {("aten", layout): _calls(problem.run_pytorch, sets[layout]) for layout in LAYOUTS}
        if best is not None:
            contenders |= {
                ("triton", layout): _calls(lambda o, form=form: _run(problem, o, best, form), sets[layout])
                for layout, form in LAYOUTS.items()
            }
        times = time_together(contenders, device)
    triton, aten = (
        {layout: round(t.p50 * 1e6, 3) for (backend, layout), t in times.items() if backend == name}
        for name in ("triton", "aten")
    )
    wrong = {tile: error for tile, error in errors.items() if not problem.matches(error)}
    return Finding(problem, best, triton, aten, wrong, measured)


def compile_candidates(
    problems: Sequence[Problem], device: torch.device, processes: int | None = None
) -> dict[Problem, list[Tile]]:
    """The candidates of each problem, compiled into Triton's cache.

    Without those that spill, or that the compiler fails on, which is said.
    """
    here = device_of(device)
    found = {p: candidates(p.pass_, p.geometry, p.dtype, TYPES[p.type][1], here) for p in problems}
    if here.kind == "cpu":  # the interpreter compiles nothing
        return found
    target = compiled.target_of(device)
    jobs: dict[tuple, tuple[compiled.Job, list[tuple[Problem, Tile]]]] = {}
    for problem, tiles in found.items():
        for tile in tiles:
            job = compiled.Job(target, problem.type, problem.pass_, problem.geometry, "plain", 0, tile)
            jobs.setdefault(job.binary, (job, []))[1].append((problem, tile))
    for job, kernel in compile_all([job for job, _ in jobs.values()], processes):
        users = jobs[job.binary][1]
        failed = isinstance(kernel, BaseException)
        if failed:
            print(f"left out, it does not compile: {users[0][1]}: {kernel!r}", file=sys.stderr)
        if failed or kernel.spills:
            for problem, tile in users:
                found[problem].remove(tile)
    return found


def compile_all(
    jobs: Sequence[compiled.Job], processes: int | None = None
) -> Iterator[tuple[compiled.Job, compiled.Kernel | BaseException]]:
    """Compile into Triton's cache on ``processes`` cores, by default all; yield what came of each job."""
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        running = {pool.submit(compiled.compile_job, job): job for job in jobs}
        for future in track(as_completed(running), "compiling", len(running)):
            yield running[future], future.exception() or future.result()


def _run(problem: Problem, operands: Operands, tile: Tile, form: torch.memory_format) -> Tensor:
    """A problem's pass on the kernels in one tile, its result in ``form``."""
    (x, w, dy), geometry = operands, problem.geometry
    if problem.pass_ == "forward":
        result = forward(x, w, None, geometry, None, tile=tile)
    elif problem.pass_ == "input_grad":
        result = input_grad(dy, w, geometry, tile=tile)
    else:
        result = weight_grad(dy, x, geometry, False, tile=tile)[0]
    return result.contiguous(memory_format=form)


def _errors(problem: Problem, operands: Operands, tiles: Iterable[Tile], truth: Tensor) -> dict[Tile, float]:
    """Each tile's error, but of those that need more shared memory than there is."""
    errors = {}
    for tile in tiles:
        try:
            result = run_poisoned(lambda o, tile=tile: _run(problem, o, tile, torch.channels_last), operands)
        except OutOfResources:
            continue
        errors[tile] = problem.error(result, truth)
    return errors


def _times(
    problem: Problem, sets: Sequence[Operands], errors: dict[Tile, float], device: torch.device
) -> dict[Tile, float]:
    """Microseconds of the tiles that are right."""
    contenders = {
        tile: _calls(lambda o, tile=tile: _run(problem, o, tile, torch.channels_last), sets)
        for tile, error in errors.items()
        if problem.matches(error)
    }
    times = time_together(contenders, device) if contenders else {}
    return {tile: round(t.p50 * 1e6, 3) for tile, t in times.items()}


def _calls(run: Callable[[Operands], Tensor], sets: Iterable[Operands]) -> list[Callable[[], Tensor]]:
    return [lambda operands=operands: run(operands) for operands in sets]
