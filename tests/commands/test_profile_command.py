"""``python -m gconv profile``: tables, plots, and errors in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from gconv.commands.main import main


def tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2))


def broken() -> nn.Module:
    return nn.Conv2d(4, 8, 1)


def lazy() -> nn.Module:
    return nn.LazyConv2d(4, 1)


def no_network() -> tuple:
    return ()


@pytest.mark.parametrize("options", [[], ["--train"], ["--channels-last", "--type", "bfloat16"]])
def test_a_network_is_profiled(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--batch", "2", "--image", "3", "6", "6"]
    assert main(["profile", f"{__name__}:tiny", *small, *options]) == 0
    out = capsys.readouterr().out
    what = "training step" if "--train" in options else "forward pass"
    type_ = "bfloat16" if "bfloat16" in options else "float32"
    assert f"2 convolutions in a {what}, torch.{type_} on cpu" in out and "2 x 8/2 x 6 x 6 -> 8, 3x3" in out


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "gconv",
            "the model must be MODULE:FUNCTION, such as torchvision.models:resnext50_32x4d, got 'gconv'",
        ),
        ("no.such:net", "no.such:net: No module named 'no'"),
        ("gconv:nothing", "gconv:nothing: module 'gconv' has no attribute 'nothing'"),
        (f"{__name__}:broken", f"can't run {__name__}:broken on an input of size (32, 3, 224, 224): "),
        (f"{__name__}:lazy", "the model has lazy layers that haven't seen an input yet: run it once before"),
        (f"{__name__}:no_network", "must return an nn.Module, got tuple"),
    ],
)
def test_errors_are_one_line(model: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["profile", model])
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ") and err.count("\n") == 1


def test_plots_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times, roofline = tmp_path / "times.svg", tmp_path / "roofline.png"
    small = ["--plot", str(times), "--roofline", str(roofline), "--batch", "2", "--image", "3", "6", "6"]
    assert main(["profile", f"{__name__}:tiny", *small]) == 0
    assert capsys.readouterr().out.endswith(f"plot: {times}\nplot: {roofline}\n")
    assert f"<!-- {__name__}:tiny -->" in times.read_text()
    assert roofline.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plot", "times.jpg"], "the name of a plot must end in .png, .svg or .pdf, got times.jpg"),
        (["--roofline", "no/such/folder.svg"], "can't write no/such/folder.svg: there is no folder no/such"),
        (["--channels-last", "--input", "3", "8"], "--channels-last needs --input C H W or C D H W, got 3 8"),
    ],
)
def test_options_that_cannot_work_fail_before_anything_runs(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["profile", f"{__name__}:tiny", *options])
    assert capsys.readouterr().err == f"error: {message}\n"
