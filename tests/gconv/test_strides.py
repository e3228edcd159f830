"""Strides: channels_last in, channels_last out, as ``F.conv2d`` decides it and as the fake kernels say."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from oracle import run
from torch import Tensor
from torch._subclasses import FakeTensorMode

LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "channel slice of channels_last": lambda t: torch.cat([t, t], 1)
    .contiguous(memory_format=torch.channels_last)[:, : t.shape[1]],
    "every other row": lambda t: t.repeat_interleave(2, 2)[:, :, ::2],
}  # fmt: skip
PAIRS = list(itertools.product(LAYOUTS, LAYOUTS))
SIZES = {
    "groups": ((2, 8, 7, 6), (8, 2, 3, 3), 4),
    "depthwise": ((2, 8, 7, 6), (8, 1, 3, 3), 8),
    "dense": ((2, 4, 7, 6), (6, 4, 3, 3), 1),
    "one image of a batch": ((1, 8, 7, 6), (8, 2, 3, 3), 4),
    "1x1 kernel": ((2, 8, 7, 6), (8, 2, 1, 1), 4),
    "one input channel": ((2, 1, 7, 6), (4, 1, 3, 3), 1),
    "one output channel": ((2, 4, 7, 6), (1, 4, 3, 3), 1),
    "one pixel": ((2, 8, 1, 1), (8, 2, 3, 3), 4),
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_strides_are_those_of_conv2d(path: str, size: tuple) -> None:
    input_size, weight_size, groups = size
    for of_input, of_weight in PAIRS:
        x = LAYOUTS[of_input](torch.randn(input_size)).requires_grad_()
        w = LAYOUTS[of_weight](torch.randn(weight_size)).requires_grad_()
        ours = run(path, x, w, padding=1, groups=groups)
        theirs = F.conv2d(x, w, padding=1, groups=groups)
        assert ours.stride() == theirs.stride(), (of_input, of_weight)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_keep_the_layout(path: str, layout: str) -> None:
    x, w = (LAYOUTS[layout](torch.randn(s)).requires_grad_() for s in ((2, 8, 7, 6), (8, 2, 3, 3)))
    y = run(path, x, w, padding=1, groups=4)
    grads = torch.autograd.grad(y, (x, w), torch.randn_like(y))
    assert [g.stride() for g in grads] == [x.stride(), w.stride()]


@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_fake_kernels_tell_the_strides(backend: str, size: tuple) -> None:
    input_size, weight_size, groups = size
    settings = ((1, 1), (1, 1, 1, 1), (1, 1), groups)
    x, w = torch.randn(input_size), torch.randn(weight_size)
    grad = F.conv2d(x, w, padding=1, groups=groups)
    calls = [
        (torch.ops.gconv.forward, x, w, (None, *settings, None, None, backend)),
        (torch.ops.gconv.input_grad, grad, w, (input_size, *settings, backend)),
        (torch.ops.gconv.weight_grad, grad, x, (weight_size, *settings, True, backend)),
    ]
    for (operator, one, other, rest), (first, second) in itertools.product(calls, PAIRS):
        one, other = LAYOUTS[first](one), LAYOUTS[second](other)
        real = operator(one, other, *rest)
        with FakeTensorMode() as mode:
            fake = operator(mode.from_tensor(one), mode.from_tensor(other), *rest)
        assert describe(fake) == describe(real), (first, second)


def describe(result: Tensor | tuple[Tensor, ...]) -> list[tuple]:
    tensors = [result] if isinstance(result, Tensor) else result
    return [(tuple(t.shape), t.stride(), t.dtype) for t in tensors]
