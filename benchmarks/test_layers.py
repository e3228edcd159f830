"""The measurements of ``python -m benchmarks run`` as pytest-benchmark cases, grouped by layer and pass.

On a GPU, the columns show the wall time until a call has finished on the device. The device times, as
``python -m benchmarks run`` measures them, are in ``extra_info``.
"""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.layers import cases, measure
from benchmarks.peers import RUNNERS, Contender
from gconv.dispatch import this_device
from gconv.geometry import PASSES
from gconv.measure.problem import Problem
from gconv.measure.suites import SUITES
from gconv.measure.timing import copy_speed, cudnn_searching

GPU = torch.cuda.is_available()
DEVICE = this_device()
TIMED_BATCH = 256 if GPU else 4
TIMED_TYPES = ("bfloat16", "tf32") if GPU else ("float32",)
CONTENDERS = [Contender("auto", "channels_last"), Contender("F.conv2d", "channels_last")]
CONTENDERS += [Contender("F.conv2d", "contiguous") if GPU else Contender("reference", "channels_last")]
CASES = list(cases({"resnext50_32x4d": SUITES["resnext50_32x4d"]}, [TIMED_BATCH], TIMED_TYPES, PASSES))


@pytest.mark.parametrize("contender", CONTENDERS, ids=str)
@pytest.mark.parametrize(("case", "problem"), CASES, ids=[f"{c[1]}, {c[3]}, {c[4]}" for c, _ in CASES])
def test_layer(benchmark: BenchmarkFixture, case: tuple, problem: Problem, contender: Contender) -> None:
    """A time counts only if the result is right."""
    (row,) = measure(case, problem, [contender], DEVICE, copy_speed(DEVICE))
    assert row.problem is None, row.problem
    suite, layer, batch, type_, pass_ = case
    benchmark.group = f"{suite}: {layer}, batch {batch}, {type_}, {pass_}"
    benchmark.extra_info |= asdict(row)
    operands = problem.draw(DEVICE, contender.layout)
    with problem.precision(), cudnn_searching():
        run = RUNNERS[contender.runner](problem)
        synchronize = torch.get_device_module(DEVICE).synchronize
        benchmark.pedantic(lambda: (run(operands), synchronize()), rounds=10, iterations=1, warmup_rounds=2)
