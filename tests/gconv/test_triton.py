"""``backend="triton"`` as a user asks for it: gradients, operators, graphs, layouts, refusals."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from marks import interpreted
from oracle import Case
from torch import Tensor

import gconv
from gconv import dispatch
from gconv.geometry import ConvGeometry
from gconv.kernels import launch

CASE = Case("", (2, 8, 5, 4), (8, 2, 3, 3), {"padding": 1, "groups": 4})


def triton(*tensors: Tensor | None, **settings: object) -> Tensor:
    return gconv.group_conv2d(*tensors, **settings, backend="triton")


@interpreted
@pytest.mark.filterwarnings("ignore:Input #:UserWarning")  # gradcheck's, for float32
@pytest.mark.parametrize(
    ("check", "stride"),
    [
        (torch.autograd.gradcheck, 1),
        (torch.autograd.gradcheck, 2),
        pytest.param(torch.autograd.gradgradcheck, 1, marks=pytest.mark.long),
        pytest.param(torch.autograd.gradgradcheck, 2, marks=pytest.mark.long),
    ],
)
def test_gradients_to_second_order(check: object, stride: int) -> None:
    """In float32, which is what the kernels take: the passes are linear, so the steps may be large."""
    case = Case("", (1, 4, 4, 3), (4, 2, 3, 3))
    tensors = case.tensors(torch.float32)
    settings = {"stride": stride, "padding": 1, "groups": 2}
    assert check(lambda *t: triton(*t, **settings), tensors, eps=0.25, atol=1e-3, rtol=1e-3, fast_mode=True)


@interpreted
@pytest.mark.parametrize("name", ["forward", "input_grad", "weight_grad"])
def test_opcheck(name: str) -> None:
    x, w, b = CASE.tensors(torch.float32)
    dy = torch.randn_like(F.conv2d(x, w, b, **CASE.settings)).requires_grad_()
    settings = ((1, 1), (1, 1, 1, 1), (1, 1), 4, "triton")
    arguments = {
        "forward": (x, w, b, None, "relu", *settings),
        "input_grad": (dy, w, x.shape, *settings),
        "weight_grad": (dy, x, w.shape, True, *settings),
    }
    # Its test of the gradients compares graphs with eager mode in float64's tolerance, which float32 misses.
    result = torch.library.opcheck(
        getattr(torch.ops.gconv, name).default, arguments[name], atol=1e-4, rtol=1e-4
    )
    assert set(result.values()) == {"SUCCESS"}


@interpreted
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_graph_holds_the_operators(dynamic: bool) -> None:
    layer = gconv.GroupConv2d(8, 8, 3, padding=1, groups=4, activation="relu")
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3):
        x = torch.randn(batch, 8, 5, 6, requires_grad=True)
        with gconv.backend("triton"):
            y = compiled(x)
            grads = torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))
        truth = layer(x)
        torch.testing.assert_close(y, truth)
        expected = torch.autograd.grad(truth.square().sum(), (x, *layer.parameters()))
        torch.testing.assert_close(grads, expected, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


@interpreted
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_results_lie_as_those_of_conv2d(layout: torch.memory_format) -> None:
    x, w, _ = (
        t if t is None else t.detach().to(memory_format=layout)
        for t in (*CASE.tensors(torch.float32)[:2], None)
    )
    x, w = x.requires_grad_(), w.requires_grad_()
    results = []
    for convolve in (triton, F.conv2d):
        y = convolve(x, w, **CASE.settings)
        results.append([y, *torch.autograd.grad(y, (x, w), torch.ones_like(y))])
    for ours, theirs in zip(*results, strict=True):
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@interpreted
def test_autocast_and_unbatched_input() -> None:
    x, w, b = CASE.tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = triton(x[0], w, b, **CASE.settings)
    assert y.dtype == torch.bfloat16 and y.shape == (8, 5, 4)
    torch.testing.assert_close(y.float(), F.conv2d(x[0], w, b, **CASE.settings), atol=0.05, rtol=0.02)


@interpreted
def test_network_trains_a_step_as_on_aten() -> None:
    net = torch.nn.Sequential(
        gconv.GroupConv2d(8, 8, 3, padding=1, groups=4, bias=False),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(inplace=True),
        gconv.GroupConv2d(8, 8, 3, stride=2, padding=1, groups=8),
    ).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    gradients = []
    for backend in ("triton", "aten"):
        with gconv.backend(backend):
            gradients.append(torch.autograd.grad(net(x).square().sum(), list(net.parameters())))
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-3)


@interpreted
def test_explain_names_kernel_tile_and_copies() -> None:
    layer, x = gconv.GroupConv2d(128, 128, 3, stride=2, padding=1, groups=32), torch.randn(2, 128, 8, 8)
    told = gconv.explain(layer, x, backend="triton")
    strips = "triton: strips, 16 x 2 pixels x 16 -> 16 channels, 4 groups a tile, 4 packs, 4 warps, 2 stages"
    assert told.passes["forward"] == strips
    assert told.passes["input_grad"].startswith("triton: residue")
    assert "copies it to channels_last" in told.copies and told.copies in str(told)
    assert (
        gconv.explain(layer, x.contiguous(memory_format=torch.channels_last), backend="triton").copies is None
    )
    assert gconv.explain(layer, x).passes == dict.fromkeys(dispatch.PASSES, "aten")
    told = gconv.explain(layer.half(), x.half(), backend="triton")
    strips = "triton: strips, 16 pixels x 16 -> 16 channels, 4 groups a tile, 8 packs, 4 warps, 2 stages"
    assert told.passes["forward"] == strips
    pairs = "triton: pairs, 16 x 2 pixels x 16 -> 16 channels, 4 groups a tile, 8 packs, 4 warps, 3 stages"
    assert told.passes["input_grad"] == pairs


@interpreted
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64], ids=str)
def test_types_without_a_kernel_are_refused(dtype: torch.dtype) -> None:
    x, w = torch.ones(1, 4, 5, 5, dtype=dtype), torch.ones(4, 2, 3, 3, dtype=dtype)
    with pytest.raises(RuntimeError, match=f"cannot run here: the kernels take .* got {dtype}"):
        triton(x, w, groups=2)


def test_without_gpu_and_interpreter_the_refusal_says_what_to_do() -> None:
    code = (
        "import torch, gconv\n"
        "gconv.group_conv2d(torch.ones(1, 4, 5, 5), torch.ones(4, 2, 3, 3), groups=2, backend='triton')"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "got cpu; TRITON_INTERPRET=1 in the environment runs them on the CPU" in done.stderr


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What gconv has logged since the test began, as if nothing had been told before."""
    launch.note_untested_triton.cache_clear()
    yield lambda: [record.getMessage() for record in caplog.records if record.name == "gconv"]
    launch.note_untested_triton.cache_clear()


@pytest.mark.parametrize(
    ("version", "untested"),
    [("3.6.1", False), (f"{launch.NEWEST_TRITON}.9", False), ("3.10.0rc1", True), ("4.0.0+git1a2b3c", True)],
)
def test_an_untested_newer_triton_is_told_in_one_line(
    version: str, untested: bool, told: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triton.__version__", version)
    launch.note_untested_triton()
    assert len(told()) == untested
    assert all(f"not been tested with Triton {version}" in line and "\n" not in line for line in told())


@interpreted
def test_an_untested_newer_triton_is_told_once(
    told: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a kernel first starts, compiled graphs included; not as a warning, which is an error here."""
    monkeypatch.setattr("triton.__version__", "99.0.0")
    x, w, _ = Case("", (1, 2, 3, 3), (2, 1, 1, 1), {}).tensors(torch.float32)
    compiled = torch.compile(lambda x: triton(x, w, groups=2), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        compiled(x)
        triton(x, w, groups=2)
    assert len(told()) == 1
    torch._dynamo.reset()


def test_without_triton_the_refusal_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", False)
    with pytest.raises(RuntimeError, match="Triton is not installed; pip install triton"):
        triton(torch.ones(1, 4, 5, 5), torch.ones(4, 2, 3, 3), groups=2)


def on_gpu(channels_last: bool = True, **changes: object) -> SimpleNamespace:
    """What :func:`dispatch.decide` asks of a tensor."""
    stride = (1, 1, 1) if channels_last else (25, 5, 1)
    return SimpleNamespace(
        is_cuda=True, device=torch.device("cuda"), stride=lambda axis: stride[axis], **changes
    )


ALL, NONE = dispatch.PASSES, ()


@pytest.mark.parametrize(
    ("weight", "groups", "stride", "dilation", "dtype", "channels_last", "kernels_take"),
    [
        ((128, 4, 3, 3), 32, (1, 1), 1, torch.bfloat16, True, ALL),
        ((128, 4, 3, 3), 32, (1, 1), 1, torch.float16, True, ALL),
        ((128, 16, 3, 3), 8, (1, 1), 1, torch.bfloat16, True, ALL),
        ((128, 32, 3, 3), 4, (1, 1), 1, torch.bfloat16, True, ALL),
        ((96, 32, 3, 3), 4, (1, 1), 1, torch.bfloat16, True, ALL),
        ((128, 8, 3, 3), 16, (2, 2), 1, torch.bfloat16, True, ("forward", "input_grad")),
        ((128, 16, 3, 3), 8, (2, 2), 1, torch.bfloat16, True, ("input_grad", "weight_grad")),
        ((128, 32, 3, 3), 4, (2, 2), 1, torch.bfloat16, True, ("input_grad", "weight_grad")),
        ((128, 64, 3, 3), 2, (1, 1), 1, torch.bfloat16, True, NONE),
        ((128, 4, 3, 3), 32, (2, 1), 1, torch.bfloat16, True, NONE),
        ((128, 4, 3, 3), 32, (3, 3), 1, torch.bfloat16, True, NONE),
        ((128, 4, 3, 3), 32, (1, 1), 2, torch.bfloat16, True, NONE),
        ((128, 4, 3, 3), 32, (1, 1), 1, torch.float32, True, NONE),
        ((128, 4, 3, 3), 32, (1, 1), 1, torch.bfloat16, False, NONE),
        ((128, 4, 3, 3), 32, (1, 1), 1, torch.float64, True, NONE),
        ((128, 4, 5, 5), 32, (1, 1), 1, torch.bfloat16, True, NONE),
        ((128, 1, 3, 3), 128, (1, 1), 1, torch.bfloat16, True, NONE),
        ((128, 1, 3, 3), 128, (2, 2), 1, torch.bfloat16, True, NONE),
        ((16, 128, 3, 3), 1, (1, 1), 1, torch.bfloat16, True, NONE),
    ],
)
def test_auto_takes_by_rule_what_was_faster_where_it_was_measured(
    weight: tuple[int, int, int, int],
    groups: int,
    stride: tuple[int, int],
    dilation: int,
    dtype: torch.dtype,
    channels_last: bool,
    kernels_take: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_device(monkeypatch, "cuda", bandwidth=4e12)
    geometry = ConvGeometry.of((256, 128, 56, 56), weight, stride, (1, 1, 1, 1), (dilation,) * 2, groups)
    tensor = on_gpu(channels_last)
    decided = {pass_: dispatch.decide("auto", pass_, tensor, dtype, geometry).backend for pass_ in ALL}
    assert decided == {pass_: "triton" if pass_ in kernels_take else "aten" for pass_ in ALL}
    assert dispatch.aten_alone("auto", tensor, dtype, geometry) == (not kernels_take)
    with torch.no_grad():
        assert dispatch.aten_alone("auto", tensor, dtype, geometry) == ("forward" not in kernels_take)


def set_device(monkeypatch: pytest.MonkeyPatch, kind: str, bandwidth: float) -> None:
    """Make every tensor's device a GPU that nothing was measured on."""
    from gconv import kernels
    from gconv.kernels.device import Device

    monkeypatch.setattr(dispatch, "_device_problem", lambda device: None)
    device = Device(kind, "no table for it", 132, 90, bandwidth)
    monkeypatch.setattr(kernels, "device_of", lambda _: device)


def geometry_of_batch(batch: int) -> ConvGeometry:
    return ConvGeometry.of((batch, 128, 56, 56), (128, 4, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 32)


@pytest.mark.parametrize(("batch", "taken"), [(1, False), (62, False), (63, True), (256, True)])
def test_auto_leaves_small_eager_calls_to_pytorch(
    batch: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass of 1.6 MB an image has a floor of 25 us at 62.3 images."""
    set_device(monkeypatch, "cuda", bandwidth=4e12)
    tensor, geometry, dtype = on_gpu(), geometry_of_batch(batch), torch.bfloat16
    assert dispatch.aten_alone("auto", tensor, dtype, geometry) != taken
    found = dispatch.decide_call("auto", tensor.device, "channels_last", dtype, geometry)
    assert {decision.backend for decision in found.values()} == {"triton" if taken else "aten"}
    assert taken or all("too small to gain in an eager call" in d.reason for d in found.values())
    in_a_graph = [dispatch.decide("auto", pass_, tensor, dtype, geometry).backend for pass_ in ALL]
    assert in_a_graph == ["triton"] * 3, "a compiled graph holds the call already"
    asked_for = dispatch.decide_call("triton", tensor.device, "channels_last", dtype, geometry)
    assert {decision.backend for decision in asked_for.values()} == {"triton"}


@pytest.mark.parametrize(("kind", "bandwidth"), [("hip", 4e12), ("cuda", math.inf)])
def test_auto_takes_no_kernel_by_rule_on_a_gpu_unlike_the_measured_one(
    kind: str, bandwidth: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AMD's, where nothing was measured; one whose driver does not tell how fast its memory is."""
    set_device(monkeypatch, kind, bandwidth)
    assert dispatch.aten_alone("auto", on_gpu(), torch.bfloat16, geometry_of_batch(256))
