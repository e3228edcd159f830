"""Measuring and tuning on a GPU, ``pytest -m gpu``: on tiny layers, that all of it works."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import gconv
import resnext
from benchmarks import __main__ as benchmarks
from benchmarks import layers, networks, peers
from benchmarks.store import read_table
from gconv import timing, tune
from gconv.geometry import PASSES
from gconv.kernels import choice
from gconv.problem import LAYOUTS, Problem
from gconv.suites import Layer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
    pytest.mark.filterwarnings("ignore"),  # cuDNN's and the compiler's, of plans that they try and drop
]


def test_times_are_those_of_the_device() -> None:
    """A copy of 512 MiB in a graph takes what the speed of a copy says."""
    source = torch.randn(2**27, device="cuda")
    target, device = torch.empty_like(source), source.device
    times = timing.time_together({"copy": [lambda: target.copy_(source)]}, device)["copy"]
    assert times.p20 <= times.p50 <= times.p80
    assert 0.8 < 2 * source.nbytes / times.p50 / timing.copy_speed(device) < 1.25


def test_extra_memory_counts_what_is_not_returned() -> None:
    x = torch.randn(2**20, device="cuda")
    assert timing.extra_memory(lambda: x + 1, x.device) == 0
    assert timing.extra_memory(lambda: (x + 1) * 2, x.device) == x.nbytes


def test_tuned_table_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCONV_CACHE", str(tmp_path))
    caches = (choice.table, choice.nearest, choice.verdict)
    assert tune.main(["--suite", "tiny", "--batch", "4", "--dtypes", "bfloat16"]) == 0
    for cached in caches:
        cached.cache_clear()
    x = torch.randn(4, 16, 6, 6, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    layer = gconv.GroupConv2d(16, 16, 3, padding=1, groups=4, device="cuda", dtype=x.dtype)
    assert "of PyTorch's own, measured" in gconv.explain(layer, x).reason
    monkeypatch.undo()
    for cached in caches:
        cached.cache_clear()


def test_profile_measures_both_backends() -> None:
    model = resnext.ResNeXt((1, 1, 1, 1), 8, 4, stem_width=16, num_classes=10).cuda().train()
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 64, 64, device="cuda").to(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16):
        told = gconv.profile(model, x)
    grouped = [c for c in told.convolutions if c.grouped]
    assert [c.call.name for c in grouped] == [f"layer{i}.0.conv2" for i in (1, 2, 3, 4)]
    for c in grouped:
        assert (c.call.dtype, c.call.layout) == (torch.bfloat16, "channels_last")
        assert all(times.keys() == {"aten", "triton"} for times in c.seconds.values())
    assert told.network > told.total("aten") > told.total("floor") > 0 and told.network_with_gconv > 0
    assert str(told).count("triton") > 4


@pytest.mark.parametrize("runner", peers.DEPTHWISE)
@pytest.mark.parametrize("pass_", PASSES)
def test_both_depthwise_kernels_are_right(pass_: str, runner: str) -> None:
    problem, device = Problem(pass_, Layer(32, 32, 7, stride=2).geometry(2), "float16"), torch.device("cuda")
    for layout in LAYOUTS:
        if not peers.applies(peers.Contender(runner, layout), problem, device):
            pytest.skip("no such kernel here")
        operands = problem.draw(device, layout)
        result = peers.RUNNERS[runner](problem)(operands)
        assert problem.matches(problem.error(result, problem.truth(operands)))


def test_benchmarks_measure_and_report(tmp_path: Path) -> None:
    where = ["--out", str(tmp_path)]
    assert benchmarks.main(["run", "--suite", "tiny", "--batch", "4", "--dtypes", "bfloat16", *where]) == 0
    assert benchmarks.main(["networks", "--network", "tiny", "--image", "32", "--batch", "16", *where]) == 0
    assert benchmarks.main(["report", str(tmp_path)]) == 0
    for table in (layers, networks):
        name = table.__name__.rpartition(".")[2]
        rows = read_table(tmp_path / f"{name}.jsonl", table.Row)
        assert [row["problem"] for row in rows if row["problem"]] == []
