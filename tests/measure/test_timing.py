"""Timing: turns, quantiles, ties, the pause before each graph, and clocks under load."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gconv.measure import environment, timing

CPU = torch.device("cpu")


def test_calls_take_turns_and_their_quantiles_are_in_order() -> None:
    ran = []

    def sleeping(name: str, seconds: float) -> timing.Call:
        return lambda: (ran.append(name), time.sleep(seconds))[0]

    calls = {"long": [sleeping("long", 4e-3)], "short": [sleeping("short", 1e-3), sleeping("other", 1e-3)]}
    times = timing.time_together(calls, CPU)
    assert 4e-3 <= times["long"].p20 <= times["long"].p50 <= times["long"].p80 < 8e-3
    assert 1e-3 <= times["short"].p50 < 3e-3
    assert ran[-6:] == ["long", "short", "long", "other", "long", "short"] or ran[-6:] == [
        "long", "other", "long", "short", "long", "other",
    ]  # fmt: skip


def test_wall_time_is_that_of_one_call() -> None:
    times = timing.wall_time(lambda: time.sleep(2e-3), CPU, seconds=0.1)
    assert 2e-3 <= times.p20 <= times.p50 <= times.p80 < 6e-3


def test_quantiles() -> None:
    assert timing.Times.of(range(11)) == (2, 5, 8)
    assert timing.Times.of([7]) == (7, 7, 7)


def test_times_whose_quantiles_overlap_tie() -> None:
    times = timing.Times(98, 100, 104)
    assert times.spread == 0.03
    for other, tie in (((104, 105, 106), True), ((105, 106, 107), False), ((90, 94, 97), False)):
        other = timing.Times(*other)
        assert times.ties(other) == other.ties(times) == tie
    assert times.ties(timing.Times(99, 99.5, 100)), "one inside the other"


def test_the_pause_before_a_graph_is_twice_as_long_as_the_longest_launch() -> None:
    launches, order = iter([2e-3, 8e-3, 1e-3]), []

    def launch() -> None:
        order.append("launch")
        time.sleep(next(launches))

    cycles = timing.pause_before(launch, lambda: order.append("idle"), clock=1e9)
    assert 16e-3 <= cycles / 1e9 < 32e-3
    assert order == ["idle", "launch"] * timing.LAUNCHES + ["idle"]
    assert timing.pause_before(lambda: None, lambda: None, 2e9) == 2e9 * timing.LEAST_PAUSE


@pytest.mark.parametrize(
    ("reported", "clock"), [({"clock_rate": 1_980_000}, 1.98e9), ({}, 3.5e9), ({"clock_rate": 1}, 3.5e9)]
)
def test_the_clock_of_a_pause_is_the_highest(
    reported: dict, clock: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**reported))
    assert timing.highest_clock(torch.device("cuda")) == clock


def test_a_graph_starts_after_a_pause_that_covers_its_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...
        def record(self) -> None:
            order.append("event")

    class Graph:
        def replay(self) -> None:
            order.append("graph")
            time.sleep(4e-3)

    fakes = {"Event": Event, "CUDAGraph": Graph, "_sleep": lambda cycles: order.append(cycles)}
    fakes |= dict.fromkeys(("device", "stream", "graph"), lambda *_, **__: nullcontext())
    fakes |= {"synchronize": lambda *_: None, "get_device_properties": lambda _: SimpleNamespace()}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    run = timing._GraphRun.__new__(timing._GraphRun)
    run.memory = SimpleNamespace(device=None, pool=None, stream=None)
    run._capture([lambda: torch.ones(1)], 1)
    order.clear()
    run()
    assert order == [run.pause, "event", "graph", "event"]
    assert run.pause >= 2 * 4e-3 * timing.HIGHEST_CLOCK


@pytest.mark.parametrize("there", [True, False])
def test_clocks_are_read_while_the_gpu_is_busy(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = []
    if there:
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 580.1, 1755, 3201, 1980, 700.00\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    output = environment._output
    monkeypatch.setattr(
        environment, "_output", lambda *command: (_wait_for_more(copies), output(*command))[1]
    )
    monkeypatch.setattr(
        environment, "_copying", lambda device: lambda: (time.sleep(1e-3), copies.append(device))
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="a"))
    facts = environment._nvidia_smi(torch.device("cuda"))
    if not there:
        assert facts == {} and copies == []
        return
    assert facts == {
        "driver": "580.1", "clock_sm_under_load_mhz": "1755", "clock_memory_under_load_mhz": "3201",
        "clock_sm_max_mhz": "1980", "power_limit_w": "700.00",
    }  # fmt: skip
    before = len(copies)
    time.sleep(0.01)
    assert len(copies) == before, "idle again"


def _wait_for_more(copies: list) -> None:
    """Return once another copy is made; fail after a second."""
    before, end = len(copies), time.monotonic() + 1
    assert before > 0, "busy before nvidia-smi is asked"
    while len(copies) == before:
        assert time.monotonic() < end
        time.sleep(1e-3)
