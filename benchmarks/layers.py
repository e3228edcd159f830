"""Measure one pass of one layer with each contender: time, host time, memory, and error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import RUNNERS, Contender, Run, who_runs
from gconv.measure.problem import Operands, Problem, run_poisoned
from gconv.measure.suites import Layer
from gconv.measure.timing import (
    Call,
    Times,
    cudnn_searching,
    extra_memory,
    host_time,
    time_together,
)


@dataclass(frozen=True)
class LayerRow:
    """The measurements of one contender. Times are in microseconds.

    Args:
        suite, layer, batch, type, pass_: the pass that was run.
        runner, layout: the contender: an implementation, and the layout of its tensors.
        ran: the backend, kernel and tile that were used.
        p20, p50, p80: time of a call on the device; None for a wrong result.
        floor: the memory floor: the time to move the compulsory bytes at the speed of a copy.
        host: time until a call returns while the device is idle; None on a CPU, where it is the time of the
            call.
        extra_bytes: peak memory without the result; None on a CPU, where it isn't counted.
        error: largest difference from float64, relative to the largest value.
        problem: why there is no time: a wrong result or an error.
    """

    suite: str
    layer: str
    batch: int
    type: str
    pass_: str
    runner: str
    layout: str
    ran: str
    floor: float
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    host: float | None = None
    extra_bytes: int | None = None
    error: float | None = None
    problem: str | None = None


LAYER_CASE = ("suite", "layer", "batch", "type", "pass_")


def cases(
    suites: dict[str, Sequence[Layer]], batches: Sequence[int], types: Sequence[str], passes: Sequence[str]
) -> Iterator[tuple[tuple, Problem]]:
    """Yield each pass to measure: the values of ``LAYER_CASE`` that identify it, and the problem."""
    layers = [(suite, layer) for suite, of_suite in suites.items() for layer in of_suite]
    for type_, batch, (suite, layer), pass_ in product(types, batches, layers, passes):
        yield (suite, layer.name, batch, type_, pass_), Problem(pass_, layer.geometry(batch), type_)


def measure(
    case: tuple, problem: Problem, contenders: Iterable[Contender], device: torch.device, bandwidth: float
) -> list[LayerRow]:
    """Check all contenders of a case on the same operands, and time those with right results together.

    Args:
        case: values of ``LAYER_CASE``.
        problem: the pass.
        contenders: the implementations and layouts to compare.
        device: the device to run on.
        bandwidth: the speed of a copy, in bytes read plus written per second.
    """
    torch.compiler.reset()
    rows: dict[Contender, dict[str, Any]] = {}
    calls: dict[Contender, list[Call]] = {}
    with problem.precision(), cudnn_searching():
        drawn = problem.draw_sets(device)
        by_layout = {"channels_last": drawn, "contiguous": [_contiguous(operands) for operands in drawn]}
        truth = problem.truth(drawn[0])
        for contender in contenders:
            sets = by_layout[contender.layout]
            run, rows[contender] = _check(contender, problem, sets[0], truth, device)
            if rows[contender]["problem"] is None:
                calls[contender] = [lambda run=run, operands=operands: run(operands) for operands in sets]
        for contender, times in _time(calls, device).items():
            rows[contender] |= times
    named = dict(zip(LAYER_CASE, case, strict=True))
    named["floor"] = _microseconds(problem.bytes / bandwidth)
    return [LayerRow(**named, **asdict(contender), **row) for contender, row in rows.items()]


def _check(
    contender: Contender, problem: Problem, operands: Operands, truth: Tensor, device: torch.device
) -> tuple[Run | None, dict[str, Any]]:
    """Return the function that runs the contender, None if it fails, and its row without the times."""
    row: dict[str, Any] = {"ran": contender.runner, "problem": None}
    try:
        row["ran"] = who_runs(contender, problem, operands)
        run = RUNNERS[contender.runner](problem)
        row["error"] = float(f"{problem.error(run_poisoned(run, operands), truth):.2e}")
        row["extra_bytes"] = extra_memory(lambda: run(operands), device)
        if device.type == "cuda":
            row["host"] = _microseconds(host_time(lambda: run(operands), device))
    except Exception as error:  # a contender that can't run gets a row with the reason
        return None, row | {"problem": in_a_line(error)}
    if not problem.matches(row["error"]):
        row["problem"] = f"wrong by {row['error']:.1e}"
    return run, row


def _time(calls: dict[Contender, list[Call]], device: torch.device) -> dict[Contender, dict[str, Any]]:
    """Time all contenders together, or one by one if that fails, for example for lack of memory."""
    if not calls:
        return {}
    with suppress(Exception):
        return {contender: _quantiles(t) for contender, t in time_together(calls, device).items()}
    found = {}
    for contender, of_one in calls.items():
        try:
            found[contender] = _quantiles(time_together({contender: of_one}, device)[contender])
        except Exception as error:
            found[contender] = {"problem": in_a_line(error)}
    return found


def _quantiles(times: Times) -> dict[str, float]:
    return {name: _microseconds(seconds) for name, seconds in times._asdict().items()}


def in_a_line(error: Exception) -> str:
    """Return the first line of an error, shortened to fit in a row."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _contiguous(operands: Operands) -> Operands:
    return Operands(*(tensor.contiguous() for tensor in operands))


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)
