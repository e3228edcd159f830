"""Fusion on a GPU, ``pytest -m gpu``: batch norms inside the kernels, and networks for inference."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from families import DTYPES, FAMILIES, LARGE, Place, aligned, check, inside_nan
from fusing import trained
from marks import ON_A_GPU
from norms import check_norm_kernels, check_padding, norm_results
from oracle import Case
from sandwiches import one_by_one, sandwich

import gconv
from gconv import ops
from gconv.activation import ACTIVATIONS
from resnext import measured, resnext50_32x4d

pytestmark = [pytest.mark.gpu, *ON_A_GPU, pytest.mark.usefixtures("full_float32")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FAMILIES + LARGE, ids=lambda case: case.name)
@pytest.mark.parametrize("place", [aligned, inside_nan])
def test_batch_norm_before_and_after_matches_float64(place: Place, case: Case, dtype: torch.dtype) -> None:
    check(norm_results(case, dtype, device="cuda", place=place))


@pytest.mark.parametrize("case", FAMILIES + LARGE, ids=lambda case: case.name)
def test_padding_is_zero_even_if_the_norm_of_zero_overflows(case: Case) -> None:
    check_padding(case, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_by_themselves_match_their_equations(dtype: torch.dtype) -> None:
    x, grad = (torch.randn(32, 200, 28, 28, device="cuda").to(dtype) * 2 + 3 for _ in range(2))
    norm, slope = torch.randn(3, 200, device="cuda"), torch.randn(2, 200, device="cuda")
    check_norm_kernels(x, grad, norm, slope, tolerance=1e-4)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_fused_by_itself_in_autocast(
    dtype: torch.dtype, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the backend ``auto``, compared with the modules in float64."""
    calls, run = [], ops.norm_forward
    monkeypatch.setattr(ops, "norm_forward", lambda *a: (calls.append(1), run(*a))[1])
    modules = sandwich(128, 32, stride, dtype=torch.float32).cuda()
    twin = copy.deepcopy(modules).double()
    x = torch.randn(8, 128, 28, 28, device="cuda").contiguous(memory_format=torch.channels_last)
    with torch.autocast("cuda", dtype):
        y = gconv.conv_between_norms(x.to(dtype), *modules)
    right = one_by_one(x.to(dtype).double(), *twin)
    y.float().square().mean().backward()
    right.square().mean().backward()
    assert calls and (y.double() - right).norm() <= 0.02 * right.norm()
    for ours, theirs in zip(modules.parameters(), twin.parameters(), strict=True):
        assert (ours.grad.double() - theirs.grad).norm() <= 0.05 * theirs.grad.norm()
    for ours, theirs in zip(modules.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-2, atol=1e-2)


def test_a_fused_resnext_learns_in_a_cuda_graph() -> None:
    """Eager and replayed: the loss on one batch decreases as it does without fusion."""
    x, labels = torch.randn(16, 3, 64, 64, device="cuda"), torch.randint(10, (16,), device="cuda")
    x, losses = x.contiguous(memory_format=torch.channels_last), {}
    for fused in (False, True):
        torch.manual_seed(0)
        model = resnext50_32x4d(num_classes=10, fused=fused).cuda().to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)

        def step(
            model: torch.nn.Module = model, optimizer: torch.optim.Optimizer = optimizer
        ) -> torch.Tensor:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16):
                loss = F.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            return loss.detach()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            first, *_ = [step().item() for _ in range(3)]
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = step()
        for _ in range(20):
            graph.replay()
        losses[fused] = first, loss.item()
    assert abs(losses[True][0] - losses[False][0]) < 0.05
    assert max(losses[True][1], losses[False][1]) < 0.5


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_residual_and_activation(case: Case, activation: str | None) -> None:
    x, w, b = (t.detach().cuda() for t in case.tensors(torch.bfloat16))
    x = x.contiguous(memory_format=torch.channels_last)
    plain = F.conv2d(x.double(), w.double(), b.double(), **case.settings)
    residual = torch.randn_like(plain).bfloat16()
    with torch.no_grad():
        y = gconv.group_conv2d(
            x, w, b, **case.settings, activation=activation, residual=residual, backend="triton"
        )
    right = plain + residual.double()
    right = right if activation is None else ACTIVATIONS[activation](right)
    torch.testing.assert_close(y.double(), right, rtol=1e-2, atol=5e-2)


@pytest.mark.parametrize("graphed", [False, True])
def test_gconv_fuse(graphed: bool) -> None:
    model = trained(resnext50_32x4d()).float().cuda().to(memory_format=torch.channels_last)
    fused, report = gconv.fuse(model)
    assert len(report.folded) == 53
    x = torch.randn(8, 3, 64, 64, device="cuda").contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        right = model(x)
        found = fused(x)
        if graphed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = fused(x)
            graph.replay()
    assert (found - right).float().norm() <= 0.05 * right.float().norm()


def test_the_stages_of_a_network_are_measured() -> None:
    times = measured.measure(resnext50_32x4d, 8, 64, torch.device("cuda"))
    assert len(times) == 6 and all(0 < row.fused_training < 1 for row in times)
