"""``python -m gconv``: the check of this machine, with right and wrong results, times and a verdict."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from gconv.commands.main import main
from gconv.geometry import PASSES
from gconv.measure import check
from gconv.measure.check import CheckedPass, CheckReport, TimedPass
from gconv.measure.problem import Problem
from gconv.measure.timing import Times

FACTS = {
    **dict.fromkeys(("python", "torch", "triton", "gconv"), "1.0"),
    **{"gpu": "NVIDIA Test", "cpu": "x86_64, 16 cores", "capability": "9.0", "driver": "580", "cudnn": 91900},
}


def times(median: float) -> Times:
    return Times(0.99 * median, median, 1.01 * median)


def found(auto: str = "triton", wrong: str = "") -> CheckReport:
    """A report for a GPU: in each pass the kernels take 50 us, PyTorch 100 us, and contiguous 400 us."""
    timings = [
        TimedPass(layer.name, pass_, 25.0, times(50), times(100), times(400), auto)
        for layer in check.LAYERS
        for pass_ in PASSES
    ]
    answers = [CheckedPass("triton", "float16", "forward", "128/32, 56x56", "right", 1e-4)]
    outcome = "wrong" if wrong else "right"
    answers += [CheckedPass("triton", "tf32", "forward", "128/32, 56x56", outcome, 0.5, wrong)]
    return CheckReport(FACTS, "measured", True, tuple(answers), 256, tuple(timings))


def test_without_a_gpu_it_says_that_there_is_nothing_to_gain_and_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "LAYERS", check.LAYERS[-2:])
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "no CUDA or ROCm GPU" in out and f"torch {torch.__version__}" in out
    for backend in ("aten", "reference"):
        assert f"{backend}: 6 of 6 results match float64, in float32\n" in out
    assert out.endswith(
        "\n\nNothing to gain here: gconv has no kernels for cpu, so PyTorch's own convolution runs.\n"
    )

    assert main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["environment"]["torch"] == torch.__version__ and report["timings"] == []
    assert len(report["answers"]) == 12 and all(a["error"] < 1e-5 for a in report["answers"])
    assert report["verdict"].startswith("Nothing to gain here")


def test_a_wrong_result_is_named_and_fails_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "LAYERS", check.LAYERS[-1:])
    run = Problem.run

    def break_one(problem: Problem, operands: object, backend: str) -> torch.Tensor:
        result = run(problem, operands, backend)
        if (problem.pass_, backend) == ("input_grad", "aten"):
            raise RuntimeError("no such kernel\nand more")
        wrong = {"forward": 1.0, "weight_grad": torch.nan}.get(problem.pass_, 0.0)
        return result + wrong if backend == "reference" else result

    monkeypatch.setattr(Problem, "run", break_one)
    assert main([]) == 1
    out = capsys.readouterr().out
    assert "aten: 2 of 3 results match float64, in float32\n" in out
    assert "  1024/32, 7x7, input_grad, float32: FAILED, RuntimeError: no such kernel\n" in out
    assert "  1024/32, 7x7, forward, float32: WRONG, off by " in out
    assert "  1024/32, 7x7, weight_grad, float32: WRONG, contains NaN or infinity\n" in out
    assert "3 of 6 results are WRONG" in out and "report" in out
    assert main(["--json"]) == 1
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [a["error"] is None for a in report["answers"]] == [False, True, False, False, False, True]


def test_the_table_of_a_gpu_and_its_verdict() -> None:
    lines = str(found()).splitlines()
    assert "machine  NVIDIA Test, compute capability 9.0, driver 580, cuDNN 91900" in lines
    head = next(line for line in lines if line.startswith("layer"))
    assert head.split() == [
        *("layer", "pass", "floor", "gconv", "of", "floor", "cuDNN", "contiguous", "speedup", "auto", "uses")
    ]
    row = next(line for line in lines if line.startswith("128/32, 56x56"))
    assert row.split()[2:] == ["forward", "25.0", "50.0", "50%", "100.0", "400.0", "2.00x", "gconv"]
    assert lines[-1] == (
        "gconv.convert(model) speeds up ResNeXt-50's grouped convolutions 2.00x in training and 2.00x in "
        "inference over PyTorch in its faster layout (8.00x and 8.00x over a contiguous network)."
    )


def test_the_verdict_counts_what_auto_takes_and_how_often_a_layer_comes() -> None:
    report = found("aten")
    assert report.verdict.startswith("Nothing to gain for ResNeXt-50") and "tune" in report.verdict
    first = replace(report.timings[0], auto="triton")  # halves the time of 3 of the 16 forward passes
    report = replace(report, timings=(first, *report.timings[1:]))
    inference, training = 1600 / (3 * 50 + 13 * 100), 4800 / (3 * 50 + 45 * 100)
    assert f"convolutions {training:.2f}x in training and {inference:.2f}x in inference" in report.verdict
    row = next(line for line in str(report).splitlines() if line.startswith("1024/32, 7x7"))
    assert row.endswith("2.00x     cuDNN") or row.split()[-1] == "cuDNN"


def test_a_tie_is_one_with_the_better_layout() -> None:
    report = found()
    for contiguous, speedup in ((400, "tie"), (50, "0.50x")):
        row = replace(report.timings[0], gconv=times(99.5), contiguous=times(contiguous))
        table = str(replace(report, timings=(row,))).splitlines()
        assert next(line for line in table if line.startswith("128/32")).split()[-2] == speedup


def test_kernels_that_auto_takes_though_they_are_slower_are_told() -> None:
    report = found()
    assert "slower here" not in str(report)
    slow = [
        replace(report.timings[0], gconv=times(t), auto=auto) for t, auto in ((103, "triton"), (200, "aten"))
    ]
    remark = "in 1 of 11 passes, auto uses kernels that are slower here"
    assert remark in str(replace(report, timings=(*slow, *report.timings[2:])))


def test_a_small_gpu_is_not_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report lists the passes that don't fit, and the verdict covers the others."""
    answer = CheckedPass(
        "triton", "tf32", "forward", "128/32, 56x56", "no memory", message="doesn't fit in the GPU's memory"
    )
    report = found()
    report = replace(
        report, answers=(answer,), timings=report.timings[3:], untimed=("128/32, 56x56, forward",)
    )
    assert not report.wrong
    assert "  128/32, 56x56, forward, tf32: NO MEMORY, doesn't fit in the GPU's memory" in str(report)
    remark = "not timed, because it doesn't fit in the GPU's memory: 128/32, 56x56, forward"
    assert remark in str(report)
    assert "ResNeXt-50's grouped convolutions that fit in memory 2.00x in training" in report.verdict
    assert "Try a smaller --batch" in replace(report, timings=()).verdict

    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Problem, "draw", full)
    monkeypatch.setattr(check, "LAYERS", check.LAYERS[-1:])
    assert {answer.outcome for answer in check.check().answers} == {"no memory"}


def test_wrong_kernels_have_no_gain() -> None:
    report = found(wrong="off by 5.0e-01, relative to the largest value")
    assert report.verdict.startswith("1 of 2 results are WRONG: don't use gconv on this machine")
