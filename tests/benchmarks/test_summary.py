"""What rows of measurements come to: speedups, ties, aims, and a report that tells what they say."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import layers, networks, report, summary
from benchmarks.store import read_table


def row(runner: str, layout: str, p50: float | None, **changes: object) -> dict:
    """Of the first layer of ResNeXt-50, whose floor is 90 us."""
    fields = {
        "suite": "resnext50_32x4d", "layer": "128/32, 56x56", "batch": 256, "type": "bfloat16",
        "pass_": "forward", "runner": runner, "layout": layout, "ran": runner, "floor": 90.0,
        "p20": p50, "p50": p50, "p80": p50, "host": 20.0, "extra_bytes": 0, "error": 1e-3,
    }  # fmt: skip
    return asdict(layers.Row(**{**fields, **changes}))


ROWS = [
    row("auto", "channels_last", 100.0, p20=98.0, p80=103.0, host=24.0, extra_bytes=2**20),
    row("auto", "contiguous", 300.0),
    row("F.conv2d", "channels_last", 3000.0),
    row("F.conv2d", "contiguous", 294.0),
    row("torch.compile", "channels_last", 250.0),
    row("torch.compile", "contiguous", None, problem="wrong by 1.0e+00"),
]


def test_summary_of_a_case() -> None:
    (case,) = summary.cases(ROWS)
    assert case.fraction == 0.9
    assert case.speedup == (2.5, False) and case.best_peer["runner"] == "torch.compile"
    assert case.speedup_over_conv2d == (2.94, False), "in its best layout"
    assert case.least_gain == (0.98, False), "the contiguous one"
    assert case.host_ratio == 1.2
    assert summary.in_short(ROWS)[1][5:] == (
        "90%", "90%", "2.94x", "2.94x", "2.50x", "2.50x", "1/0/0", "0.98x",
    )  # fmt: skip


def test_a_row_within_the_spread_of_another_is_a_tie() -> None:
    ours = row("auto", "channels_last", 100.0, p20=98.0, p80=103.0)
    peer = row("F.conv2d", "channels_last", 104.0, p20=103.0, p80=105.0)
    third = row("torch.compile", "contiguous", 104.5, p20=104.0, p80=108.0)
    (case,) = summary.cases([ours, third, peer])
    assert case.speedup == (1.04, True) and str(case.speedup) == "tie"
    assert [found["runner"] for found in case.best_peers] == ["F.conv2d", "torch.compile"]
    assert summary.in_short([ours, peer])[1][7:] == ("1.04x", "tie", "1.04x", "tie", "0/1/0", "tie")
    peer["p20"] = 103.5
    (case,) = summary.cases([ours, peer])
    assert str(case.speedup) == "1.04x"


def test_a_tie_hides_no_loss() -> None:
    gains = [summary.Gain(0.9, True), summary.Gain(0.97, False), None, summary.Gain(2.0, False)]
    assert summary.worst_gain(gains) == gains[1]
    assert summary.worst_gain([gains[0], gains[3]]) == gains[0]
    assert summary.faster_tie_slower(gains) == "1/1/1" and summary.faster_tie_slower([None]) == ""
    assert summary.mean_gain([gains[0], None, gains[3]]) == pytest.approx(1.8**0.5)


def test_a_depthwise_kernel_can_be_the_best_peer() -> None:
    (case,) = summary.cases([*ROWS, row("native-depthwise", "contiguous", 200.0)])
    assert case.best_peer["runner"] == "native-depthwise" and case.speedup == (2.0, False)
    assert case.speedup_over_conv2d == (2.94, False)


def test_geometric_mean_and_least_leave_out_what_is_not_there() -> None:
    assert summary.geometric_mean([2.0, None, 8.0]) == pytest.approx(4)
    assert summary.least([3.0, None, 2.0]) == 2
    assert summary.geometric_mean([None]) is None and summary.least([]) is None


def network_row(network: str, runner: str, mode: str, speed: float | None) -> dict:
    fields = {"network": network, "runner": runner, "layout": "channels_last", "task": "training"}
    fields |= {"mode": mode, "batch": 256, "image": 224, "images_per_second": speed, "error": 1e-3}
    time = speed and 256e3 / speed
    fields |= {
        "p20": time,
        "p50": time,
        "p80": time,
        "problem": None if speed else "OutOfMemoryError: too large",
    }
    return asdict(networks.Row(**fields))


def test_networks_whose_times_overlap_tie() -> None:
    ours = network_row("resnext50_32x4d", "gconv", "eager", 2000.0) | {"p20": 127.0, "p80": 131.0}
    slower = network_row("resnext50_32x4d", "F.conv2d", "eager", 1900.0)
    theirs = network_row("resnext50_32x4d", "F.conv2d", "graphed", 1960.0)
    for p20, told in ((130.0, "tie"), (131.5, "1.02x")):
        (gain,) = report.network_gains([ours, slower, theirs | {"p20": p20}], "training").values()
        assert str(gain) == told


def test_a_tie_meets_no_aim_of_a_speedup() -> None:
    ours = network_row("resnext50_32x4d", "gconv", "eager", 2000.0) | {"p80": 160.0}
    theirs = network_row("resnext50_32x4d", "F.conv2d", "eager", 1500.0) | {"p20": 150.0}
    (aim,) = (aim for aim in report._aims([], [ours, theirs]) if "at least 1.25x" in aim[0])
    assert aim[1:] == ("tie", "no"), "although the medians are 1.33x apart"


def test_results_measured_by_older_code_can_still_be_read() -> None:
    folder = command.RESULTS / "nvidia-h200"
    head, *lines = summary.in_short(read_table(folder / "layers.jsonl", layers.Row))
    counts = {line[3]: line[head.index("faster/tie/slower")] for line in lines}
    assert counts == {"forward": "5/2/0", "input_grad": "7/0/0", "weight_grad": "4/3/0"}
    assert report.network_gains(read_table(folder / "networks.jsonl", networks.Row), "training")


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
    for name, rows in (("layers", ROWS), ("networks", table)):
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
