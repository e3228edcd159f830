"""What is measured: the networks' layers, their operands, the reference, and PyTorch's implementation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gconv
from gconv.geometry import PASSES, ConvGeometry, Padding
from gconv.measure import recorder
from gconv.measure.problem import LAYOUTS, TYPES, Problem
from gconv.measure.suites import SUITES, Layer

CPU = torch.device("cpu")
LAYER = Layer(8, 4, 5, stride=2)


def test_suites_hold_the_grouped_layers_of_the_networks() -> None:
    """Compared with the networks themselves, recorded on one image."""
    from resnext import resnext50_32x4d, resnext101_32x8d, resnext101_64x4d

    for make in (resnext50_32x4d, resnext101_32x8d, resnext101_64x4d):
        found = recorder.grouped_convolutions(make, (3, 224, 224))
        assert {layer.geometry(1) for layer in SUITES[make.__name__]} == set(found)


def test_recorder_meets_functional_calls_padding_and_gconv_and_no_dense_ones() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Conv2d(3, 8, 1)
            self.grouped = nn.Conv2d(8, 8, 3, padding="same", groups=4)
            self.ours = gconv.GroupConv2d(8, 8, 3, stride=2, groups=2, bias=False)
            self.weight = nn.Parameter(torch.randn(8, 1, 3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.grouped(self.grouped(self.dense(x)))
            return F.conv2d(F.pad(self.ours(x), [1, 2, 1, 2]), self.weight, groups=8)

    found = recorder.grouped_convolutions(Net, (3, 9, 9))
    assert [(g.groups, g.input_size, g.padding) for g in found] == [
        (4, (1, 8, 9, 9), Padding(1, 1, 1, 1)),
        (2, (1, 8, 9, 9), Padding(0, 0, 0, 0)),
        (8, (1, 8, 7, 7), Padding(0, 0, 0, 0)),
    ]


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("batch", [1, 11])
def test_pytorch_and_truth_are_conv2d_and_its_gradient(pass_: str, batch: int) -> None:
    problem = Problem(pass_, LAYER.geometry(batch), "float32")
    x, w, dy = operands = problem.draw(CPU)
    leaves = [x.double().requires_grad_(), w.double().requires_grad_()]
    y = F.conv2d(*leaves, stride=2, padding=1, groups=4)
    dx, dw = torch.autograd.grad(y, leaves, dy.double())
    right = {"forward": y.detach(), "input_grad": dx, "weight_grad": dw}[pass_]
    for result in (problem.run_pytorch(operands), problem.run(operands, "reference")):
        torch.testing.assert_close(result.double(), right, atol=1e-4, rtol=1e-4)
        assert problem.matches(problem.error(result, problem.truth(operands)))
    torch.testing.assert_close(
        problem.truth(operands), right if pass_ == "weight_grad" else right[:: -(-batch // 8)]
    )


@pytest.mark.parametrize("type_", TYPES)
def test_one_wrong_number_does_not_match(type_: str) -> None:
    problem = Problem("forward", Layer(16, 4, 14).geometry(2), type_)
    operands = problem.draw(CPU)
    truth, result = problem.truth(operands), problem.run_pytorch(operands)
    assert problem.matches(problem.error(result, truth))
    for wrong in (result[0, 3, 0, 7] + 0.3, torch.nan):
        broken = result.clone()
        broken[0, 3, 0, 7] = wrong
        assert not problem.matches(problem.error(broken, truth))


def test_tf32_does_not_pass_for_float32() -> None:
    problem = Problem("forward", Layer(16, 4, 14).geometry(2), "float32")
    x, w, dy = problem.draw(CPU)
    as_tf32 = [(t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (x, w)]  # ten bits of mantissa
    result = problem.run_pytorch(type(problem.draw(CPU))(*as_tf32, dy))
    error = problem.error(result, problem.truth(problem.draw(CPU)._replace(x=x, weight=w)))
    assert not problem.matches(error) and replace(problem, type="tf32").matches(error)


def test_operands_lie_as_asked_and_precision_is_restored() -> None:
    problem = Problem("forward", LAYER.geometry(2), "tf32")
    for layout, form in LAYOUTS.items():
        assert all(t.is_contiguous(memory_format=form) for t in problem.draw(CPU, layout))
    before = torch.backends.cudnn.conv.fp32_precision
    for type_, inside in (("tf32", "tf32"), ("float32", "none"), ("float16", before)):
        with replace(problem, type=type_).precision():
            assert torch.backends.cudnn.conv.fp32_precision == inside
            torch._C._get_cudnn_allow_tf32()  # raises an error if PyTorch's two settings were mixed
        assert torch.backends.cudnn.conv.fp32_precision == before
        torch._C._get_cudnn_allow_tf32()


def test_unlike_paddings_have_a_peer_too() -> None:
    geometry = ConvGeometry((2, 4, 6, 5), (4, 2, 2, 2), (1, 1), Padding(0, 1, 0, 1), (1, 1), 2)
    problem = Problem("input_grad", geometry, "float32")
    operands = problem.draw(CPU)
    torch.testing.assert_close(problem.run_pytorch(operands), problem.run(operands, "reference"))
