"""``gconv.profile``: the convolutions of a network, the estimated gain, and plots of both."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gconv
from gconv import dispatch, profile
from gconv.dispatch import Decision
from gconv.geometry import PASSES, Padding
from gconv.measure import figures, plots
from gconv.measure.recorder import RecordedCall, record
from gconv.measure.timing import Times


class Net(nn.Module):
    """A dense convolution, a grouped one that is called twice, and a depthwise one without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4, bias=False))
        self.weight = nn.Parameter(torch.randn(8, 1, 3, 3))

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        y = self.body(self.body(self.norm(self.stem(x)))) * scale
        return {"y": F.conv2d(y, self.weight, padding=1, groups=8), "n": 3}


def steady(**seconds: float) -> dict[str, Times]:
    """Times without a spread, by backend."""
    return {backend: Times(time, time, time) for backend, time in seconds.items()}


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixed times and a fixed memory floor, as on a GPU whose kernels are twice as fast."""
    fast, slow = steady(aten=200e-6, triton=100e-6), steady(aten=40e-6, triton=80e-6)
    functions = profile.__globals__
    monkeypatch.setitem(functions, "_time", lambda call, pass_: fast if call.geometry.groups == 4 else slow)

    def wall_time(run: Any, device: torch.device, seconds: float) -> Times:
        assert dispatch.requested(None) == "aten"
        run()
        return Times(1e-3, 2e-3, 3e-3)

    monkeypatch.setitem(functions, "wall_time", wall_time)
    monkeypatch.setitem(functions, "copy_speed", lambda device: 1e9)

    def explain_call(name: str, device: torch.device, *rest: Any) -> dict[str, Decision]:
        layout, dtype, convolution, passes = rest
        assert (name, dtype) == ("auto", torch.float32) and layout in ("contiguous", "channels_last")
        fast = {p: convolution.groups == 4 and p != "weight_grad" for p in passes}
        return {p: Decision(*(("triton", "fast") if fast[p] else ("aten", "slow here"))) for p in passes}

    monkeypatch.setattr(dispatch, "explain_call", explain_call)


def test_profile_lists_every_convolution_and_the_gain(fixed: None) -> None:
    result = gconv.profile(Net().eval(), torch.randn(2, 3, 8, 8))
    assert [c.call.name for c in result.convolutions] == ["stem", "body.0", "body.0", ""]
    assert [c.call.geometry.output_size for c in result.convolutions] == [
        (2, 8, 8, 8),
        (2, 8, 4, 4),
        (2, 8, 2, 2),
        (2, 8, 2, 2),
    ]
    assert result.convolutions[1].call.geometry.padding == Padding(1, 1, 1, 1)
    assert all(c.call.passes == ("forward",) and c.call.layout == "contiguous" for c in result.convolutions)
    assert not result.training
    assert result.total("aten") == pytest.approx(480e-6) and result.total("auto") == pytest.approx(280e-6)
    assert result.total("aten", grouped=True) == pytest.approx(440e-6)
    assert result.network_with_gconv == pytest.approx(2e-3 - 200e-6)
    stem_bytes = 4 * (2 * 3 * 64 + 8 * 3 + 2 * 8 * 64)
    assert result.convolutions[0].floor == pytest.approx(stem_bytes / 1e9)
    assert str(result).splitlines() == [
        "4 convolutions in a forward pass, torch.float32 on cpu, in us",
        "layer        convolution                          auto    floor  aten  triton",
        "-----------  -----------------------------------  ------  -----  ----  ------",
        "stem         2 x 3 x 8 x 8 -> 8, 1x1              dense       6    40      80",
        "body.0       2 x 8/4 x 8 x 8 -> 8, 3x3, stride 2  triton      6   200     100",
        "body.0       2 x 8/4 x 4 x 4 -> 8, 3x3, stride 2  triton      2   200     100",
        "(the model)  2 x 8/8 x 2 x 2 -> 8, 3x3            aten        1    40      80",
        "",
        "           all  grouped  network",
        "floor       14        8",
        "now        480      440    2,000",
        "converted  280      240    1,800  1.11x",
        "aten: slow here",
        "1 of the grouped convolutions is depthwise: convert(..., depthwise=True) converts those too",
    ]


def test_a_busy_machine_is_reported(fixed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    assert "warning" not in str(gconv.profile(model, x))
    unsteady = {"aten": Times(10e-6, 20e-6, 40e-6)}
    monkeypatch.setitem(profile.__globals__, "_time", lambda call, pass_: unsteady)
    warning = "warning: times vary by ±75% between repeats; is this machine busy?"
    assert warning in str(gconv.profile(model, x)).splitlines()


@pytest.mark.parametrize("example_input", ["x", 3, (2, 3, 8, 8), ()])
def test_an_input_without_a_tensor_is_refused(example_input: Any) -> None:
    with pytest.raises(TypeError, match=r"example_input must be a tensor, such as torch\.randn\(8, 3"):
        gconv.profile(Net().eval(), example_input)


def test_reports_are_short_in_a_session() -> None:
    model = Net().eval()
    assert (
        repr(gconv.profile(model, torch.randn(2, 3, 8, 8)))
        == "<Profile: 4 convolutions in a forward pass; print it for the times>"
    )
    report = gconv.convert(model)
    assert repr(report) == "<ConversionReport: converted 1 of 2 convolutions; print it for the layers>"
    layer = gconv.explain(model.body[0], torch.randn(2, 8, 8, 8))
    assert repr(layer).startswith("<Explanation: GroupConv2d on ")
    assert repr(gconv.fuse(model)[1]).startswith("<FusionReport: folded 1 of 1 batch norm; print it")


def test_profile_of_a_training_step(fixed: None) -> None:
    model = Net().train()
    model.norm.running_mean.fill_(3.0)
    gradients: list[Tensor] = []
    model.stem.weight.register_hook(gradients.append)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = gconv.profile(model, (torch.randn(2, 3, 8, 8), 2.0))
    assert result.training
    assert [c.call.passes for c in result.convolutions] == [("forward", "weight_grad"), *[PASSES] * 3]
    assert result.convolutions[1].total("auto") == pytest.approx(400e-6)
    assert result.convolutions[1].floor == pytest.approx(3 * 5696e-9)
    assert len(gradients) == 1 and gradients[0].any()
    assert "triton/triton/aten" in str(result) and "in a training step" in str(result)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_contiguous_network_on_a_gpu_is_measured_in_both_layouts(
    fixed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the estimate has the times after ``convert``, also of dense layers; nothing runs on the GPU."""
    functions = profile.__globals__
    monkeypatch.setitem(functions, "record", lambda model, run: [on_gpu(call) for call in record(model, run)])
    times = {
        ("contiguous", False): steady(aten=100e-6),
        ("contiguous", True): steady(aten=300e-6, triton=250e-6),
        ("channels_last", False): steady(aten=70e-6),
        ("channels_last", True): steady(aten=400e-6, triton=100e-6),
    }
    monkeypatch.setitem(functions, "_time", lambda call, pass_: times[call.layout, call.geometry.groups == 4])
    result = gconv.profile(Net().eval(), torch.randn(2, 3, 8, 8))
    assert [c.in_channels_last.call.layout for c in result.convolutions] == ["channels_last"] * 4
    assert result.total("aten") == pytest.approx(800e-6)
    assert result.total_converted() == pytest.approx(70e-6 + 2 * 100e-6 + 70e-6)
    assert result.network_with_gconv == pytest.approx(2e-3 - 800e-6 + 340e-6)
    assert str(result).splitlines()[1:6] == [
        "cl: in channels_last, the layout after gconv.convert",
        "layer        convolution                          auto    floor  aten  triton  aten cl  triton cl",
        "-----------  -----------------------------------  ------  -----  ----  ------  -------  ---------",
        "stem         2 x 3 x 8 x 8 -> 8, 1x1              dense       6   100               70",
        "body.0       2 x 8/4 x 8 x 8 -> 8, 3x3, stride 2  triton      6   300     250      400        100",
    ]


def on_gpu(call: RecordedCall) -> RecordedCall:
    return replace(call, device=torch.device("cuda"))


def test_profile_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """With real times: converted or not, compiled or not, in channels_last, under autocast."""
    model = Net().eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    for wrapped in (model, torch.compile(model)):
        result = gconv.profile(wrapped, x)
        assert [c.call.name for c in result.convolutions] == ["stem", "body.0", "body.0", ""]
        assert [c.call.layout for c in result.convolutions] == ["channels_last"] * 4
        assert all(c.seconds["forward"]["aten"] > 0 and c.floor > 0 for c in result.convolutions)
        assert result.network > 0 and result.network_with_gconv == result.network
        gconv.convert(model)
    with torch.autocast("cpu", torch.bfloat16):
        result = gconv.profile(model, x)
    assert {c.call.dtype for c in result.convolutions} == {torch.bfloat16}
    assert "torch.bfloat16 on cpu" in str(result) and "gconv has no kernels for cpu" in str(result)


def test_unmeasured_times_are_blank() -> None:
    result = gconv.profile(Net().eval().double(), torch.randn(2, 3, 8, 8).double())
    assert result.total("aten") is None and result.network_with_gconv is None and result.network > 0
    assert "not timed separately: torch.float64" in str(result)
    with torch.device("meta"):
        result = gconv.profile(Net().train(), torch.empty(2, 3, 8, 8))
    assert result.network is None and result.total("floor") is None and len(result.convolutions) == 4
    assert "2 x 8/4 x 8 x 8 -> 8, 3x3, stride 2" in str(result)


def test_networks_with_nothing_to_gain() -> None:
    result = str(gconv.profile(nn.Linear(2, 2).eval(), torch.randn(1, 2)))
    assert result.startswith("no convolution ran in a forward pass; convolutions inside exported")
    result = str(gconv.profile(nn.Conv2d(2, 2, 1).eval(), torch.randn(1, 2, 4, 4)))
    assert result.endswith("none of them is grouped, so there is nothing to gain from gconv")
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got function"):
        gconv.profile(lambda x: x, torch.randn(1))
    with pytest.warns(DeprecationWarning):
        scripted = torch.jit.script(nn.Conv2d(2, 2, 1))
    with pytest.raises(TypeError, match=r"can't be recorded: profile before torch\.jit\.script"):
        gconv.profile(scripted, torch.randn(1, 2, 4, 4))


def test_hooks_are_removed_if_the_model_fails() -> None:
    model = Net().train()
    with pytest.raises(RuntimeError, match="channels"):
        gconv.profile(model, torch.randn(2, 4, 8, 8))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Guarded(nn.Module):
    """Continues after a failing module with a convolution that has no module."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = nn.Conv2d(4, 4, 3, groups=2)
        self.inner = nn.Conv2d(2, 2, 1)
        self.inner.register_forward_pre_hook(lambda module, args: (F.conv2d(args[0], module.weight),))

    def forward(self, x: Tensor) -> Tensor:
        try:
            self.broken(x)
        except RuntimeError:
            return F.conv2d(self.inner(x), self.inner.weight)


def test_a_convolution_is_named_after_the_innermost_running_module() -> None:
    result = gconv.profile(Guarded().eval(), torch.randn(1, 2, 5, 5))
    assert [c.call.name for c in result.convolutions] == ["inner", "inner", ""]


def test_a_training_step_needs_an_output_with_a_gradient() -> None:
    class Boxed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor) -> Any:
            return iter([self.conv(x)])

    with pytest.raises(TypeError, match="in training mode the model must return a tensor with a gradient"):
        gconv.profile(Boxed().train(), torch.randn(1, 2, 4, 4))
    with torch.inference_mode():
        result = gconv.profile(Boxed().train(), torch.randn(1, 2, 4, 4))
    assert not result.training and result.convolutions[0].call.passes == ("forward",)


def test_frozen_networks_complex_outputs_and_replaced_buffers() -> None:
    class Fancy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1).requires_grad_(False)
            self.register_buffer("ones", torch.ones(1).expand(3))
            self.register_buffer("average", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.average = self.average * 0.9 + 0.1
            return torch.fft.fft2(self.conv(x))

    model = Fancy().train()
    result = gconv.profile(model, torch.randn(1, 2, 4, 4, requires_grad=True))
    assert result.convolutions[0].call.passes == ("forward", "input_grad")
    assert model.average == 0
    result = gconv.profile(model, torch.randn(1, 2, 4, 4))
    assert result.convolutions[0].call.passes == ("forward",)


def test_lazy_networks_must_run_once_before() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    with pytest.raises(
        ValueError, match="lazy layers that haven't seen an input yet: run it once before profiling"
    ):
        gconv.profile(model, torch.randn(1, 2, 5, 5))


def texts(drawing: Path) -> str:
    """The text of an SVG file: matplotlib writes each string as a comment above its glyphs."""
    return "\n".join(re.findall("<!-- (.*?) -->", drawing.read_text()))


def test_plot_draws_each_layer_next_to_the_memory_floor(fixed: None, tmp_path: Path) -> None:
    """Layers of equal sizes share an entry."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *(nn.Conv2d(8, 8, 3, padding=1, groups=4) for _ in range(3)))
    result = gconv.profile(model.eval(), torch.randn(2, 3, 8, 8))
    assert result.plot(tmp_path / "times.svg") == tmp_path / "times.svg"
    written = texts(tmp_path / "times.svg")
    for text in (
        "4 convolutions in a forward pass",
        "torch.float32 on CPU (",
        "first input 2 x 3 x 8 x 8",
        "1  \N{MULTIPLICATION SIGN}3",
        "2 x 8/4 x 8 x 8 -&gt; 8, 3x3",
        "200  (22.8x)",
        "100  (11.4x)",
        "PyTorch, dense layers",
        "gconv's kernels",
        "memory floor",
        "time per call in \N{MICRO SIGN}s",
    ):
        assert text in written, (text, written)
    result.plot(tmp_path / "times.png", title="a $network", dark=True)
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")


def test_roofline_of_a_profile(fixed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "roofs_of", lambda device, dtype: plots.Roofs(bandwidth=2e9, compute=8e9))
    gconv.profile(Net().train(), torch.randn(2, 3, 8, 8)).plot(
        tmp_path / "roofline.svg", "roofline", title="Net"
    )
    written = texts(tmp_path / "roofline.svg")
    assert "Net" in written and "4 convolutions in a training step" in written
    assert "bound: copy at 2 GB/s, dense convolution at 8 GFLOP/s" in written
    assert "memory bound" in written and "compute bound" in written and "gconv's kernels" in written


def test_plot_errors(fixed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = gconv.profile(Net().eval(), torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"must end in \.png, \.svg or \.pdf, got .*times\.txt"):
        result.plot(tmp_path / "times.txt")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*missing"):
        result.plot(tmp_path / "missing" / "times.svg")
    with pytest.raises(ValueError, match="kind must be 'time' or 'roofline', got 'pie'"):
        result.plot(tmp_path / "times.svg", "pie")
    nothing = gconv.profile(nn.Linear(2, 2).eval(), torch.randn(1, 2))
    with pytest.raises(ValueError, match="there are no times to plot: no convolution ran in a forward pass"):
        nothing.plot(tmp_path / "times.svg")
    with torch.device("meta"):
        unmeasured = gconv.profile(Net().eval(), torch.empty(2, 3, 8, 8))
    with pytest.raises(ValueError, match="the network is on meta; profile it on a CPU or GPU"):
        unmeasured.plot(tmp_path / "times.svg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"plots need matplotlib: .*pip install matplotlib"):
        result.plot(tmp_path / "times.svg")
    assert not list(tmp_path.iterdir())


def test_a_plot_does_not_change_matplotlib_for_others(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    with figures.new_figure(tmp_path / "plot.pdf", 2, "title") as (figure, _):
        figure.subplots().plot([1, 2])
    assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "plot.pdf").read_bytes().startswith(b"%PDF")
