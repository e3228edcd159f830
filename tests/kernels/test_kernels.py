"""The kernels in Triton's interpreter: every family, in every type, against float64.

The memory that they allocate starts as NaN, so that an element that is never written is noticed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from families import DTYPES, FAMILIES, SAME, check_kernels, geometry_of, kernel_results
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import INTERPRETED_KERNELS
from oracle import Case
from torch import Tensor

from gconv import kernels
from gconv.geometry import ConvGeometry
from gconv.kernels import choice, launch, rules, tiles
from gconv.kernels.device import Device, precision_of
from gconv.kernels.weight_grad import plan_weight_grad
from gconv.measure.problem import cudnn_precision

pytestmark = [
    *INTERPRETED_KERNELS,
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
]

ONE_OF_EACH = (
    "slide, width 4",
    "strips, width 40",
    "stride 2, odd",
    "taps, 5x5, stride 3",
    "taps, width 72 to 40",
    "depthwise",
    "depthwise, dilated",
    "depthwise, 13x13",
    "depthwise, row of 4",
)


@pytest.fixture(
    params=[
        pytest.param(case, id=case.name, marks=[pytest.mark.long] * (case.name == "taps, 5x5, stride 3"))
        for case in FAMILIES
        if case.name in ONE_OF_EACH
    ]
)
def one_of_each(request: pytest.FixtureRequest) -> Case:
    """Return a case for each kernel."""
    return request.param


def is_long(case: Case, dtype: torch.dtype) -> bool:
    """Return whether the case runs only with `make long`: the widest take ten seconds in the interpreter."""
    widest = case.name in ("taps, width 56", "taps, width 264")
    return widest or (dtype != torch.float16 and case.name not in ("slide, width 4", "stride 2, odd"))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case.name}-{dtype}", marks=[pytest.mark.long] * is_long(case, dtype))
        for case in FAMILIES
        for dtype in DTYPES
    ],
)
def test_every_family_matches_float64(case: Case, dtype: torch.dtype) -> None:
    check_kernels(case, dtype)


@pytest.mark.parametrize(
    ("kernel", "packs"),
    [
        ("strips", 1),
        ("strips", 2),
        ("pairs", 1),
        ("pairs", 2),
        ("slide", 1),
        ("taps", 1),
        ("depthwise-slide", 1),
        ("depthwise-blocks", 1),
        ("depthwise", 1),
    ],
)
def test_the_families_cover_every_kernel(kernel: str, packs: int) -> None:
    """Except the residue kernel, which needs TF32 or an explicit tile: test_tiles.py covers it."""
    used = set()
    for case, pass_ in itertools.product(FAMILIES, ("forward", "input_grad", "weight_grad")):
        tile = kernels.tile_of(pass_, geometry_of(case), torch.float16, torch.device("cpu"))
        used.add((tile.kernel, tile.packs))
    assert (kernel, packs) in used


@pytest.mark.parametrize("setting", ["tf32", "ieee"])
def test_only_float32_is_multiplied_as_cudnn_is_set(setting: str) -> None:
    with cudnn_precision(setting):
        assert precision_of(torch.float32) == setting
        assert precision_of(torch.bfloat16) == precision_of(torch.float16) == "ieee"


@pytest.mark.parametrize(
    "name", ["slide, width 4", "slide, width 3 to 5", "stride 2, odd", "stride 2, padding 3"]
)
def test_tf32_matches_float64(name: str) -> None:
    """Run the kernels for TF32, in the interpreter, which multiplies in full precision."""
    with cudnn_precision("tf32"):
        check_kernels(next(case for case in FAMILIES if case.name == name), torch.float32)


@pytest.mark.parametrize(
    "name", ["slide, width 4", "stride 2, odd", "taps, 1x1", "depthwise", "depthwise, stride 2"]
)
def test_relu_in_the_epilogue(name: str) -> None:
    check_kernels(next(case for case in FAMILIES if case.name == name), torch.float16, relu=True)


def test_relu_keeps_nan_and_gives_no_negative_number() -> None:
    x = torch.tensor([torch.nan, -1.0, 1.0, -torch.inf, torch.inf]).view(1, 1, 1, 5).expand(1, 16, 1, 5)
    case = Case("", (1, 16, 1, 5), (16, 1, 1, 1), {"groups": 16})
    y = kernels.forward(x.contiguous(), torch.ones(16, 1, 1, 1), None, geometry_of(case), "relu")
    torch.testing.assert_close(y, x.relu(), equal_nan=True)


@st.composite
def geometries(draw: st.DrawFn, kernel: str) -> Case:
    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    slides = kernel == "3x3"
    widths = st.just(1) if kernel == "depthwise" else st.sampled_from([1, 2, 3, 4, 5, 7, 8, 13, 16, 24, 33])
    inputs, outputs = draw(widths), draw(widths)
    groups = draw(st.integers(1, max(1, 24 // max(inputs, outputs))))
    taps = (3, 3) if slides else pair(1, 5)
    dilation = (1, draw(st.integers(1, 2))) if slides else pair(1, 3)
    stride = draw(st.sampled_from([(1, 1), (2, 2), (1, 2), (2, 1)])) if slides else pair(1, 3)
    padding = pair(0, 3)
    reach = [d * (k - 1) + 1 - 2 * z for d, k, z in zip(dilation, taps, padding, strict=True)]
    size = [draw(st.integers(max(1, r), max(1, r) + 5)) for r in reach]
    return Case(
        "drawn",
        (draw(st.integers(1, 3)), groups * inputs, *size),
        (groups * outputs, inputs, *taps),
        {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups},
        bias=draw(st.booleans()),
    )


@pytest.mark.parametrize("examples", [6, pytest.param(200, marks=pytest.mark.long)])
@pytest.mark.parametrize("kernel", ["3x3", "any", "depthwise"])
def test_any_geometry_matches_float64(kernel: str, examples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw cases of each kind, for few and for many processors: all rows in one program, or in chunks."""

    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(
        geometries(kernel),
        st.sampled_from(DTYPES),
        st.sampled_from([1, 132]),
        st.sampled_from(["tf32", "ieee"]),
    )
    def run(case: Case, dtype: torch.dtype, processors: int, precision: str) -> None:
        monkeypatch.setattr(launch, "device_of", lambda _: Device("cpu", "interpreter", processors))
        with cudnn_precision(precision):
            check_kernels(case, dtype)

    run()


def test_rows_in_chunks_match_float64(one_of_each: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "device_of", lambda _: Device("cpu", "interpreter", 132))
    check_kernels(one_of_each, torch.float16)


def test_loads_of_eight_bytes_match_float64(one_of_each: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules load sixteen bytes; a measured table may have eight."""
    by_rule = rules.tile_by_rule
    monkeypatch.setattr(choice, "tile_by_rule", lambda *arguments: replace(by_rule(*arguments), load=8))
    monkeypatch.setattr(launch, "device_of", lambda _: Device("cpu", "other loads", 132))
    check_kernels(one_of_each, torch.float16)


def test_offsets_of_64_bits_match_float64(one_of_each: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "is_wide", lambda *_: True)
    monkeypatch.setattr(launch, "device_of", lambda _: Device("cpu", "wide", 2))  # not in the cache of plans
    check_kernels(one_of_each, torch.float32)


def test_offsets_are_64_bits_where_a_tile_may_pass_31() -> None:
    tile = tiles.Tile("slide", 4, 64, 16, 16, warps=2)
    assert not tiles.is_wide(tile, 56, (56 * 56 * 128,), (56 * 56 * 128,))
    assert tiles.is_wide(tile, 8, (2**31 // 16,), (8,))
    assert tiles.is_wide(tile, 8, (1,), (2**31,))
    strips = tiles.Tile("strips", 4, 16, 16, 16, warps=1)
    assert not tiles.is_wide(strips, 512, (2**27 - 1,), (1,))
    assert tiles.is_wide(strips, 512, (2**27,), (1,))  # a tile may span sixteen images


def test_two_runs_are_bit_equal(one_of_each: Case) -> None:
    torch.manual_seed(1)
    first = kernel_results(one_of_each, torch.float16)
    torch.manual_seed(1)
    for name, (result, _, _) in kernel_results(one_of_each, torch.float16).items():
        assert torch.equal(result, first[name][0]), name


@pytest.mark.parametrize("make", [lambda t: t[:0], lambda t: t], ids=["no images", "one image"])
def test_batches_of_no_image_and_of_one(make: Callable[[Tensor], Tensor]) -> None:
    x, w = make(torch.randn(1, 8, 5, 5)), torch.randn(8, 4, 3, 3)
    geometry = geometry_of(Case("", tuple(x.shape), (8, 4, 3, 3), {**SAME, "groups": 2}))
    y = F.conv2d(x, w, None, 1, 1, 1, 2)
    torch.testing.assert_close(kernels.forward(x, w, None, geometry, None), y)
    dx, dw, db = torch.ops.aten.convolution_backward(
        y, x, w, [8], [1, 1], [1, 1], [1, 1], False, [0, 0], 2, [True] * 3
    )
    torch.testing.assert_close(kernels.input_grad(y, w, None, geometry), dx)
    torch.testing.assert_close(kernels.weight_grad(y, x, geometry, True), (dw, db))


def test_channels_last_tensors_are_not_copied() -> None:
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    for view in (x, x[:, 2:6], x[1:], x[:, :, 1:4, ::2]):
        assert launch.channels_last(view) is view
    assert launch.channels_last(x.contiguous()).stride(1) == 1


def test_partial_sums_stay_within_the_workspace() -> None:
    h200 = Device("cuda", "NVIDIA H200", 132)
    for channels, groups, size in ((128, 32, 56), (1024, 32, 7), (2048, 64, 7), (512, 512, 14)):
        sizes = (256, channels, size, size), (channels, channels // groups, 3, 3)
        geometry = ConvGeometry.of(*sizes, (1, 1), (1, 1, 1, 1), (1, 1), groups)
        strides = (size * size * channels, 1, size * channels, channels)
        operands = launch.OperandLayout(strides, strides, torch.bfloat16, "ieee", h200)
        plan, splits, numbers = plan_weight_grad(geometry, operands)
        assert 4 * splits * numbers <= tiles.WORKSPACE
        assert 0.8 * 132 * plan.tile.resident <= plan.programs <= 132 * plan.tile.resident
