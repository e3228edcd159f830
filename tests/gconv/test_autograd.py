"""Derivatives of every order and mode, and autocast."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracle import OTHERS, PATHS, Case, run
from torch import Tensor

from gconv.kinds import CONV1D, CONV2D, CONV3D, CONV_TRANSPOSE1D, CONV_TRANSPOSE2D, KINDS, Kind

# A case with two groups for each kind; several if a kind is computed in several ways.
BEYOND = {"dilation": 3, "output_padding": 2, "groups": 2}
SMALLEST = {
    CONV1D: Case("conv1d", (2, 4, 5), (2, 2, 3), {"padding": 1, "groups": 2}, kind=CONV1D),
    CONV2D: Case("conv2d", (2, 4, 3, 2), (2, 2, 2, 2), {"groups": 2}),
    CONV3D: Case(
        "conv3d", (1, 2, 3, 2, 3), (2, 1, 2, 2, 2), {"padding": (1, 0, 0), "groups": 2}, kind=CONV3D
    ),
    CONV_TRANSPOSE1D: Case(
        "conv_transpose1d",
        (2, 2, 3),
        (2, 2, 3),
        {"stride": 2, "padding": 1, "groups": 2},
        kind=CONV_TRANSPOSE1D,
    ),
    CONV_TRANSPOSE2D: Case(
        "conv_transpose2d",
        (1, 4, 2, 2),
        (4, 1, 2, 3),
        {"stride": (2, 1), "output_padding": (1, 0), "groups": 2},
        kind=CONV_TRANSPOSE2D,
    ),
}
SMALL = [
    Case("3x3", (1, 4, 3, 3), (4, 2, 3, 3), {"padding": 1, "groups": 2}),
    Case("stride 2", (2, 4, 4, 3), (2, 2, 3, 3), {"stride": 2, "padding": 1, "groups": 2}, bias=False),
    Case("dilation 2, kernel 2x3", (1, 3, 5, 6), (3, 1, 2, 3), {"dilation": 2, "groups": 3}),
    Case("same, 4x2", (1, 4, 4, 3), (2, 2, 4, 2), {"padding": "same", "groups": 2}),
    Case("stride 3, one image", (2, 8, 5), (2, 1, 2, 2), {"stride": 3, "groups": 2}),
    *(case for kind, case in SMALLEST.items() if kind is not CONV2D),
    Case(
        "conv3d, depth 1", (1, 2, 2, 2, 3), (2, 1, 1, 2, 2), {"padding": (0, 1, 0), "groups": 2}, kind=CONV3D
    ),
    Case("conv_transpose1d, rows beyond", (4, 2), (4, 1, 2), BEYOND, bias=True, kind=CONV_TRANSPOSE1D),
]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
    # vmap runs gconv's operators once for each element.
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]


def slow(case: Case, path: str, activation: str | None) -> bool:
    """Whether a check is too slow for what it can find: "aten" is PyTorch's own function."""
    if case.kind is not CONV2D and (path == "aten" or activation is not None):
        return True
    return path == "reference" and activation is not None


GRADCHECKS = [
    pytest.param(
        *(case, path, activation),
        id=f"{case.name}-{path}-{activation}",
        marks=[pytest.mark.long] * slow(case, path, activation),
    )
    for case in SMALL
    for path in PATHS
    for activation in (None, "relu")
]


@pytest.mark.parametrize(("case", "path", "activation"), GRADCHECKS)
def test_gradcheck_and_gradgradcheck(case: Case, path: str, activation: str | None) -> None:
    tensors = [t for t in case.tensors() if t is not None]

    def convolve(*tensors: Tensor) -> Tensor:
        return case.run(path, *tensors, activation=activation)

    assert torch.autograd.gradcheck(convolve, tensors, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(convolve, tensors, check_fwd_over_rev=path != "aten")


def complex_tensors(case: Case) -> list[Tensor]:
    return [torch.complex(t, t.flip(0)).detach().requires_grad_() for t in case.tensors()]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradcheck_of_complex_numbers(kind: Kind) -> None:
    tensors, convolve = complex_tensors(SMALLEST[kind]), partial(SMALLEST[kind].run, "reference")
    assert torch.autograd.gradcheck(convolve, tensors)
    assert torch.autograd.gradgradcheck(convolve, tensors, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_output_and_input_gradient_of_complex_numbers(kind: Kind, path: str) -> None:
    """An input gradient conjugates the weight, so a transposed convolution must undo that."""
    results = []
    for convolve in (partial(SMALLEST[kind].run, path), SMALLEST[kind].pytorch):
        x, w, b = complex_tensors(SMALLEST[kind])
        y = convolve(x, w.detach(), b.detach())
        results.append((y, torch.autograd.grad(y, x, y.detach().sin())[0]))
    torch.testing.assert_close(*results)


def loss_of(convolve: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a scalar function of input, weight and bias that is linear in none of them."""

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return convolve(x, w, b).sin().sum()

    return loss


@pytest.fixture(params=KINDS, ids=str)
def smallest(request: pytest.FixtureRequest) -> Case:
    return SMALLEST[request.param]


@pytest.fixture
def losses(smallest: Case, path: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return smallest.run(path, x, w, b, activation="relu")

    def theirs(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return smallest.pytorch(x, w, b).relu()

    return loss_of(ours), loss_of(theirs)


@pytest.fixture
def tensors(smallest: Case) -> tuple[Tensor, ...]:
    return tuple(t.detach() for t in smallest.tensors())


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
def test_forward_mode_in_forward_mode_is_refused(
    path: str, smallest: Case, tensors: tuple[Tensor, ...]
) -> None:
    """Because PyTorch loses the outer tangents of saved tensors, and the result would be wrong."""
    loss = loss_of(lambda *t: smallest.run(path, *t))
    with pytest.raises(RuntimeError, match="use jacfwd of jacrev"):
        torch.func.jacfwd(torch.func.jacfwd(loss, 0), 1)(*tensors)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_relu_gradient_is_pytorchs_at_zero_and_at_nan(path: str, kind: Kind) -> None:
    x = torch.tensor([-1.0, 0.0, 1.0, torch.nan], requires_grad=True)
    case = Case("", (1, *[1] * kind.dims, 4), (1, 1, *[1] * kind.dims), kind=kind)
    input, weight = x.view(case.input), torch.ones(case.weight)
    (ours,) = torch.autograd.grad(case.run(path, input, weight, activation="relu").sum(), x)
    (theirs,) = torch.autograd.grad(case.pytorch(input, weight).relu().sum(), x)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("held", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_autocast_casts_as_for_pytorchs(kind: Kind, path: str, dtype: torch.dtype, held: torch.dtype) -> None:
    sizes = (2, 4, *[4] * kind.dims), (4, 2, *[3] * kind.dims)
    case = Case("", *sizes, {"padding": 1, "groups": 2}, kind=kind)
    results = []
    for convolve in (lambda *t: case.run(path, *t), case.pytorch):
        tensors = case.tensors(held)
        with torch.autocast("cpu", dtype):
            output = convolve(*tensors)
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


@pytest.mark.parametrize("kind", [CONV2D, CONV_TRANSPOSE2D], ids=str)
def test_autocast_does_not_narrow_the_sums_of_the_reference(kind: Kind) -> None:
    """Autocast is off inside the operators: each pass gives the same bits with and without it."""
    case = Case("", (3, 16, 9, 9), (16, 8, 3, 3), {"padding": 1, "groups": 2}, kind=kind)
    results = []
    for enabled in (False, True):
        tensors = case.tensors(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = case.run("reference", *tensors)
            grads = torch.autograd.grad(output, tensors, output.detach().sin())
        results.append([output, *grads])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_autocast_casts_a_weight_once_for_many_calls() -> None:
    """PyTorch caches the cast weight, as it does for ``F.conv2d``."""
    x, w = torch.randn(1, 4, 5, 5), torch.randn(4, 2, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), torch.profiler.profile() as profile:
        for _ in range(4):
            run("aten", x.bfloat16(), w, groups=2)
    casts = [event.count for event in profile.key_averages() if event.key == "aten::_to_copy"]
    assert casts == [4 + 1], "one cast of each input, one of the weight"


IN_PLACE = [
    Case("", (2, 4, 5, 5), (4, 4, 3, 3), {"padding": 1}),
    Case("one pixel", (1, 4, 1, 1), (1, 4, 3, 3), {"padding": 1}),
    Case("one image", (4, 5, 5), (4, 4, 3, 3), {"padding": 1}),
    *(case for kind, case in SMALLEST.items() if kind is not CONV2D),
    *(case for case in OTHERS if "no batch" in case.name or "beyond" in case.name),
]


@pytest.mark.parametrize("case", IN_PLACE, ids=lambda case: f"{case.kind}{case.input}")
def test_outputs_and_gradients_may_be_changed_in_place(case: Case, path: str) -> None:
    """As ``nn.ReLU(inplace=True)`` after a convolution does."""
    for channels_last in (False, True):
        results = []
        for convolve in (lambda *t: case.run(path, *t), case.pytorch):
            x, w, b = case.tensors()
            if channels_last:  # for any number of dimensions
                x = x.detach().movedim(-case.kind.dims - 1, -1).contiguous().movedim(-1, -case.kind.dims - 1)
                x = x.requires_grad_()
            y = convolve(x, w, b)
            y.mul_(2).relu_()
            grads = torch.autograd.grad(y.square().sum(), (x, w))
            results.append([y, *(grad.mul_(2) for grad in grads)])
        torch.testing.assert_close(*results)
