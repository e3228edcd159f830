"""The scripts of ``examples/``, run for real."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zoo

ROOT = Path(__file__).parents[2]
Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """What ``python tests/support/zoo.py examples/SCRIPT ...`` prints, in this process."""

    def call(name: str, *options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["tests/support/zoo.py", str(ROOT / "examples" / name), *options])
        zoo.main()
        return capsys.readouterr().out

    return call


def test_first_steps(run: Run) -> None:
    out = run("first_steps.py", "--batch", "2", "--image", "28")
    assert "converted 2 of 7 convolutions; 5 dense (groups=1), not listed" in out and "floor" in out
    logits, gradients = re.search(r"relative difference .*: logits (\S+), gradients (\S+)\n", out).groups()
    assert float(logits) < 1e-5 and float(gradients) < 1e-5


def test_timm_network_in_three_lines(run: Run) -> None:
    out = run("timm_in_three_lines.py", "--model", "test_nfnet", "--batch", "2", "--image", "64")
    assert "converted 6 of 33 convolutions" in out
    assert float(re.search(r"largest difference: (\S+)", out)[1]) < 1e-5
    assert "convolutions in a forward pass, torch.float32 on cpu" in out


@pytest.mark.long
def test_regnet_learns(run: Run) -> None:
    out = run("train_regnet.py", "--steps", "5", "--batch", "32")
    assert out.startswith("regnety_002: converted 13 of 70 convolutions")
    assert re.search(r"step    5  loss \d\.\d{3}\n.*% of 300 held-out digits right", out)


@pytest.mark.long
def test_convnext_with_depthwise(run: Run) -> None:
    out = run("convnext_depthwise.py")
    assert out.startswith(
        "convert(model): 0 layers converted\n"
        "convert(model, depthwise=True, filter=...): 10 layers converted, such as\n"
    )
    assert "stages.1.blocks.0.conv_dw: GroupConv2d(" in out and "floor" in out
    assert out.endswith("revert(model): 10 layers converted back\nlargest difference: 0.0e+00\n")


def test_conformer_for_speech(run: Run) -> None:
    out = run("conformer.py", "--frames", "50", "--channels", "16", "--blocks", "2")
    assert "converted 2 of 2 convolutions" in out and "8 x 16 x 50 -> 8 x 16 x 50" in out
    assert "largest difference: 0.0e+00" in out
    assert "8 x 16/16 x 50 -> 16, kernel 31" in out


def test_every_example_is_run() -> None:
    names = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
    assert names == sorted(re.findall(r'run\("(\w+\.py)"', Path(__file__).read_text()))
