"""``python -m benchmarks report``: what rows say, in tables and pictures."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from measurements import LAYER_ROWS, RUN, network_row

from benchmarks import __main__ as command
from benchmarks import counters, layers, networks, report, summary
from benchmarks.store import RESULTS_FOLDER, read_table


def test_the_report_tells_what_the_first_half_hour_found(tmp_path: Path) -> None:
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
    assert "`python -m gconv`: 1 of 2 results right. 1 of 2 is WRONG." in text
    assert "microseconds" in text and "l2 %" in text and "112.4" in text


def test_without_matplotlib_a_report_has_tables_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([*RUN, "--passes", "forward", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    monkeypatch.setattr(report, "plots", None)
    assert command.main(["report", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'report.md'}\n" and "no plots" in said.err
    assert "## Layers in short" in (tmp_path / "report.md").read_text()


def test_networks_whose_times_overlap_tie() -> None:
    ours = network_row("resnext50_32x4d", "gconv", "eager", 2000.0) | {"p20": 127.0, "p80": 131.0}
    slower = network_row("resnext50_32x4d", "F.conv2d", "eager", 1900.0)
    theirs = network_row("resnext50_32x4d", "F.conv2d", "graphed", 1960.0)
    for p20, shown in ((130.0, "tie"), (131.5, "1.02x")):
        (gain,) = report.network_gains([ours, slower, theirs | {"p20": p20}], "training").values()
        assert str(gain) == shown


def test_a_tie_meets_no_aim_of_a_speedup() -> None:
    ours = network_row("resnext50_32x4d", "gconv", "eager", 2000.0) | {"p80": 160.0}
    theirs = network_row("resnext50_32x4d", "F.conv2d", "eager", 1500.0) | {"p20": 150.0}
    (aim,) = (aim for aim in report._aims([], [ours, theirs]) if "at least 1.25x" in aim[0])
    assert aim[1:] == ("tie", "no"), "although the medians are 1.33x apart"


def test_results_measured_by_older_code_can_still_be_read() -> None:
    folder = RESULTS_FOLDER / "nvidia-h200"
    head, *lines = summary.summary_table(read_table(folder / "layers.jsonl", layers.LayerRow))
    counts = {line[3]: line[head.index("faster/tie/slower")] for line in lines}
    assert counts == {"forward": "5/2/0", "input_grad": "7/0/0", "weight_grad": "4/3/0"}
    assert report.network_gains(read_table(folder / "networks.jsonl", networks.NetworkRow), "training")


def test_report_tells_what_the_rows_say(tmp_path: Path) -> None:
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
        "forward, resnext50_32x4d, batch 256, 16 bits: of the floor, mean at least 85% | 90% | yes |",
        "over F.conv2d at its best, mean at least 4x | 2.94x | no |",
        "`auto` over F.conv2d in the same layout, every row at least 0.98x | 0.98x | yes |",
        "forward, input_grad: extra memory, none | 1.0 MiB | no |",
        "weight_grad: extra memory, at most 32 MiB | - | - |",
        "host time of an eager call over F.conv2d's, at most 1.3x | 1.20x | yes |",
        "training of resnext50_32x4d, batch 256, 224x224: over F.conv2d, each in its best mode, at least "
        "1.25x | 1.20x | no |",
        "224x224: fused over F.conv2d with torch.compile, at least 1.35x | 1.50x | yes |",
        "224x224: fused, of ResNet-50's images/s at least 0.9 | 0.90x | yes |",
        "OutOfMemoryError: too large",
    ):
        assert line in text, line
    assert {path.name for path in written} == {
        "report.md", "networks.png", "time-resnext50_32x4d-bfloat16-256.png",
        "floor-resnext50_32x4d-bfloat16-256.png",
    }  # fmt: skip
    for path in written[1:]:
        assert path.read_bytes().startswith(b"\x89PNG") and f"({path.name})" in text
