"""What measurements rest on: operands, PyTorch's way, the truth, times and tuning."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from marks import interpreted
from torch import nn

import gconv
from gconv.commands import tune
from gconv.geometry import PASSES, ConvGeometry, Padding
from gconv.kernels.tiles import Tile
from gconv.measure import environment, recorder, timing
from gconv.measure.problem import LAYOUTS, TYPES, Problem
from gconv.measure.suites import SUITES, Layer

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
LAYER = Layer(8, 4, 5, stride=2)


def test_suites_hold_the_grouped_layers_of_the_networks() -> None:
    """As the networks themselves, traced on one image, have them."""
    from resnext import resnext50_32x4d, resnext101_32x8d, resnext101_64x4d

    for make in (resnext50_32x4d, resnext101_32x8d, resnext101_64x4d):
        found = recorder.grouped_convolutions(make, (3, 224, 224))
        assert {layer.geometry(1) for layer in SUITES[make.__name__]} == set(found)


def test_recorder_meets_functional_calls_padding_and_gconv_and_no_dense_ones() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Conv2d(3, 8, 1)
            self.grouped = nn.Conv2d(8, 8, 3, padding="same", groups=4)
            self.ours = gconv.GroupConv2d(8, 8, 3, stride=2, groups=2, bias=False)
            self.weight = nn.Parameter(torch.randn(8, 1, 3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.grouped(self.grouped(self.dense(x)))
            return F.conv2d(F.pad(self.ours(x), [1, 2, 1, 2]), self.weight, groups=8)

    found = recorder.grouped_convolutions(Net, (3, 9, 9))
    assert [(g.groups, g.input_size, g.padding) for g in found] == [
        (4, (1, 8, 9, 9), Padding(1, 1, 1, 1)),
        (2, (1, 8, 9, 9), Padding(0, 0, 0, 0)),
        (8, (1, 8, 7, 7), Padding(0, 0, 0, 0)),
    ]


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("batch", [1, 11])
def test_pytorch_and_truth_are_conv2d_and_its_gradient(pass_: str, batch: int) -> None:
    problem = Problem(pass_, LAYER.geometry(batch), "float32")
    x, w, dy = operands = problem.draw(CPU)
    leaves = [x.double().requires_grad_(), w.double().requires_grad_()]
    y = F.conv2d(*leaves, stride=2, padding=1, groups=4)
    dx, dw = torch.autograd.grad(y, leaves, dy.double())
    right = {"forward": y.detach(), "input_grad": dx, "weight_grad": dw}[pass_]
    for result in (problem.run_pytorch(operands), problem.run(operands, "reference")):
        torch.testing.assert_close(result.double(), right, atol=1e-4, rtol=1e-4)
        assert problem.matches(problem.error(result, problem.truth(operands)))
    torch.testing.assert_close(
        problem.truth(operands), right if pass_ == "weight_grad" else right[:: -(-batch // 8)]
    )


@pytest.mark.parametrize("type_", TYPES)
def test_one_wrong_number_does_not_match(type_: str) -> None:
    problem = Problem("forward", Layer(16, 4, 14).geometry(2), type_)
    operands = problem.draw(CPU)
    truth, result = problem.truth(operands), problem.run_pytorch(operands)
    assert problem.matches(problem.error(result, truth))
    for wrong in (result[0, 3, 0, 7] + 0.3, torch.nan):
        broken = result.clone()
        broken[0, 3, 0, 7] = wrong
        assert not problem.matches(problem.error(broken, truth))


def test_tf32_does_not_pass_for_float32() -> None:
    problem = Problem("forward", Layer(16, 4, 14).geometry(2), "float32")
    x, w, dy = problem.draw(CPU)
    as_tf32 = [(t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (x, w)]  # ten bits of mantissa
    result = problem.run_pytorch(type(problem.draw(CPU))(*as_tf32, dy))
    error = problem.error(result, problem.truth(problem.draw(CPU)._replace(x=x, weight=w)))
    assert not problem.matches(error) and replace(problem, type="tf32").matches(error)


def test_operands_lie_as_asked_and_precision_is_restored() -> None:
    problem = Problem("forward", LAYER.geometry(2), "tf32")
    for layout, form in LAYOUTS.items():
        assert all(t.is_contiguous(memory_format=form) for t in problem.draw(CPU, layout))
    before = torch.backends.cudnn.conv.fp32_precision
    for type_, inside in (("tf32", "tf32"), ("float32", "none"), ("float16", before)):
        with replace(problem, type=type_).precision():
            assert torch.backends.cudnn.conv.fp32_precision == inside
            torch._C._get_cudnn_allow_tf32()  # raises where two ways to set it were mixed
        assert torch.backends.cudnn.conv.fp32_precision == before
        torch._C._get_cudnn_allow_tf32()


def test_unlike_paddings_have_a_peer_too() -> None:
    geometry = ConvGeometry((2, 4, 6, 5), (4, 2, 2, 2), (1, 1), Padding(0, 1, 0, 1), (1, 1), 2)
    problem = Problem("input_grad", geometry, "float32")
    operands = problem.draw(CPU)
    torch.testing.assert_close(problem.run_pytorch(operands), problem.run(operands, "reference"))


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
    ("told", "clock"), [({"clock_rate": 1_980_000}, 1.98e9), ({}, 3.5e9), ({"clock_rate": 1}, 3.5e9)]
)
def test_the_clock_of_a_pause_is_the_highest(
    told: dict, clock: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**told))
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
    """Return once another copy is made, or fail after a second."""
    before, end = len(copies), time.monotonic() + 1
    assert before > 0, "busy before nvidia-smi is asked"
    while len(copies) == before:
        assert time.monotonic() < end
        time.sleep(1e-3)


@interpreted
def test_tuning_leaves_out_what_is_wrong_and_keeps_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    from gconv.kernels.device import device_of
    from gconv.measure import tuner as tuning
    from gconv.measure.candidates import candidates

    problem = Problem("forward", SUITES["tiny"][0].geometry(1), "float16")
    wrong, slow, fast = candidates("forward", problem.geometry, torch.float16, "ieee", device_of(CPU))[:3]
    run = tuning._run

    def run_some_badly(problem: Problem, operands: object, tile: object, form: object) -> torch.Tensor:
        time.sleep(0.05 if tile.stages == slow.stages else 0)
        result = problem.run_pytorch(operands).contiguous(memory_format=form)
        return result * 1.5 if tile == wrong else result

    monkeypatch.setattr(tuning, "_run", run_some_badly)
    finding = tuning.tune(problem, [wrong, slow, fast], CPU)
    assert replace(finding.tile, resident=fast.resident) == fast
    assert list(finding.wrong) == [wrong] and finding.wrong[wrong] > 0.1
    assert (
        finding.entry.tile == finding.tile
        and set(finding.times) >= {slow, fast}
        and wrong not in finding.times
    )
    assert set(finding.triton) == set(finding.aten) == set(LAYOUTS)

    monkeypatch.setattr(tuning, "_run", lambda *a: run(*a) * 1.5)
    finding = tuning.tune(problem, [fast], CPU)
    assert finding.tile is None and finding.triton == {} and set(finding.aten) == set(LAYOUTS)


def test_tuning_leaves_out_what_spills_or_does_not_compile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from gconv.kernels.device import Device
    from gconv.measure import compiled
    from gconv.measure import tuner as tuning
    from gconv.measure.candidates import candidates

    gpu = Device("cuda", "NVIDIA Test", 132, 90)
    problem = Problem("forward", SUITES["tiny"][0].geometry(1), "float16")
    broken, spilling, *others = candidates("forward", problem.geometry, torch.float16, "ieee", gpu)

    def compile_job(job: Any) -> SimpleNamespace:
        if job.tile == broken:
            raise ValueError("too large")
        return SimpleNamespace(spills=int(job.tile == spilling))

    monkeypatch.setattr(tuning, "device_of", lambda _: gpu)
    monkeypatch.setattr(compiled, "target_of", lambda _: "sm_90")
    monkeypatch.setattr(compiled.Job, "binary", property(lambda job: job.tile))
    monkeypatch.setattr(compiled, "compile_job", compile_job)
    monkeypatch.setattr(tuning, "ProcessPoolExecutor", lambda processes, _: ThreadPoolExecutor(processes))
    assert tuning.compile_candidates([problem], CPU) == {problem: others}
    assert f"left out, it does not compile: {broken}: ValueError('too large')" in capsys.readouterr().err


@interpreted
@pytest.mark.long
@pytest.mark.parametrize("pass_", PASSES)
def test_every_candidate_of_a_tiny_layer_is_right(pass_: str) -> None:
    from gconv.measure import tuner as tuning

    for layer in SUITES["tiny"]:
        problem = Problem(pass_, layer.geometry(1), "float16")
        ((_, compiled),) = tuning.compile_candidates([problem], CPU).items()
        # The interpreter knows neither stages nor registers.
        tiles = list(dict.fromkeys(replace(tile, stages=1, registers=None) for tile in compiled))
        operands = problem.draw(CPU)
        errors = tuning._errors(problem, operands, tiles, problem.truth(operands))
        assert len(errors) == len(tiles) > 5
        assert all(map(problem.matches, errors.values())), errors


@pytest.mark.long
@interpreted
def test_tune_writes_a_table_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from gconv.kernels import choice
    from gconv.measure import candidates
    from gconv.measure import tuner as tuning

    monkeypatch.setattr(timing, "LEAST_ROUNDS", 1)
    monkeypatch.setattr(timing, "SECONDS", 0)
    monkeypatch.setattr(candidates, "SPLITS", (1,))
    compile_all = tuning.compile_candidates
    monkeypatch.setattr(
        tuning, "compile_candidates", lambda *a: {p: tiles[:1] for p, tiles in compile_all(*a).items()}
    )
    path = tmp_path / "new" / "table.json"
    times = tmp_path / "times.jsonl"
    command = ["--suite", "tiny", "--batch", "1", "--dtypes", "float16", "--out", str(path)]
    assert tune.main([*command, "--passes", "forward", "--times", str(times)]) == 0
    measured = [json.loads(line) for line in times.read_text().splitlines()]
    assert len(measured) >= 2 and all(line["us"] > 0 and Tile(**line["tile"]) for line in measured)
    assert len(choice.read_entries(path)) == 2
    assert "speedup" in capsys.readouterr().out
    assert tune.main([*command, "--passes", "forward", "input_grad"]) == 0
    assert "4 passes of layers, 2 of them" in capsys.readouterr().out
    entries = choice.read_entries(path)
    assert [entry.kind[0] for entry in entries] == ["forward", "forward", "input_grad", "input_grad"]
    assert json.loads(path.read_text())["environment"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    "option", [["--batch", "0"], ["--minutes", "nan"], ["--processes", "-1"]], ids=" ".join
)
def test_numbers_that_make_no_sense_are_refused(option: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        tune.main(option)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and f"argument {option[0]}: must be a positive" in said
    assert f"got {option[1]!r}" in said


@interpreted
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suite", "tiny"], "--out FILE is needed"),
        (["--model", "nowhere:net", "--out", "x"], "nowhere:net: No module named 'nowhere'"),
        (["--model", "resnext:nothing", "--out", "x"], "has no attribute 'nothing'"),
        (
            ["--model", "resnext:resnet50", "--out", "x"],
            "--model resnext:resnet50: has no grouped convolution",
        ),
        (["--model", "resnext:resnext50_32x4d", "--image", "1", "8", "8", "--out", "x"], "does not run on"),
        (["--suite", "tiny", "--out", "/proc/nowhere/table.json"], "/proc/nowhere"),
        (["--suite", "tiny", "--out", __file__], "test_measuring.py is no table of gconv's"),
        (["--model", "resnext", "--out", "x"], "resnext must be MODULE:FUNCTION"),
    ],
    ids=lambda part: part if isinstance(part, str) else " ".join(part),
)
def test_what_tune_cannot_do_is_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        tune.main(options)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_tuning_without_a_gpu_says_what_it_needs() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "gconv.commands.tune"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("error: the kernels need a CUDA or ROCm device")
