"""Measuring and tuning on a GPU, ``pytest -m gpu``: everything works on tiny layers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tables
import torch
from marks import needs_gpu

import gconv
import resnext
from benchmarks import __main__ as benchmarks
from benchmarks import layers, networks, peers
from benchmarks.store import read_table
from gconv import dispatch
from gconv.commands import tune
from gconv.geometry import PASSES, ConvGeometry
from gconv.measure import check, timing
from gconv.measure.problem import LAYOUTS, Problem
from gconv.measure.suites import Layer

pytestmark = [
    pytest.mark.gpu,
    needs_gpu,
    pytest.mark.filterwarnings("ignore"),  # from cuDNN and the compiler, about plans that they try and reject
]
RUN = ["run", "--suite", "tiny", "--batch", "4", "--dtypes", "bfloat16"]


@pytest.mark.timing
def test_times_are_those_of_the_device() -> None:
    """A copy of 512 MiB in a graph takes the time that ``copy_speed`` predicts."""
    source = torch.randn(2**27, device="cuda")
    target, device = torch.empty_like(source), source.device
    times = timing.time_together({"copy": [lambda: target.copy_(source)]}, device)["copy"]
    assert times.p20 <= times.p50 <= times.p80
    assert 0.8 < 2 * source.nbytes / times.p50 / timing.copy_speed(device) < 1.25


def test_extra_memory_counts_what_is_not_returned() -> None:
    x = torch.randn(2**20, device="cuda")
    assert timing.extra_memory(lambda: x + 1, x.device) == 0
    assert timing.extra_memory(lambda: (x + 1) * 2, x.device) == x.nbytes


@pytest.mark.timing
def test_tuned_table_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCONV_CACHE", str(tmp_path))
    assert tune.main(["--suite", "tiny", "--batch", "4", "--dtypes", "bfloat16"]) == 0
    tables.forget()
    x = torch.randn(4, 16, 6, 6, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    geometry = ConvGeometry.of(x.shape, (16, 4, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 4)
    decided = dispatch.decide_by_auto("forward", x.device, "channels_last", x.dtype, geometry)
    assert "measured: the kernel takes" in decided.reason
    layer = gconv.GroupConv2d(16, 16, 3, padding=1, groups=4, device="cuda", dtype=x.dtype)
    too_small = decided.backend == "triton" and decided.least < dispatch.HOST
    assert ("too small to gain" if too_small else "measured") in gconv.explain(layer, x).reason
    monkeypatch.undo()
    tables.forget()


def note_layout(layouts: dict[str, str], name: str, module: torch.nn.Module, inputs: tuple) -> None:
    """A hook that records the layout of a module's input."""
    last = inputs[0].is_contiguous(memory_format=torch.channels_last)
    layouts[name] = "channels_last" if last else "contiguous"


@pytest.mark.timing
def test_profile_measures_both_backends() -> None:
    model = resnext.ResNeXt((1, 1, 1, 1), 8, 4, stem_width=16, num_classes=10).cuda().train()
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 64, 64, device="cuda").to(memory_format=torch.channels_last)
    layouts: dict[str, str] = {}
    for name, module in model.named_modules():
        module.register_forward_pre_hook(partial(note_layout, layouts, name))
    with torch.autocast("cuda", torch.bfloat16):
        result = gconv.profile(model, x)
    grouped = [c for c in result.convolutions if c.grouped]
    assert [c.call.name for c in grouped] == [f"layer{i}.0.conv2" for i in (1, 2, 3, 4)]
    lines = {line.split(" ")[0]: line for line in str(result).splitlines()}
    for c in grouped:
        assert all(backend in lines[c.call.name] for backend, _ in c.converted.backends.values())
        assert (c.call.dtype, c.call.layout) == (torch.bfloat16, layouts[c.call.name])
        assert all(times.keys() == {"aten", "triton"} for times in c.seconds.values())
    assert result.network > result.total("aten") > result.total("floor") > 0 and result.network_with_gconv > 0
    assert "triton" in lines["layer"]


@pytest.mark.timing
def test_the_check_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "LAYERS", check.LAYERS[-1:])
    monkeypatch.setattr(check, "BLOCKS", check.BLOCKS[-1:])
    found = check.check(batch=8)
    assert not found.wrong and len(found.answers) == 4 * 3 and len(found.timings) == 3
    assert all(min(t.floor, t.gconv.p50, t.channels_last.p50, t.contiguous.p50) > 0 for t in found.timings)
    assert "ResNeXt-50's grouped layers, bfloat16, batch size 8" in str(found)


@pytest.mark.skipif(not torch.backends.cudnn.enabled, reason="without cuDNN no layout follows the weights")
def test_a_contiguous_network_runs_on_the_kernels_once_converted(
    no_tables: None, however_small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, with contiguous images."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.Conv2d(64, 64, 3, padding=1, groups=16))
    net, x = net.cuda().bfloat16(), torch.randn(8, 3, 28, 28, device="cuda", dtype=torch.bfloat16)
    expected, ran = net(x), []
    report = gconv.convert(net)
    assert "gconv's kernels: bfloat16 and float16" in str(report)
    forward = gconv.ops.forward
    monkeypatch.setattr(gconv.ops, "forward", lambda *args: ran.append(1) or forward(*args))
    y = net(x)
    assert ran and y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected, atol=2e-2, rtol=2e-2)


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


def measure(folder: Path, *command: str) -> list[dict[str, Any]]:
    """Run a command of the benchmarks; return the rows that it writes, none of which may have a problem."""
    assert benchmarks.main([*command, "--out", str(folder)]) == 0
    row = networks.NetworkRow if command[0] == "networks" else layers.LayerRow
    rows = read_table(folder / ("networks.jsonl" if command[0] == "networks" else "layers.jsonl"), row)
    assert [row["problem"] for row in rows if row["problem"]] == []
    return rows


@pytest.mark.parametrize(
    ("contenders", "passes"), [(["auto", "triton", "F.conv2d"], PASSES), (["torch.compile"], ["forward"])]
)
def test_layers_are_measured(tmp_path: Path, contenders: list[str], passes: list[str]) -> None:
    """torch.compile runs only one pass, because compiling takes a minute."""
    options = ["--passes", *passes, "--contenders", *contenders]
    rows = measure(tmp_path, *RUN, *options)
    assert len(rows) == 2 * len(passes) * 2 * len(contenders), "layers, passes, contenders in two layouts"


@pytest.mark.parametrize(
    ("mode", "tasks"),
    [
        ("eager", networks.TASKS),
        ("graphed", networks.TASKS),
        ("compiled", ["inference"]),
        ("compiled-graphed", ["training"]),
    ],
)
def test_networks_are_measured(
    tmp_path: Path, mode: str, tasks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiling both tasks would take minutes."""
    monkeypatch.setattr(networks, "wall_time", partial(timing.wall_time, seconds=0))
    network = ["networks", "--network", "tiny", "--image", "32", "--batch", "16"]
    rows = measure(tmp_path, *network, "--modes", mode, "--tasks", *tasks)
    assert len(rows) == 4 * len(tasks), "four contenders"


def test_what_was_measured_is_reported(tmp_path: Path) -> None:
    from benchmarks.report import plots, write_report  # imports matplotlib

    measure(tmp_path, *RUN, "--passes", "forward", "--contenders", "triton", "F.conv2d")
    written = {path.name for path in write_report(tmp_path)}
    assert "report.md" in written and (len(written) > 1) == (plots is not None)
