"""``python -m benchmarks report``: tables, plots and the README's images of measured rows."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from measurements import LAYER_ROWS, RUN, network_row

from benchmarks import __main__ as command
from benchmarks import counters, images, layers, networks, report, summary
from benchmarks.store import RESULTS_FOLDER, read_table


def test_the_report_has_the_results_of_the_first_half_hour(tmp_path: Path) -> None:
    facts = {"gpu": "NVIDIA Test", "cpu": "x86_64"}
    (tmp_path / "environment.json").write_text(json.dumps(facts))
    tests = {"counts": {"passed": 700, "failed": 1}, "sanitizer": {"outcome": "passed"}}
    (tmp_path / "tests.json").write_text(json.dumps(tests))
    answers = [{"problem": None}, {"problem": "off"}]
    (tmp_path / "check.json").write_text(json.dumps({"answers": answers, "verdict": "1 of 2 is WRONG."}))
    case = ("tiny", "16/4, 6x6", 4, "bfloat16", "forward")
    row = counters.CounterRow(*case, "strips_kernel", {"microseconds": 112.4, "l2_percent": 77.0})
    (tmp_path / "counters.jsonl").write_text(json.dumps(asdict(row)) + "\n")
    assert read_table(tmp_path / "counters.jsonl", counters.CounterRow)
    text = report.write_report(tmp_path)[0].read_text()
    assert "Tests on this GPU: 1 failed, 700 passed; compute-sanitizer: passed." in text
    assert "`python -m gconv`: 1 of 2 results are right. 1 of 2 is WRONG." in text
    assert "microseconds" in text and "l2 %" in text and "112.4" in text


def test_without_matplotlib_a_report_has_only_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([*RUN, "--passes", "forward", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    monkeypatch.setattr(report, "plots", None)
    assert command.main(["report", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'report.md'}\n" and "no plots" in said.err
    assert "## Summary of the layers" in (tmp_path / "report.md").read_text()


def test_networks_whose_times_overlap_tie() -> None:
    ours = network_row("resnext50_32x4d", "gconv", "eager", 2000.0) | {"p20": 127.0, "p80": 131.0}
    slower = network_row("resnext50_32x4d", "F.conv2d", "eager", 1900.0)
    theirs = network_row("resnext50_32x4d", "F.conv2d", "graphed", 1960.0)
    for p20, shown in ((130.0, "tie"), (131.5, "1.02x")):
        (gain,) = report.network_gains([ours, slower, theirs | {"p20": p20}], "training").values()
        assert str(gain) == shown


def test_a_tie_meets_no_goal_of_a_speedup() -> None:
    ours = network_row("resnext50_32x4d", "gconv", "eager", 2000.0) | {"p80": 160.0}
    theirs = network_row("resnext50_32x4d", "F.conv2d", "eager", 1500.0) | {"p20": 150.0}
    (aim,) = (aim for aim in report._aims([], [ours, theirs]) if "at least 1.25x F.conv2d" in aim[0])
    assert aim[1:] == ("tie", "no"), "although the medians are 1.33x apart"


def test_results_of_older_code_can_be_read() -> None:
    folder = RESULTS_FOLDER / "nvidia-h200"
    head, *lines = summary.summary_table(read_table(folder / "layers.jsonl", layers.LayerRow))
    counts = {line[3]: line[head.index("faster/tie/slower")] for line in lines}
    assert counts == {"forward": "5/2/0", "input_grad": "7/0/0", "weight_grad": "4/3/0"}
    assert report.network_gains(read_table(folder / "networks.jsonl", networks.NetworkRow), "training")


def test_the_report_quotes_the_rows(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text(
        json.dumps({"gpu": "NVIDIA Test", "cpu": "a", "commit": "abc123", "clock_sm_mhz": "345"})
    )
    table = [
        network_row("resnext50_32x4d", "gconv", "eager", 1500.0),
        network_row("resnext50_32x4d", "gconv", "compiled", 2400.0),
        network_row("resnext50_32x4d", "F.conv2d", "graphed", 2000.0),
        network_row("resnext50_32x4d", "fused", "graphed", 2700.0),
        network_row("resnext50_32x4d", "F.conv2d", "compiled", 1800.0),
        network_row("resnet50", "F.conv2d", "compiled", 3000.0),
        network_row("resnet50", "F.conv2d", "eager", None),
    ]
    for name, rows in (("layers", LAYER_ROWS), ("networks", table)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    written = report.write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# NVIDIA Test\n") and "| commit | abc123 |" in text
    for line in (
        "| clock sm mhz, idle | 345 |",
        "| 100.0 ±2.5% | 90.0 | 90% | torch.compile, channels_last | 250.0 ±0.0% | 2.50x |",
        "forward, resnext50_32x4d, batch 256, 16 bits: at least 85% of the floor, mean | 90% | yes |",
        "forward, resnext50_32x4d, batch 256, 16 bits: at least 70% of the floor, every layer | 90% | yes |",
        "16 bits: at least 4x F.conv2d in its faster layout, mean | 2.94x | no |",
        "`auto`: at least 0.98x F.conv2d in the same layout, every row | 0.98x | yes |",
        "forward, input_grad: no extra memory | 1.0 MiB | no |",
        "weight_grad: at most 32 MiB of extra memory | - | - |",
        "forward: at most 1.3x F.conv2d's host time in an eager call | 1.20x | yes |",
        "training of resnext50_32x4d, batch 256, 224x224: at least 1.25x F.conv2d, fastest modes "
        "| 1.20x | no |",
        "224x224, fused: at least 1.35x F.conv2d with torch.compile | 1.50x | yes |",
        "224x224, fused: at least 0.9x ResNet-50's images/s | 0.90x | yes |",
        "OutOfMemoryError: too large",
    ):
        assert line in text, line
    assert {path.name for path in written} == {
        "report.md", "networks.png", "time-resnext50_32x4d-bfloat16-256.png",
        "floor-resnext50_32x4d-bfloat16-256.png",
    }  # fmt: skip
    for path in written[1:]:
        assert path.read_bytes().startswith(b"\x89PNG") and f"({path.name})" in text


def test_the_readmes_images_are_drawn_from_the_committed_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The committed files, glyph for glyph."""
    folder = RESULTS_FOLDER / "nvidia-h200"
    assert command.main(["report", str(folder), "--images", str(tmp_path)]) == 0
    names = ["layers-light.svg", "profile.svg", "layers-dark.svg", "profile-dark.svg"]
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / name) for name in names]
    for name in names:
        drawn, committed = (
            (path / name).read_text() for path in (tmp_path, RESULTS_FOLDER.parents[1] / "docs" / "images")
        )
        assert re.findall("<!-- (.*?) -->", drawn) == re.findall("<!-- (.*?) -->", committed), name
    assert "<!-- NVIDIA H200, bfloat16, batch 256, channels_last; PyTorch 2.11.0, cuDNN 9.19 -->" in drawn


def test_images_show_the_newest_times() -> None:
    """The latest, in the tiles that the rules chose, as benchmarks/README.md lists them."""
    times = {(t.layer, t.pass_): t for t in images.pass_times(RESULTS_FOLDER / "nvidia-h200")}
    assert len(times) == 21
    first = times["128/32, 56x56", "forward"]
    assert (first.floor, first.gconv, first.cudnn) == (96.937, 112.27, 348.939)
    by_rule = times["512/32, 14x14", "weight_grad"]
    assert (by_rule.gconv, by_rule.cudnn) == (46.91, 92.538), "another tile took 44.73"
    (layer, *_) = images._profile_of(list(times.values()))
    assert (layer.name, layer.count) == ("layer1.0.conv2", 3)
    assert layer.floor == pytest.approx(3 * 96.937e-6)
    assert layer.seconds["gconv's kernels"] == pytest.approx((112.27 + 134.231 + 132.42) * 1e-6)


def test_images_need_times_and_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(["report", str(tmp_path), "--images", str(tmp_path / "images")])
    assert f"{tmp_path} has no results: run `python -m benchmarks run` first" in capsys.readouterr().err
    facts = {"gpu": "NVIDIA Test", "cpu": "x86_64", "capability": "9.0"}
    (tmp_path / "environment.json").write_text(json.dumps(facts))
    with pytest.raises(SystemExit):
        command.main(["report", str(tmp_path), "--images", str(tmp_path / "images")])
    assert f"{tmp_path} has no times to draw: `python -m benchmarks run --suite" in capsys.readouterr().err
    monkeypatch.setattr(images, "plots", None)
    with pytest.raises(SystemExit):
        images.write_images(RESULTS_FOLDER / "nvidia-h200", tmp_path / "images")
    assert capsys.readouterr().err.startswith("error: plots need matplotlib: install it with")
    assert not (tmp_path / "images").exists()
