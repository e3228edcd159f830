"""``python -m gconv tune``: the table that it writes, and its errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from marks import interpreted

from gconv.commands import tune
from gconv.kernels import choice
from gconv.kernels.tiles import Tile
from gconv.measure import candidates, timing, tuner

ROOT = Path(__file__).parents[2]


@pytest.mark.long
@interpreted
def test_tune_writes_a_table_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(timing, "LEAST_ROUNDS", 1)
    monkeypatch.setattr(timing, "SECONDS", 0)
    monkeypatch.setattr(candidates, "SPLITS", (1,))
    compile_all = tuner.compile_candidates
    monkeypatch.setattr(
        tuner, "compile_candidates", lambda *a: {p: tiles[:1] for p, tiles in compile_all(*a).items()}
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
    assert f"4 passes: 2 already in {path}, 2 to measure" in capsys.readouterr().out
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
    assert stopped.value.code == 2 and f"{option[0]} must be a positive" in said
    assert f"got {option[1]!r}" in said


@interpreted
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suite", "tiny"], "--out FILE is required with Triton's interpreter"),
        (["--model", "nowhere:net", "--out", "x"], "can't import nowhere:net: No module named 'nowhere'"),
        (["--model", "resnext:nothing", "--out", "x"], "has no attribute 'nothing'"),
        (
            ["--model", "resnext:resnet50", "--out", "x"],
            "--model resnext:resnet50 has no grouped convolutions",
        ),
        (
            ["--model", "resnext:resnext50_32x4d", "--image", "1", "8", "8", "--out", "x"],
            "can't run --model resnext:resnext50_32x4d on an input of size (1, 8, 8): ",
        ),
        (["--suite", "tiny", "--out", "/proc/nowhere/table.json"], "can't read or write /proc/nowhere"),
        (["--suite", "tiny", "--out", __file__], "; move the file, or choose a different --out"),
        (
            ["--model", "resnext", "--out", "x"],
            "the model must be MODULE:FUNCTION, such as torchvision.models:resnext50_32x4d, got 'resnext'",
        ),
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
    command = [sys.executable, "-m", "gconv.tune"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("error: the kernels need a CUDA or ROCm device")
