"""Batch norm, activations and residuals inside the kernels, in Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from families import DTYPES, FAMILIES, check, check_epilogue, geometry_of, inside_nan, named
from marks import INTERPRETED_KERNELS
from norms import check_norm_kernels, norm_results
from oracle import Case

from gconv import batch_norm, kernels
from gconv.activation import ACTIVATIONS
from gconv.geometry import ConvGeometry
from gconv.kernels import batch_norm as norm_kernels
from gconv.kernels import launch
from gconv.kernels.device import Device
from gconv.measure.problem import cudnn_precision

pytestmark = [
    *INTERPRETED_KERNELS,
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
]
SLIDES = [case for case in FAMILIES if case.name.startswith(("slide", "stride 2"))]


ONE_OF_EACH = list(map(named, ("slide, width 4", "stride 2, odd", "taps, width 72 to 40", "depthwise")))
PAIRS = list(map(named, ("stride 2, two packs, odd", "stride 2, width 24 to 8")))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[pytest.mark.long] * (case not in SLIDES + ONE_OF_EACH))
        for case in FAMILIES
    ],
)
def test_batch_norm_before_and_after_matches_float64(case: Case) -> None:
    check(norm_results(case, torch.float32))


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.long)], ids=str
)
@pytest.mark.parametrize("case", ONE_OF_EACH[:3] + PAIRS, ids=lambda case: case.name)
def test_batch_norm_in_sixteen_bits(case: Case, dtype: torch.dtype) -> None:
    check(norm_results(case, dtype))


@pytest.mark.parametrize("case", ONE_OF_EACH[:2], ids=lambda case: case.name)
def test_batch_norm_in_tf32(case: Case) -> None:
    """Run the kernels for TF32, in the interpreter, which multiplies in full precision."""
    with cudnn_precision("tf32"):
        check(norm_results(case, torch.float32))


@pytest.mark.parametrize("case", ONE_OF_EACH[:3] + PAIRS, ids=lambda case: case.name)
def test_batch_norm_with_rows_in_chunks(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "device_of", lambda _: Device("cpu", "interpreter", 132))
    check(norm_results(case, torch.float16))


@pytest.mark.parametrize(
    ("size", "padding"),
    [((5, 6), 0), ((6, 5), 2), ((5, 8), (0, 3)), ((4, 5), (3, 0)), ((13, 2), 1), ((1, 9), 4)],
    ids=str,
)
def test_batch_norm_of_pairs_with_any_padding(size: tuple[int, int], padding: int | tuple[int, int]) -> None:
    """Rows and columns outside the image add nothing to the sums."""
    settings = {"stride": 2, "padding": padding, "groups": 8}
    check(norm_results(Case("", (3, 32, *size), (32, 4, 3, 3), settings), torch.float16))


def test_two_runs_are_bit_equal() -> None:
    torch.manual_seed(1)
    first = norm_results(ONE_OF_EACH[0], torch.float16)
    torch.manual_seed(1)
    for name, (result, *_) in norm_results(ONE_OF_EACH[0], torch.float16).items():
        assert torch.equal(result, first[name][0]), name


@pytest.mark.parametrize("name", ["slide, width 4", "stride 2, odd", "taps, width 56"])
def test_moments_are_stable_for_large_means(name: str) -> None:
    """The mean is 10,000 standard deviations from zero: a sum of squares in float32 would lose the variance.

    What remains is the rounding of numbers of that size, a thousandth of their standard deviation.
    """
    case = named(name)
    geometry = geometry_of(case)
    x, w, _ = (None if t is None else t.detach() for t in case.tensors(torch.float32))
    norm = torch.tensor([1.0, 0.0, 0.0]).view(3, 1).expand(3, x.shape[1]).contiguous()
    scale = x.abs().sum() / x.numel()
    bias = torch.full((w.shape[0],), 1e4) * scale
    y, moments = kernels.norm_forward(x, norm, w, bias, geometry)
    variance, mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(moments[0].double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(moments[1].double(), variance, rtol=2e-3, atol=0)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # this is what the test is about
def test_rows_above_the_first_do_not_count() -> None:
    """Their values overflow float16. They are never stored, and must not reach the moments either."""
    x = torch.zeros(1, 16, 4, 4, dtype=torch.float16)
    x[:, :, 0] = 2
    w = torch.zeros(16, 4, 3, 3, dtype=torch.float16)
    w[:, :, 2, 1], w[:, :, 1, 1] = 6e4, 1
    case = Case("", (1, 16, 4, 4), (16, 4, 3, 3), {"padding": (0, 1), "groups": 4})
    norm = torch.tensor([1.0, 0.0, 0.0]).view(3, 1).expand(3, 16).contiguous()
    y, moments = kernels.norm_forward(x, norm, w, None, geometry_of(case))
    assert y.isfinite().all() and moments.isfinite().all()


@pytest.mark.parametrize("splits", [0, norm_kernels.WAVES], ids=["one part", "many parts"])
@pytest.mark.parametrize("shape", [(3, 20, 5, 7), (2, 16, 3, 3), (1, 70, 9, 9), (40, 3, 6, 6)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_by_themselves_match_their_equations(
    shape: tuple[int, ...], dtype: torch.dtype, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm_kernels, "WAVES", splits)
    monkeypatch.setattr(norm_kernels, "device_of", lambda _: Device("cpu", f"{splits} waves", 2))
    x, grad = (inside_nan((torch.randn(shape) * 2 + 3).to(dtype)) for _ in range(2))
    norm = torch.stack([torch.randn(shape[1]), torch.randn(shape[1]), torch.full(shape[1:2], 3.0)])
    slope = torch.randn(2, shape[1])
    check_norm_kernels(x, grad, norm, slope, tolerance=1e-5)
    sums = batch_norm.grad_sums(grad, x, norm)
    torch.testing.assert_close(norm_kernels.grad_sums(grad, x, norm), sums, rtol=1e-4, atol=1e-3)


def test_moments_of_a_tensor_with_a_large_mean() -> None:
    x = torch.randn(4, 16, 9, 9) + 1e4
    exact = batch_norm.moments(x.double())
    torch.testing.assert_close(norm_kernels.moments(x).double(), exact, rtol=2e-3, atol=0)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize(
    "name", ["slide, width 4", "stride 2, odd", "taps, width 72 to 40", "depthwise", "depthwise, stride 2"]
)
def test_residual_and_activation(name: str, activation: str | None) -> None:
    check_epilogue("forward", named(name), activation, residual=True)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("strips, two packs", "relu"),
        ("stride 2, two packs, odd", "silu"),
        ("stride 2, width 24 to 8", "relu6"),
        ("taps, 5x5, stride 3", None),
        ("depthwise", "hardswish"),
        ("depthwise, stride 2", "silu"),
    ],
)
def test_an_input_gradient_has_the_epilogue_of_a_transposed_convolution(
    name: str, activation: str | None, residual: bool
) -> None:
    check_epilogue("input_grad", named(name), activation, residual)


@pytest.mark.parametrize("name", ["slide, width 4", "stride 2, odd"])
def test_an_input_gradient_in_tf32_has_an_epilogue(name: str) -> None:
    """Run the kernels for TF32, in the interpreter, which multiplies in full precision."""
    with cudnn_precision("tf32"):
        check_epilogue("input_grad", named(name), "silu", residual=True, dtype=torch.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_keep_nan_and_infinity(activation: str) -> None:
    x = torch.tensor([torch.nan, -1.0, 1.0, torch.inf]).view(1, 1, 1, 4).expand(1, 16, 1, 4).contiguous()
    case = Case("", (1, 16, 1, 4), (16, 1, 1, 1), {"groups": 16})
    y = kernels.forward(x, torch.ones(16, 1, 1, 1), None, geometry_of(case), activation)
    torch.testing.assert_close(y, ACTIVATIONS[activation](x), equal_nan=True)


def test_no_images_leave_statistics_of_zero() -> None:
    """There are no parts to merge, so nothing is read that no program wrote."""
    x, weight, norm = torch.empty(0, 8, 4, 4), torch.ones(8, 4, 3, 3), torch.ones(3, 8)
    geometry = ConvGeometry.of(x.shape, weight.shape, (1, 1), (1, 1, 1, 1), (1, 1), 2)
    y, moments = kernels.norm_forward(x, norm, weight, None, geometry)
    grad, sums = kernels.norm_input_grad(y, weight, x, norm, geometry)
    assert y.shape == grad.shape == (0, 8, 4, 4)
    assert moments.dtype == sums.dtype == torch.float32
    assert torch.equal(moments, torch.zeros(2, 8)) and torch.equal(sums, torch.zeros(2, 8))
