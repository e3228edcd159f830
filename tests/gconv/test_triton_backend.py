"""``backend="triton"`` as users request it: gradients, operators, graphs, layouts, errors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from marks import interpreted
from oracle import Case
from torch import Tensor

import gconv
from gconv import dispatch

CASE = Case("", (2, 8, 5, 4), (8, 2, 3, 3), {"padding": 1, "groups": 4})


def triton(*tensors: Tensor | None, **settings: object) -> Tensor:
    return gconv.group_conv2d(*tensors, **settings, backend="triton")


@interpreted
@pytest.mark.filterwarnings("ignore:Input #:UserWarning")  # from gradcheck, for float32
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
    """In float32, because the kernels don't support float64. The passes are linear, so steps can be large."""
    case = Case("", (1, 4, 4, 3), (4, 2, 3, 3))
    tensors = case.tensors(torch.float32)
    settings = {"stride": stride, "padding": 1, "groups": 2}
    assert check(lambda *t: triton(*t, **settings), tensors, eps=0.25, atol=1e-3, rtol=1e-3, fast_mode=True)


@interpreted
@pytest.mark.parametrize("name", ["forward", "input_grad", "weight_grad"])
def test_opcheck(name: str) -> None:
    x, w, b = CASE.tensors(torch.float32)
    dy = torch.randn_like(F.conv2d(x, w, b, **CASE.settings)).requires_grad_()
    settings = ((1, 1), (1, 1, 1, 1), (1, 1), 4)
    arguments = {
        "forward": (x, w, b, *settings, "relu", None, "triton"),
        "input_grad": (dy, w, None, x.shape, *settings, None, None, "triton"),
        "weight_grad": (dy, x, w.shape, *settings, True, "triton"),
    }
    # opcheck compares the gradients of graphs and eager mode with a tolerance for float64, so it is widened
    # here.
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
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64], ids=str)
def test_types_without_a_kernel_are_refused(dtype: torch.dtype) -> None:
    x, w = torch.ones(1, 4, 5, 5, dtype=dtype), torch.ones(4, 2, 3, 3, dtype=dtype)
    with pytest.raises(
        RuntimeError, match=f"can't run here: the kernels support float16, bfloat16 and float32, got {dtype}"
    ):
        triton(x, w, groups=2)


def test_without_gpu_and_interpreter_the_refusal_says_what_to_do() -> None:
    code = (
        "import torch, gconv\n"
        "gconv.group_conv2d(torch.ones(1, 4, 5, 5), torch.ones(4, 2, 3, 3), groups=2, backend='triton')"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (
        "got cpu; to test them on the CPU, slowly, set TRITON_INTERPRET=1 in the environment" in done.stderr
    )


def test_without_triton_the_refusal_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", False)
    with pytest.raises(RuntimeError, match="Triton isn't installed: pip install triton"):
        triton(torch.ones(1, 4, 5, 5), torch.ones(4, 2, 3, 3), groups=2)
