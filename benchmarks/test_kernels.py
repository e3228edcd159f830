"""Each pass of the grouped layers of ResNeXt-50 on a GPU, beside cuDNN in both layouts and the memory floor.

Times are CUDA events', with L2 flushed in between, in ``extra_info``; pytest-benchmark's own columns are the
host's. Without a GPU it runs only if TRITON_INTERPRET=1 is set, on tiny sizes, to try the code.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.layers import RESNEXT50, Layer
from gconv.explain import copy_speed
from gconv.geometry import ConvGeometry

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TINY = [Layer("tiny", 16, 6, 4), Layer("tiny, stride 2", 16, 6, 4, stride=2)]
LAYERS, BATCH = (RESNEXT50, 256) if GPU else (TINY, 2)
PASSES = ("forward", "input_grad", "weight_grad")
BACKENDS = ("triton", "aten, channels_last", "aten, contiguous")
TOLERANCE = {torch.float32: 2e-3, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not GPU and os.environ.get("TRITON_INTERPRET") != "1",
        reason="needs a GPU, or TRITON_INTERPRET=1 to try it",
    ),
]


def seconds(run: Callable[[], object], rounds: int = 30) -> list[float]:
    """Each round's time on the device, or on the host where there is none."""
    if not GPU:
        start = time.perf_counter()
        run()
        return [time.perf_counter() - start]
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device=DEVICE)
    times = []
    for i in range(rounds + 5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.fill_(i % 7)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times[5:])


def passes(
    layer: Layer, dtype: torch.dtype, backend: str
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, Tensor]]:
    """A call of each pass on ``backend``, and what each should return, in float64 for one image in eight."""
    name, _, layout = backend.partition(", ")
    form = torch.contiguous_format if layout == "contiguous" else torch.channels_last
    x, w = (t.to(DEVICE, dtype, memory_format=form) for t in layer.tensors(BATCH))
    settings = ((layer.stride,) * 2, (1, 1, 1, 1), (1, 1), layer.groups, name)
    dy = torch.randn_like(torch.ops.gconv.forward(x, w, None, None, *settings))
    calls = {
        "forward": lambda: torch.ops.gconv.forward(x, w, None, None, *settings),
        "input_grad": lambda: torch.ops.gconv.input_grad(dy, w, x.shape, *settings),
        "weight_grad": lambda: torch.ops.gconv.weight_grad(dy, x, w.shape, False, *settings)[0],
    }
    wide_x, wide_w = x[::8].double().requires_grad_(), w.double().requires_grad_()
    y = F.conv2d(wide_x, wide_w, **layer.settings)
    (dx,) = torch.autograd.grad(y, wide_x, dy[::8].double(), retain_graph=True)
    dw = sum(
        torch.autograd.grad(F.conv2d(x[i::8].double(), wide_w, **layer.settings), wide_w, dy[i::8].double())[
            0
        ]
        for i in range(8)
        if len(x[i::8])
    )
    return calls, {"forward": y.detach(), "input_grad": dx, "weight_grad": dw}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_pass(
    benchmark: BenchmarkFixture, layer: Layer, pass_: str, backend: str, dtype: torch.dtype
) -> None:
    """A speed counts only beside a right answer."""
    torch.backends.cudnn.benchmark = True
    calls, truth = passes(layer, dtype, backend)
    result, right = calls[pass_](), truth[pass_]
    result = result if pass_ == "weight_grad" else result[::8]
    error = ((result.double() - right).abs().max() / right.abs().max()).item()
    assert error <= TOLERANCE[dtype], f"wrong by {error:.1e} of the largest"

    size = (BATCH, layer.channels, layer.size, layer.size)
    weight_size = (layer.channels, layer.channels // layer.groups, 3, 3)
    strides = (layer.stride,) * 2
    geometry = ConvGeometry.of(size, weight_size, strides, (1, 1, 1, 1), (1, 1), layer.groups)
    floor = geometry.compulsory_bytes(dtype.itemsize) / copy_speed(
        torch.device(DEVICE), 2**30 if GPU else 2**20
    )
    times = seconds(calls[pass_])
    benchmark.group = f"{layer.name}, {pass_}, {str(dtype)[6:]}"
    benchmark.extra_info |= {
        "microseconds p20, p50, p80": [round(q * 1e6, 2) for q in quantiles(times)],
        "fraction of the floor": round(floor / statistics.median(times), 4),
        "error against float64": f"{error:.1e}",
        "batch": BATCH,
    }
    benchmark.pedantic(calls[pass_], rounds=20 if GPU else 1, iterations=1, warmup_rounds=1)


def quantiles(times: list[float]) -> list[float]:
    """p20, p50 and p80."""
    return [times[int(q * (len(times) - 1))] for q in (0.2, 0.5, 0.8)]
