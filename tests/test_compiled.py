"""What the compiler makes of the kernels, for GPUs that need not be there: no spills, few instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gconv.kernels import compiled
from gconv.kernels.__main__ import main
from gconv.problem import TYPES

ROOT = Path(__file__).parent.parent
NVIDIA = [target for target in compiled.TARGETS if target.startswith("sm_")]
TRITONS = {"installed": None, "3.6": ROOT / ".venv" / "triton-3.6"}  # `make matrix` fetches the second


def table(*options: str, triton: Path | None = None) -> dict:
    """What ``python -m gconv.kernels`` finds, with the installed Triton or the one in a folder."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(triton or "")}
    command = [sys.executable, "-m", "gconv.kernels", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


def spilling(kernels: list[dict]) -> list[dict]:
    return [kernel for kernel in kernels if kernel["spills"] and kernel["target"] in NVIDIA]


@pytest.mark.parametrize(
    ("form", "most"),
    [
        ("plain", (0.30, 0.30, 0.60)),
        pytest.param("norm", (1.05, 0.95, 0.95), marks=pytest.mark.long),
    ],
)
def test_resnext50_kernels_spill_nothing_and_take_few_instructions(
    form: str, most: tuple[float, float, float]
) -> None:
    kernels = table("--suite", "resnext50_32x4d", "--form", form, "--targets", "sm_90")["kernels"]
    assert kernels and {kernel["target"] for kernel in kernels} == {"sm_90"}, "the matrix has all"
    assert not spilling(kernels)
    slides = [kernel for kernel in kernels if kernel["name"].startswith(("slide", "residue"))]
    assert form == "norm" or {kernel["ahead"] for kernel in slides} == {"L1"}, "rows come ahead, through L1"
    first_layer = {
        layer.rpartition(": ")[2]: kernel["per_output"]
        for kernel in kernels
        for layer in kernel["layers"]
        if layer.startswith("128/32") and "slide" in kernel["name"]
    }
    for pass_, bound in zip(("forward", "input_grad", "weight_grad"), most, strict=True):
        assert first_layer[pass_] <= bound, pass_


@pytest.mark.matrix
@pytest.mark.parametrize("triton", TRITONS.values(), ids=TRITONS)
@pytest.mark.parametrize(
    "options",
    [[dtype] for dtype in TYPES] + [["float16", "--form", form] for form in ("epilogue", "residual", "norm")],
    ids=" ".join,
)
def test_every_tile_spills_nothing(options: list[str], triton: Path | None) -> None:
    assert triton is None or triton.exists(), f"no Triton in {triton}: make matrix fetches it"
    found = table("--dtypes", *options, triton=triton)
    assert triton is None or found["triton"].startswith("3.6.")
    assert {kernel["target"] for kernel in found["kernels"]} == set(compiled.TARGETS)
    assert not spilling(found["kernels"])


def test_main_loop_is_the_longest_innermost_one() -> None:
    listing = [
        ".L_x_0:",
        "MOV",
        ".L_x_1:",
        "HMMA",
        "LDG",
        "@P0 BRA (.L_x_1)",
        ".L_x_2:",
        "@P1 BRA (.L_x_2)",
        "BRA (.L_x_0)",
    ]
    assert compiled.main_loop(listing) == ["HMMA", "LDG", "@P0 BRA (.L_x_1)"]
    assert compiled.main_loop(["MOV", "EXIT"]) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--targets", "sm_91"], "invalid choice: 'sm_91'"),
        (["--dtypes", "float64"], "invalid choice: 'float64'"),
    ],
)
def test_wrong_names_are_refused(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["python -m gconv.kernels", *options])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_interpreter_compiles_nothing_and_says_so() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "gconv.kernels"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("error: TRITON_INTERPRET is set")
