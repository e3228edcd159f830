"""``torch.ops.gconv``: what a compiled or exported graph holds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import Case, run
from torch.utils.flop_counter import FlopCounterMode

CASES = [
    Case("3x3", (2, 4, 5, 6), (4, 2, 3, 3), {"padding": 1, "groups": 2}),
    Case("stride 2, dilated", (2, 4, 7, 6), (6, 2, 3, 2), {"stride": 2, "dilation": (1, 2), "groups": 2}),
    Case("no images", (0, 4, 5, 6), (4, 2, 3, 3), {"padding": 1, "groups": 2}),
]


def calls(case: Case, backend: str) -> dict[str, tuple]:
    """Arguments of each operator."""
    pairs = {"stride": 1, "padding": 0, "dilation": 1, **case.settings}
    stride, padding, dilation = (
        (pairs[name],) * 2 if isinstance(pairs[name], int) else pairs[name]
        for name in ("stride", "padding", "dilation")
    )
    zeros = (padding[0], padding[0], padding[1], padding[1])
    settings = (stride, zeros, dilation, case.groups, backend)
    x, w, b = case.tensors()
    grad = torch.randn_like(F.conv2d(x, w, b, **case.settings)).requires_grad_()
    return {
        "forward": (x, w, b, "relu", *settings),
        "input_grad": (grad, w, x.shape, *settings),
        "weight_grad": (grad, x, w.shape, True, *settings),
    }


@pytest.mark.parametrize("backend", ["auto", "aten", "reference"])
@pytest.mark.parametrize("name", ["forward", "input_grad", "weight_grad"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_opcheck(case: Case, name: str, backend: str) -> None:
    operator = getattr(torch.ops.gconv, name).default
    result = torch.library.opcheck(operator, calls(case, backend)[name])
    assert set(result.values()) == {"SUCCESS"}


def test_weight_grad_without_bias_leaves_it_empty() -> None:
    grad, x, size, _, *settings = calls(CASES[0], "reference")["weight_grad"]
    weight, bias = torch.ops.gconv.weight_grad(grad, x, size, False, *settings)
    assert weight.shape == size and bias.shape == (0,)


@pytest.mark.parametrize("path", ["reference", "aten operators"])
@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_flop_counter_counts_each_pass_once(case: Case, path: str) -> None:
    """2 N K P Q Cg R S a pass; PyTorch's own formula counts the weight gradient ``groups`` times over."""
    x, w, b = case.tensors()
    with FlopCounterMode(display=False) as counter:
        y = run(path, x, w, b, **case.settings)
        forward = counter.get_total_flops()
        y.sum().backward()
    expected = 2 * y.numel() * w[0].numel()
    assert forward == expected
    assert counter.get_total_flops() == 3 * expected
    with FlopCounterMode(display=False) as counter:
        F.conv2d(x, w, b, **case.settings)
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize("transform", [torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1]])
def test_torch_func_inside_compile_is_refused(transform: object) -> None:
    """Rather than wrong, or an error of PyTorch's that explains nothing."""
    w = torch.randn(4, 2, 3, 3)
    function = transform(lambda x: run("reference", x, w, groups=2).sum())
    with pytest.raises(Exception, match=r"cannot be transformed by torch\.func"):
        torch.compile(function, backend="aot_eager", fullgraph=True)(torch.randn(1, 4, 5, 5))
    torch._dynamo.reset()
