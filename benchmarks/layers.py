"""One pass of one layer, by each contender: time, host time, memory, and whether the answer is right."""

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
    """What was measured of a contender; times in microseconds.

    Args:
        suite, layer, batch, type, pass_: what was run.
        runner, layout: who ran it, and on tensors of which layout.
        ran: the backend, kernel and tile that it came to.
        p20, p50, p80: time of a call on the device; None for a wrong answer.
        floor: the compulsory bytes at the speed of a copy.
        host: until a call returns, with nothing else to do; None on a CPU, where that is the whole call.
        extra_bytes: memory at its peak beyond the result; None on a CPU, where nobody counts.
        error: against float64, as a part of the largest number.
        problem: why there is no time: wrong, or what was raised.
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
    """Yield each pass to measure: its name, as in ``LAYER_CASE``, and the problem."""
    layers = [(suite, layer) for suite, of_suite in suites.items() for layer in of_suite]
    for type_, batch, (suite, layer), pass_ in product(types, batches, layers, passes):
        yield (suite, layer.name, batch, type_, pass_), Problem(pass_, layer.geometry(batch), type_)


def measure(
    case: tuple, problem: Problem, contenders: Iterable[Contender], device: torch.device, bandwidth: float
) -> list[LayerRow]:
    """Time all contenders of a case together on the same numbers, except those with wrong answers.

    ``bandwidth`` is that of a copy, in bytes read plus written a second.
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
    """Return how the contender runs, and its row without the times."""
    row: dict[str, Any] = {"ran": contender.runner, "problem": None}
    try:
        row["ran"] = who_runs(contender, problem, operands)
        run = RUNNERS[contender.runner](problem)
        row["error"] = float(f"{problem.error(run_poisoned(run, operands), truth):.2e}")
        row["extra_bytes"] = extra_memory(lambda: run(operands), device)
        if device.type == "cuda":
            row["host"] = _microseconds(host_time(lambda: run(operands), device))
    except Exception as error:  # a contender that cannot run is a row that says so
        return None, row | {"problem": in_a_line(error)}
    if not problem.matches(row["error"]):
        row["problem"] = f"wrong by {row['error']:.1e}"
    return run, row


def _time(calls: dict[Contender, list[Call]], device: torch.device) -> dict[Contender, dict[str, Any]]:
    """Time all contenders together; if that fails, such as for lack of memory, time them one by one."""
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
    """Return the first line of an error, for a row."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _contiguous(operands: Operands) -> Operands:
    return Operands(*(tensor.contiguous() for tensor in operands))


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)
