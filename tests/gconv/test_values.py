"""Outputs and gradients of all convolutions against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import interpreted
from oracle import CASES, FUNCTIONS, OTHERS, PATHS, Case, check, expected, fenced, run

import gconv
from gconv.kinds import KINDS

# From F.conv2d, for an even kernel with padding="same".
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

SIXTEEN_BITS = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_output_and_gradients_match_float64(case: Case, path: str, dtype: torch.dtype) -> None:
    check(case, path, dtype)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_reference_in_sixteen_bits_matches_float64(case: Case, dtype: torch.dtype) -> None:
    check(case, "reference", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS], ids=str)
def test_aten_is_pytorchs_function_to_the_bit(case: Case, dtype: torch.dtype) -> None:
    """Even in 16 bits, where PyTorch doesn't compute all sums in float32 on the CPU."""
    results = []
    for convolve in (lambda *t: case.run("aten", *t), case.pytorch):
        tensors = case.tensors(dtype)
        output = convolve(*tensors)
        grads = torch.autograd.grad(output, [t for t in tensors if t is not None], torch.ones_like(output))
        results.append([output, *grads])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


@interpreted
@pytest.mark.usefixtures("full_float32")
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS], ids=str)
@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_kernels_match_float64_for_every_kind(case: Case, dtype: torch.dtype) -> None:
    """Tests of the kernels themselves are in tests/kernels; this tests the path to them and back."""
    check(case, "triton", dtype)


@interpreted
@pytest.mark.usefixtures("full_float32", "nothing_is_zero_by_chance")
@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_kernels_read_nothing_outside_of_any_operand(case: Case) -> None:
    """NaN surrounds the operands and fills new memory."""
    tensors = [None if t is None else fenced(t.detach()) for t in case.tensors(torch.float32)]
    check(
        case, "triton", torch.float32, tensors=tuple(t if t is None else t.requires_grad_() for t in tensors)
    )


def test_relu_output_and_gradients_match_float64(case: Case, path: str) -> None:
    check(case, path, torch.float64, activation="relu")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(KINDS))

    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(kind.dims))

    groups, largest = draw(st.integers(1, 5)), 3 if kind.dims == 3 else 4
    kernel, dilation, stride = sizes(1, largest), sizes(1, 3), sizes(1, 3)
    channels = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    settings = {"dilation": dilation, "groups": groups}
    if kind.transposed:
        size = sizes(1, 6)
        settings["padding"] = tuple(draw(st.integers(0, (r - 1) // 2)) for r in reach)
        steps = zip(stride, dilation, strict=True)
        settings["output_padding"] = tuple(draw(st.integers(0, max(pair) - 1)) for pair in steps)
        weight = (groups * channels[0], channels[1], *kernel)
    else:
        padding: str | tuple[int, ...] = draw(st.sampled_from(["valid", "same", "numbers"]))
        padding = sizes(0, 3) if padding == "numbers" else padding
        zeros = padding if isinstance(padding, tuple) else (0,) * kind.dims
        least = [1 if padding == "same" else max(1, r - 2 * z) for r, z in zip(reach, zeros, strict=True)]
        stride = (1,) * kind.dims if padding == "same" else stride
        size = tuple(draw(st.integers(low, low + 6)) for low in least)
        settings["padding"] = padding
        weight = (groups * channels[1], channels[0], *kernel)
    batch = [draw(st.integers(0, 3))] if draw(st.booleans()) else []
    return Case(
        "drawn",
        (*batch, groups * channels[0], *size),
        weight,
        settings | {"stride": stride},
        bias=draw(st.booleans()),
        kind=kind,
    )


@settings(max_examples=400, deadline=None, derandomize=True)
@given(case=cases(), path=st.sampled_from(PATHS), activation=st.sampled_from([None, "relu"]))
def test_any_geometry_matches_float64(case: Case, path: str, activation: str | None) -> None:
    check(case, path, torch.float64, activation)


@interpreted
@pytest.mark.long
@pytest.mark.usefixtures("full_float32")
@settings(max_examples=80, deadline=None, derandomize=True)
@given(case=cases(), activation=st.sampled_from([None, "relu"]))
def test_kernels_match_float64_in_any_geometry(case: Case, activation: str | None) -> None:
    check(case, "triton", torch.float32, activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["conv3d, 3x3x3", "conv_transpose2d, rows beyond every input"])
def test_a_wider_residual_widens_the_result(name: str, dtype: torch.dtype) -> None:
    """Also if gradients are summed in float32, as in the reference here."""
    case = next(case for case in OTHERS if case.name == name)
    tensors = case.tensors(dtype)
    residual = torch.randn(case.pytorch(*tensors).shape)
    function, options = FUNCTIONS[case.kind], {"residual": residual, "activation": "relu"}
    results = [function(*tensors, **case.settings, **options, backend=b) for b in ("aten", "reference")]
    assert results[0].dtype == results[1].dtype == torch.float32
    torch.testing.assert_close(*results, atol=0.1, rtol=0.1)


def test_two_runs_are_bit_equal(path: str) -> None:
    case = Case("", (4, 16, 14, 14), (16, 4, 3, 3), {"padding": 1, "groups": 4})
    first, second = (
        [y, *torch.autograd.grad(y.sum(), tensors)]
        for tensors in (case.tensors(torch.float32) for _ in range(2))
        for y in (run(path, *tensors, **case.settings),)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_arguments_may_be_positional_in_conv2d_order(path: str) -> None:
    x, w, b = torch.randn(2, 4, 9, 9), torch.randn(4, 2, 3, 3), torch.randn(4)
    arguments = (x, w, b, [2], (1, 2), 2, 2)
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    torch.testing.assert_close(run(path, **dict(zip(names, arguments, strict=True))), F.conv2d(*arguments))


def test_no_gradient_is_recorded_where_none_is_wanted(path: str) -> None:
    x, w = torch.randn(2, 4, 5, 5), torch.randn(4, 2, 3, 3, requires_grad=True)
    with torch.no_grad():
        assert not run(path, x, w, groups=2).requires_grad
    assert not run(path, x, w.detach(), groups=2).requires_grad
    with torch.inference_mode():
        assert run(path, x, w, groups=2).is_inference()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_gradients_of_some_arguments_only(path: str, wanted: tuple[int, ...]) -> None:
    case = Case("", (2, 4, 5, 5), (4, 2, 3, 3), {"padding": 1, "groups": 2})
    tensors = [t.requires_grad_(i in wanted) for i, t in enumerate(case.tensors())]
    output = run(path, *tensors, **case.settings)
    grad = torch.randn_like(output)
    truth = expected(case, tuple(tensors), grad)[1:]
    grads = torch.autograd.grad(output, [tensors[i] for i in wanted], grad)
    for i, result in zip(wanted, grads, strict=True):
        torch.testing.assert_close(result, truth[i])


RESIDUALS = {
    "of its shape": (2, 8, 7, 6),
    "broadcast": (1, 8, 1, 6),
    "a number": (),
    "wider than it": (3, 2, 8, 7, 6),
    "float64": (2, 8, 7, 6),
}


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("name", RESIDUALS)
def test_residual_is_added_as_plus_would(name: str, backend: str, gradients: bool) -> None:
    x, weight, bias = CASES[0].tensors(torch.float32)
    residual = torch.randn(RESIDUALS[name], dtype=torch.float64 if name == "float64" else torch.float32)
    before = residual.clone()
    with torch.set_grad_enabled(gradients):
        options = {"residual": residual, "activation": "silu", "backend": backend}
        y = gconv.group_conv2d(x, weight, bias, **CASES[0].settings, **options)
        right = F.silu(F.conv2d(x, weight, bias, **CASES[0].settings) + residual)
    torch.testing.assert_close(y, right, rtol=1e-4, atol=1e-4)
    assert y.requires_grad == gradients and torch.equal(residual, before)
    if gradients:
        grads = [torch.autograd.grad(of.square().sum(), (x, weight)) for of in (y, right)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_residual_of_one_image(backend: str) -> None:
    x, weight = torch.randn(6, 7, 6), torch.randn(6, 2, 3, 3)
    for size in ((6, 7, 6), (1, 6, 7, 6)):
        residual = torch.randn(size)
        y = gconv.group_conv2d(x, weight, padding=1, groups=3, residual=residual, backend=backend)
        torch.testing.assert_close(y, F.conv2d(x, weight, padding=1, groups=3) + residual)
