"""Summaries of measurements: speedups, ties and means."""

from __future__ import annotations

import pytest
from measurements import LAYER_ROWS, layer_row

from benchmarks import summary


def test_summary_of_a_case() -> None:
    (case,) = summary.comparisons(LAYER_ROWS)
    assert case.fraction == 0.9
    assert case.speedup == (2.5, False) and case.best_peer["runner"] == "torch.compile"
    assert case.speedup_over_conv2d == (2.94, False), "in its best layout"
    assert case.least_gain == (0.98, False), "the contiguous one"
    assert case.host_ratio == 1.2
    assert summary.summary_table(LAYER_ROWS)[1][5:] == (
        "90%", "90%", "2.94x", "2.94x", "2.50x", "2.50x", "1/0/0", "0.98x",
    )  # fmt: skip


def test_a_row_within_the_spread_of_another_is_a_tie() -> None:
    ours = layer_row("auto", "channels_last", 100.0, p20=98.0, p80=103.0)
    peer = layer_row("F.conv2d", "channels_last", 104.0, p20=103.0, p80=105.0)
    third = layer_row("torch.compile", "contiguous", 104.5, p20=104.0, p80=108.0)
    (case,) = summary.comparisons([ours, third, peer])
    assert case.speedup == (1.04, True) and str(case.speedup) == "tie"
    assert [found["runner"] for found in case.best_peers] == ["F.conv2d", "torch.compile"]
    assert summary.summary_table([ours, peer])[1][7:] == ("1.04x", "tie", "1.04x", "tie", "0/1/0", "tie")
    peer["p20"] = 103.5
    (case,) = summary.comparisons([ours, peer])
    assert str(case.speedup) == "1.04x"


def test_a_tie_hides_no_loss() -> None:
    gains = [summary.Gain(0.9, True), summary.Gain(0.97, False), None, summary.Gain(2.0, False)]
    assert summary.worst_gain(gains) == gains[1]
    assert summary.worst_gain([gains[0], gains[3]]) == gains[0]
    assert summary.faster_tie_slower(gains) == "1/1/1" and summary.faster_tie_slower([None]) == ""
    assert summary.mean_gain([gains[0], None, gains[3]]) == pytest.approx(1.8**0.5)


def test_a_depthwise_kernel_can_be_the_best_peer() -> None:
    (case,) = summary.comparisons([*LAYER_ROWS, layer_row("native-depthwise", "contiguous", 200.0)])
    assert case.best_peer["runner"] == "native-depthwise" and case.speedup == (2.0, False)
    assert case.speedup_over_conv2d == (2.94, False)


def test_geometric_mean_and_least_leave_out_what_is_not_there() -> None:
    assert summary.geometric_mean([2.0, None, 8.0]) == pytest.approx(4)
    assert summary.least([3.0, None, 2.0]) == 2
    assert summary.geometric_mean([None]) is None and summary.least([]) is None
