"""``python -m benchmarks networks``: no time for a wrong network, and the share of its convolutions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gconv
from benchmarks import __main__ as command
from benchmarks import networks
from benchmarks.store import read_table
from gconv.measure.timing import Times
from gconv.networks import rewrite

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("few_rounds")


@pytest.fixture(autouse=True)
def _one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time a single step."""
    monkeypatch.setattr(networks, "wall_time", lambda step, device: Times.of([step() is None or 0.5]))


@pytest.mark.long
def test_networks_are_measured_with_and_without_gconv(tmp_path: Path) -> None:
    run = ["networks", "--network", "tiny", "--image", "32", "--batch", "2", "--modes", "eager", "graphed"]
    assert command.main([*run, "--out", str(tmp_path)]) == 0
    rows = read_table(tmp_path / "networks.jsonl", networks.NetworkRow)
    assert {(row["runner"], row["layout"]) for row in rows} == {
        ("gconv", "channels_last"), ("fused", "channels_last"),
        ("F.conv2d", "channels_last"), ("F.conv2d", "contiguous"),
    }  # fmt: skip
    assert {row["task"] for row in rows} == {"inference", "training"} and len(rows) == 8
    for row in rows:
        assert row["problem"] is None and row["images_per_second"] > 0
        assert 0 < row["grouped_share"] < 1 and 1e-4 < row["error"] < 0.05, "bfloat16"
    # Check the median row, because a busy machine can interrupt any of them in the middle of a convolution.
    assert sorted(row["grouped_share"] for row in rows)[len(rows) // 2] < 0.6


@pytest.mark.parametrize("task", networks.TASKS)
def test_a_wrong_network_has_no_speed(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = gconv.GroupConv2d.forward
    monkeypatch.setattr(gconv.GroupConv2d, "forward", lambda self, x: forward(self, x) * 3)
    ours, _, theirs, _ = networks.network_contenders(["tiny"])
    for contender, right in ((ours, False), (theirs, True)):
        row = networks.measure(contender, task, "eager", 2, 16, CPU)
        assert (row.p50 is not None) == (row.problem is None) == right


@pytest.mark.parametrize("task", networks.TASKS)
def test_a_graph_that_leaves_nan_has_no_speed(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "_graph", lambda step: (step, torch.tensor(torch.nan)))
    row = networks.measure(networks.network_contenders(["tiny"])[0], task, "graphed", 2, 32, CPU)
    assert row.p50 is None and row.problem == "wrong by nan, graphed against eager"


def test_the_peer_network_has_no_layer_of_ours() -> None:
    ours, _, theirs, _ = networks.network_contenders(["tiny"])
    torch.manual_seed(0)
    first, _ = networks._build(ours, "training", CPU)
    torch.manual_seed(0)
    second, _ = networks._build(theirs, "training", CPU)
    assert any(isinstance(module, gconv.GroupConv2d) for module in first.modules())
    assert not any(isinstance(module, gconv.GroupConv2d) for module in second.modules())
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


@pytest.mark.parametrize("task", networks.TASKS)
def test_the_fused_network_is_fused_and_compared_with_the_plain_one(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, contender, *_ = networks.network_contenders(["tiny"])
    torch.manual_seed(0)
    model, exact = networks._build(contender, task, CPU)
    if task == "training":
        assert model.layer1[0].fused and not exact.layer1[0].fused
    else:
        assert model.get_submodule("layer1.0.conv2").activation == "relu"
    fold = rewrite.fold
    monkeypatch.setattr(rewrite, "fold", lambda conv, norm: (fold(conv, norm), conv.bias.data.add_(1)))
    monkeypatch.setattr("resnext.model.conv_between_norms", lambda x, b, c, a: -a(c(b(x))))
    row = networks.measure(contender, task, "eager", 2, 16, CPU)
    assert row.p50 is None and row.problem.startswith("wrong by")


def test_a_profiler_that_sees_no_time_tells_no_share() -> None:
    assert networks._grouped_share(lambda: None, CPU) is None


def test_grouped_share_counts_grouped_convolutions_once() -> None:
    def event(name: str, *shapes: list[int], parent: str | None = None) -> SimpleNamespace:
        above = None if parent is None else SimpleNamespace(name=parent, cpu_parent=None)
        above = above and SimpleNamespace(name="aten::conv2d", cpu_parent=above)
        return SimpleNamespace(name=name, input_shapes=list(shapes), cpu_parent=above)

    x, dense, grouped = [2, 8, 5, 5], [8, 8, 3, 3], [8, 2, 3, 3]
    assert networks._is_grouped(event("aten::convolution", x, grouped))
    assert networks._is_grouped(event("aten::convolution_backward", x, x, grouped))
    assert networks._is_grouped(event("gconv::weight_grad", x, x))
    assert not networks._is_grouped(event("aten::convolution", x, dense))
    assert not networks._is_grouped(event("aten::convolution_backward", x, x, dense))
    assert not networks._is_grouped(event("aten::relu", x))
    assert not networks._is_grouped(event("aten::convolution", x, grouped, parent="gconv::forward"))
