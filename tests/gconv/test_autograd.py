"""Derivatives of every order and mode, and autocast."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracle import PATHS, Case, run
from torch import Tensor

SMALL = [
    Case("3x3", (1, 4, 3, 3), (4, 2, 3, 3), {"padding": 1, "groups": 2}),
    Case("stride 2", (2, 4, 4, 3), (2, 2, 3, 3), {"stride": 2, "padding": 1, "groups": 2}, bias=False),
    Case("dilation 2, kernel 2x3", (1, 3, 5, 6), (3, 1, 2, 3), {"dilation": 2, "groups": 3}),
    Case("same, 4x2", (1, 4, 4, 3), (2, 2, 4, 2), {"padding": "same", "groups": 2}),
    Case("stride 3, one image", (2, 8, 5), (2, 1, 2, 2), {"stride": 3, "groups": 2}),
]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
    # vmap runs our operators once for each element.
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]


GRADCHECKS = [
    pytest.param(
        *(case, path, activation),
        id=f"{case.name}-{path}-{activation}",
        marks=[pytest.mark.long] * (path == "reference" and activation is not None),
    )
    for case in SMALL
    for path in PATHS
    for activation in (None, "relu")
]


@pytest.mark.parametrize(("case", "path", "activation"), GRADCHECKS)
def test_gradcheck_and_gradgradcheck(case: Case, path: str, activation: str | None) -> None:
    tensors = [t for t in case.tensors() if t is not None]

    def convolve(*tensors: Tensor) -> Tensor:
        return run(path, *tensors, **case.settings, activation=activation)

    assert torch.autograd.gradcheck(convolve, tensors, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(convolve, tensors, check_fwd_over_rev=path != "aten")


@pytest.mark.parametrize("path", ["aten", "reference"])
def test_gradcheck_of_complex_numbers(path: str) -> None:
    x = torch.randn(1, 4, 2, 3, dtype=torch.complex128, requires_grad=True)
    w = torch.randn(2, 2, 2, 3, dtype=torch.complex128, requires_grad=True)
    b = torch.randn(2, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: run(path, *t, padding=1, groups=2), (x, w, b))
    assert torch.autograd.gradgradcheck(lambda *t: run(path, *t, padding=1, groups=2), (x, w, b))


def loss_of(convolve: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A scalar of input, weight and bias that is linear in none of them."""

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return convolve(x, w, b).sin().sum()

    return loss


@pytest.fixture
def losses(path: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return run(path, x, w, b, padding=1, groups=2, activation="relu")

    def theirs(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(x, w, b, padding=1, groups=2).relu()

    return loss_of(ours), loss_of(theirs)


@pytest.fixture
def tensors() -> tuple[Tensor, ...]:
    return tuple(t.detach() for t in Case("", (2, 4, 4, 3), (4, 2, 3, 3)).tensors())


func = torch.func
TRANSFORMS = {
    "grad": lambda loss: func.grad(loss, (0, 1, 2)),
    "grad of grad": lambda loss: func.grad(lambda *t: func.grad(loss, 1)(*t).cos().sum(), (0, 1, 2)),
    "hessian": lambda loss: func.hessian(loss, 1),
    "jacrev of jacrev": lambda loss: func.jacrev(func.jacrev(loss, 1), 0),
    "jacfwd of jacrev": lambda loss: func.jacfwd(func.jacrev(loss, 0), 1),
    "jvp": lambda loss: lambda *t: func.jvp(loss, t, tuple(x.cos() for x in t)),
    "jvp, no_grad": lambda loss: lambda *t: torch.no_grad()(func.jvp)(loss, t, tuple(x.cos() for x in t)),
    "vmap": lambda loss: func.vmap(lambda x, w, b: loss(x[None], w, b), (0, None, None)),
    "a gradient each": lambda loss: func.vmap(
        func.grad(lambda x, w, b: loss(x[None], w, b), 1), (0, None, None)
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_torch_func(losses: tuple, tensors: tuple[Tensor, ...], transform: Callable) -> None:
    ours, theirs = (transform(loss)(*tensors) for loss in losses)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("path", ["reference", "aten operators"])
def test_forward_mode_in_forward_mode_is_refused(path: str, tensors: tuple[Tensor, ...]) -> None:
    """Rather than wrong: PyTorch loses the outer tangents of what a Function saved."""
    loss = loss_of(lambda *t: run(path, *t, padding=1, groups=2))
    with pytest.raises(RuntimeError, match="take jacfwd of jacrev"):
        torch.func.jacfwd(torch.func.jacfwd(loss, 0), 1)(*tensors)


def test_relu_gradient_is_pytorchs_at_zero_and_at_nan(path: str) -> None:
    x = torch.tensor([-1.0, 0.0, 1.0, torch.nan], requires_grad=True)
    weight = torch.ones(1, 1, 1, 1)
    (ours,) = torch.autograd.grad(run(path, x.view(1, 1, 1, 4), weight, activation="relu").sum(), x)
    (theirs,) = torch.autograd.grad(F.conv2d(x.view(1, 1, 1, 4), weight).relu().sum(), x)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("held", [torch.float32, torch.float64, torch.float16], ids=str)
def test_autocast_casts_as_for_conv2d(path: str, dtype: torch.dtype, held: torch.dtype) -> None:
    case = Case("", (2, 4, 6, 6), (4, 2, 3, 3), {"padding": 1, "groups": 2})
    results = []
    for convolve in (lambda *t, **s: run(path, *t, **s), F.conv2d):
        tensors = case.tensors(held)
        with torch.autocast("cpu", dtype):
            output = convolve(*tensors, **case.settings)
        output.double().square().sum().backward()
        results.append([output, *(t.grad for t in tensors)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= 8 * torch.finfo(output.dtype).eps * theirs.abs().max()


def test_autocast_takes_weights_wider_than_the_input(path: str) -> None:
    x, w, b = torch.randn(2, 4, 6, 6).bfloat16(), torch.randn(4, 2, 3, 3), torch.randn(4)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = run(path, x, w, b, groups=2), F.conv2d(x, w, b, groups=2)
    torch.testing.assert_close(ours, theirs)


def test_autocast_does_not_narrow_the_sums_of_the_reference() -> None:
    """Inside the operators it is off: each pass gives the same bits as where it never was on."""
    case = Case("", (3, 16, 9, 9), (16, 8, 3, 3), {"padding": 1, "groups": 2})
    results = []
    for enabled in (False, True):
        tensors = case.tensors(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = run("reference", *tensors, **case.settings)
            grads = torch.autograd.grad(output, tensors, output.detach().sin())
        results.append([output, *grads])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_autocast_casts_a_weight_once_for_many_calls() -> None:
    """As for ``F.conv2d``: PyTorch remembers what it cast."""
    x, w = torch.randn(1, 4, 5, 5), torch.randn(4, 2, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), torch.profiler.profile() as profile:
        for _ in range(4):
            run("aten", x.bfloat16(), w, groups=2)
    casts = [event.count for event in profile.key_averages() if event.key == "aten::_to_copy"]
    assert casts == [4 + 1], "one of each input, one of the weight"


def test_outputs_and_gradients_may_be_changed_in_place(path: str) -> None:
    """As ``nn.ReLU(inplace=True)`` behind a convolution does."""
    for size in ((2, 4, 5, 5), (1, 4, 1, 1), (4, 5, 5)):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(size, dtype=torch.float64)
            x = (x.contiguous(memory_format=layout) if x.ndim == 4 else x).requires_grad_()
            w = torch.randn(1 if size[-1] == 1 else 4, 4, 3, 3, dtype=torch.float64, requires_grad=True)
            results = []
            for convolve in (lambda *t, **s: run(path, *t, **s), F.conv2d):
                y = convolve(x, w, padding=1)
                y.mul_(2).relu_()
                results.append([y, *torch.autograd.grad(y.square().sum(), (x, w))])
            torch.testing.assert_close(*results)
