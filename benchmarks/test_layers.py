"""The grouped layers of ResNeXt-50, forward and backward, beside ``F.conv2d``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import gconv
from benchmarks.layers import RESNEXT50, Layer

BATCH = 4
RUNNERS = {
    "F.conv2d": F.conv2d,
    "auto": gconv.group_conv2d,
    "reference": lambda *tensors, **settings: gconv.group_conv2d(*tensors, **settings, backend="reference"),
}


def gradients(convolve: Callable, x: Tensor, w: Tensor, grad: Tensor, layer: Layer) -> tuple[Tensor, ...]:
    output = convolve(x.requires_grad_(), w.requires_grad_(), **layer.settings)
    return torch.autograd.grad(output, (x, w), grad)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("layer", RESNEXT50, ids=lambda layer: layer.name)
@pytest.mark.parametrize("passes", ["forward", "forward and backward"])
def test_layer(benchmark: BenchmarkFixture, passes: str, layer: Layer, runner: str) -> None:
    """A speed counts only beside a right answer: it is compared with float64 first."""
    benchmark.group = f"{layer.name}, batch {BATCH}, {passes}"
    x, w = layer.tensors(BATCH)
    convolve = RUNNERS[runner]
    truth = F.conv2d(x.double(), w.double(), **layer.settings)
    torch.testing.assert_close(convolve(x, w, **layer.settings).double(), truth, rtol=1e-4, atol=1e-4)
    grad = torch.randn_like(truth, dtype=x.dtype)
    for ours, right in zip(
        gradients(convolve, x, w, grad, layer),
        gradients(F.conv2d, *(t.double() for t in (x, w, grad)), layer),
        strict=True,
    ):
        torch.testing.assert_close(ours.double(), right, rtol=1e-4, atol=1e-3)

    def forward() -> Tensor:
        with torch.no_grad():
            return convolve(x, w, **layer.settings)

    def both() -> tuple[Tensor, ...]:
        return gradients(convolve, x, w, grad, layer)

    run = forward if passes == "forward" else both
    benchmark.pedantic(run, rounds=10, iterations=1, warmup_rounds=2)
    benchmark.extra_info["match"] = "float64: output within 1e-4, gradients within 1e-3"
