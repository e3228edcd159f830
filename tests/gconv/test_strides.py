"""Strides: channels_last in, channels_last out, with the rule of ``F.conv2d``; fake kernels agree."""

from __future__ import annotations

import itertools
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from oracle import FUNCTIONS, Case, run
from torch import Tensor
from torch._subclasses import FakeTensorMode

from gconv import dispatch, reference
from gconv.kinds import CONV1D, CONV2D, CONV3D, CONV_TRANSPOSE1D, CONV_TRANSPOSE2D, Kind


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last_3d if t.ndim == 5 else torch.channels_last)


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": channels_last,
    "transposed": lambda t: t.transpose(-2, -1).contiguous().transpose(-2, -1),
    "channel slice of channels_last": lambda t: channels_last(torch.cat([t, t], 1))[:, : t.shape[1]],
    "every other row": lambda t: t.repeat_interleave(2, -2)[..., ::2, :],
}
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
OTHER_SIZES = {
    "groups": (CONV_TRANSPOSE2D, (2, 8, 5, 4), (8, 2, 3, 3), 4),
    "depthwise": (CONV_TRANSPOSE2D, (2, 8, 5, 4), (8, 1, 3, 3), 8),
    "dense": (CONV_TRANSPOSE2D, (2, 4, 5, 4), (4, 6, 3, 3), 1),
    "one input channel": (CONV_TRANSPOSE2D, (2, 1, 5, 4), (1, 4, 3, 3), 1),
    "one pixel": (CONV_TRANSPOSE2D, (2, 8, 1, 1), (8, 2, 3, 3), 4),
    "groups, depth 1": (CONV3D, (2, 8, 3, 5, 4), (8, 2, 1, 3, 3), 4),
    "groups, depth 3": (CONV3D, (2, 8, 3, 5, 4), (8, 2, 3, 3, 3), 4),
    "depthwise, depth 3": (CONV3D, (2, 8, 3, 5, 4), (8, 1, 3, 3, 3), 8),
    "dense, depth 1": (CONV3D, (2, 4, 3, 5, 4), (6, 4, 1, 3, 3), 1),
    "one channel": (CONV3D, (2, 1, 3, 5, 4), (4, 1, 3, 3, 3), 1),
    "one pixel of a volume": (CONV3D, (2, 8, 1, 1, 1), (8, 2, 3, 3, 3), 4),
}
STRIDES = [pytest.param(CONV2D, *sizes, id=name) for name, sizes in SIZES.items()]
STRIDES += [pytest.param(*sizes, id=f"{sizes[0]}, {name}") for name, sizes in OTHER_SIZES.items()]


@pytest.mark.parametrize(("kind", "input_size", "weight_size", "groups"), STRIDES)
def test_strides_are_those_of_pytorchs_convolution(
    path: str, kind: Kind, input_size: tuple, weight_size: tuple, groups: int
) -> None:
    case = Case("", input_size, weight_size, {"padding": 1, "groups": groups}, kind=kind)
    for of_input, of_weight in PAIRS:
        x = LAYOUTS[of_input](torch.randn(input_size)).requires_grad_()
        w = LAYOUTS[of_weight](torch.randn(weight_size)).requires_grad_()
        ours, theirs = case.run(path, x, w), case.pytorch(x, w)
        axes = range(ours.ndim) if kind.dims == 2 else [a for a, n in enumerate(ours.shape) if n > 1]
        strides = [[t.stride(axis) for axis in axes] for t in (ours, theirs)]
        assert strides[0] == strides[1], (of_input, of_weight)
        torch.testing.assert_close(ours, theirs)


class Operands:
    """Record the operands that reach the reference."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[Tensor, ...]] = []
        for name in ("forward", "input_grad", "weight_grad"):
            self.watch(monkeypatch, reference, name)

    def watch(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> None:
        run = getattr(module, name)

        def noting(*arguments: object) -> object:
            self.seen.append(arguments[:2])
            return run(*arguments)

        monkeypatch.setattr(module, name, noting)


@pytest.fixture
def operands(monkeypatch: pytest.MonkeyPatch) -> Operands:
    return Operands(monkeypatch)


UNCOPIED = [
    (CONV1D, (2, 8, 6), (8, 2, 3), {"padding": 1}),
    (CONV1D, (8, 6), (8, 2, 3), {"stride": 2}),
    (CONV_TRANSPOSE1D, (2, 8, 6), (8, 2, 3), {"stride": 2}),
    (CONV_TRANSPOSE2D, (2, 8, 5, 6), (8, 2, 3, 3), {"stride": 2}),
    (CONV3D, (2, 8, 3, 5, 6), (8, 2, 1, 3, 3), {"padding": (0, 1, 1)}),
    (CONV3D, (8, 3, 5, 6), (8, 2, 1, 3, 3), {"stride": (1, 2, 2)}),
]


@pytest.mark.parametrize(("kind", "size", "weight", "settings"), UNCOPIED, ids=str)
def test_channels_that_lie_side_by_side_reach_the_backend_as_they_are_and_stay_so(
    kind: Kind, size: tuple, weight: tuple, settings: dict, operands: Operands
) -> None:
    """For example a transposed (N, L, C) tensor in a network for sequences."""
    axis = len(size) - kind.dims - 1
    last = [n for i, n in enumerate(size) if i != axis]
    x, w = torch.randn(*last, size[axis]).movedim(-1, axis), torch.randn(weight)
    with torch.no_grad():
        y = FUNCTIONS[kind](x, w, groups=4, **settings, backend="reference")
    ((input, kernel),) = operands.seen
    assert (input.data_ptr(), kernel.data_ptr()) == (x.data_ptr(), w.data_ptr())
    assert dispatch.layout_of(input) == "channels_last"
    assert input.numel() == x.numel() and input.is_contiguous(memory_format=torch.channels_last)
    assert y.movedim(axis, -1).is_contiguous()
    torch.testing.assert_close(y, kind.pytorch(x, w, groups=4, **settings))


@pytest.mark.parametrize(("kind", "size", "weight", "settings"), UNCOPIED, ids=str)
def test_so_do_their_gradients(
    kind: Kind, size: tuple, weight: tuple, settings: dict, operands: Operands
) -> None:
    axis = len(size) - kind.dims - 1
    last = [n for i, n in enumerate(size) if i != axis]
    x = torch.randn(*last, size[axis]).movedim(-1, axis).requires_grad_()
    w = torch.randn(weight).requires_grad_()
    y = FUNCTIONS[kind](x, w, groups=4, **settings, backend="reference")
    dy = torch.empty_like(y).normal_()
    assert dy.stride() == y.stride()
    dx, _ = torch.autograd.grad(y, (x, w), dy)
    _, (of_dx, _), of_dw = operands.seen
    assert of_dx.data_ptr() == dy.data_ptr()
    assert {t.data_ptr() for t in of_dw} == {x.data_ptr(), dy.data_ptr()}
    assert dx.movedim(axis, -1).is_contiguous()


@pytest.mark.parametrize(
    ("kind", "size", "weight"),
    [
        (CONV1D, (2, 8, 6), (8, 2, 3)),
        (CONV_TRANSPOSE1D, (2, 8, 6), (8, 2, 3)),
        (CONV3D, (2, 8, 3, 5, 6), (8, 2, 1, 3, 3)),
        (CONV3D, (2, 8, 5, 5, 6), (8, 2, 3, 3, 3)),
        (CONV3D, (8, 5, 5, 6), (8, 2, 1, 3, 3)),
    ],
    ids=str,
)
def test_contiguous_in_contiguous_out(path: str, kind: Kind, size: tuple, weight: tuple) -> None:
    case = Case("", size, weight, {"groups": 4}, kind=kind)
    assert case.run(path, *case.tensors()).is_contiguous()


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
    bias, residual = torch.randn(input_size[1]), torch.randn(input_size)
    calls = [
        (torch.ops.gconv.forward, x, w, (None, *settings, None, None, backend)),
        (torch.ops.gconv.input_grad, grad, w, (bias, input_size, *settings, "silu", residual, backend)),
        (torch.ops.gconv.weight_grad, grad, x, (weight_size, *settings, True, backend)),
    ]
    for (operator, one, other, rest), (first, second) in itertools.product(calls, PAIRS):
        one, other = LAYOUTS[first](one), LAYOUTS[second](other)
        real = operator(one, other, *rest)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in (one, other, *rest)]
            fake = operator(*fakes)
        assert describe(fake) == describe(real), (first, second)


def describe(result: Tensor | tuple[Tensor, ...]) -> list[tuple]:
    tensors = [result] if isinstance(result, Tensor) else result
    return [(tuple(t.shape), t.stride(), t.dtype) for t in tensors]
