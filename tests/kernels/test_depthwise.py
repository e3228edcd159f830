"""Large and 1-d depthwise kernels, interpreted: blocks of outputs and of taps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from edges import Processors
from families import check, check_epilogue, check_kernels, geometry_of, inside_nan, named
from marks import INTERPRETED_KERNELS
from oracle import Case, bounds, expected

from gconv import kernels
from gconv.activation import ACTIVATIONS
from gconv.kernels import depthwise_plans, launch, tiles
from gconv.kernels.correlation import Correlation
from gconv.kernels.depthwise_rules import tap_block, weight_tap_block
from gconv.kernels.device import Device
from gconv.kernels.forward import plan_pass
from gconv.kernels.tiles import Tile
from gconv.kernels.weight_grad import plan_weight_grad

pytestmark = INTERPRETED_KERNELS
HALF = torch.float16
GPU = Device("cuda", "NVIDIA Test-1", 132, 90)


def depthwise(
    size: tuple[int, int],
    kernel: tuple[int, int],
    channels: int = 6,
    images: int = 2,
    **settings: Any,
) -> Case:
    """Return a depthwise layer, padded by half the kernel size unless ``settings`` say otherwise."""
    settings = {"padding": (kernel[0] // 2, kernel[1] // 2), "groups": channels, **settings}
    return Case("", (images, channels, *size), (channels, 1, *kernel), settings)


@pytest.mark.parametrize(
    ("size", "kernel"),
    [
        ((5, 7), (9, 9)),
        ((9, 10), (8, 10)),
        ((3, 3), (13, 13)),
        ((17, 5), (10, 6)),
        ((1, 2), (31, 31)),
        ((3, 40), (1, 63)),
        ((20, 3), (63, 1)),
        ((1, 33), (1, 31)),
        ((1, 1), (1, 128)),
        ((1, 20), (1, 128)),
        ((1, 19), (1, 3)),
    ],
    ids=str,
)
def test_large_kernels_match_float64(size: tuple[int, int], kernel: tuple[int, int]) -> None:
    """Even and odd sizes, on images that are smaller than the kernel and not a multiple of a block."""
    check_kernels(depthwise(size, kernel, channels=3, images=1 if max(size) > 9 else 2), HALF)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", [(9, 9), (1, 31)], ids=str)
def test_large_kernels_in_other_types(kernel: tuple[int, int], dtype: torch.dtype) -> None:
    check_kernels(depthwise((1, 9) if kernel[0] == 1 else (5, 4), kernel, images=1), dtype)


@pytest.mark.parametrize(("images", "channels"), [(5, 20), (1, 64), (1, 70)])
@pytest.mark.parametrize(("size", "kernel"), [((3, 4), (9, 9)), ((1, 9), (1, 31)), ((1, 9), (1, 4))], ids=str)
def test_channels_that_fill_a_tile_and_do_not(
    size: tuple[int, int], kernel: tuple[int, int], images: int, channels: int
) -> None:
    check_kernels(depthwise(size, kernel, channels, images), HALF)


@pytest.mark.parametrize("padding", [0, (0, 5), (12, 1)], ids=str)
def test_large_kernels_with_any_padding(padding: int | tuple[int, int]) -> None:
    """Only rows of blocks outside the image are skipped."""
    check_kernels(depthwise((12, 12), (9, 10), 3, 1, padding=padding), HALF)


@pytest.mark.parametrize("block", [(4, 3), (1, 2)], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 7), (2, 4), (5, 1)])
def test_blocks_of_any_height_and_width(
    rows: int, columns: int, block: tuple[int, int], monkeypatch: pytest.MonkeyPatch, processors: Processors
) -> None:
    """Tuning may choose other blocks of outputs than the rules; the last block of taps overlaps another."""
    monkeypatch.setattr(depthwise_plans, "tap_block", lambda *_: block)
    processors(block[0] + 10)  # not in the cache of plans
    case = depthwise((6, 8), (6, 5), images=1)
    tensors, geometry = case.tensors(HALF), geometry_of(case)
    x, w, bias = (t.detach() for t in tensors)
    dy = torch.randn(geometry.output_size).to(HALF)
    tile = Tile("depthwise-blocks", 1, 8, 8, 8, warps=1, rows=rows, columns=columns)
    truth = expected(case, tensors, dy)
    limits = bounds(case, truth, HALF)
    y = kernels.forward(inside_nan(x), inside_nan(w), bias, geometry, tile=tile)
    dx = kernels.input_grad(inside_nan(dy), inside_nan(w), None, geometry, tile=tile)
    check({"output": (y, truth[0], limits[0]), "input gradient": (dx, truth[1], limits[1])})


@pytest.mark.parametrize("block", [(2, 3), (9, 2)], ids=str)
def test_weight_gradients_in_blocks_that_pass_the_kernels_end(
    block: tuple[int, int], monkeypatch: pytest.MonkeyPatch, processors: Processors
) -> None:
    """Taps past the end have no sums. The bias gradient, whose sums follow, gets those of one block only."""
    monkeypatch.setattr(depthwise_plans, "weight_tap_block", lambda *_: block)
    processors(block[0] + 20)  # not in the cache of plans
    check_kernels(depthwise((6, 5), (9, 7), images=1), HALF)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("name", ["depthwise, 9x8, beyond the registers", "depthwise, row of 4"])
def test_an_epilogue_in_both_passes(name: str, activation: str | None, residual: bool) -> None:
    for pass_ in ("forward", "input_grad"):
        check_epilogue(pass_, named(name), activation, residual)


@pytest.mark.parametrize(
    "settings", [{"stride": (1, 2)}, {"dilation": (1, 2)}, {"stride": (3, 1)}, {"padding": (0, 0)}], ids=str
)
@pytest.mark.parametrize("taps", [4, 9])
def test_one_row_with_strides_dilation_and_padding(taps: int, settings: dict[str, Any]) -> None:
    """With a step along it, the row isn't turned upright; a step across it has no effect."""
    check_kernels(depthwise((1, 21), (1, taps), **settings), HALF)


def test_one_row_inside_a_taller_image_or_padding_does_not_stand_upright() -> None:
    for size, padding in (((3, 9), (0, 1)), ((1, 9), (1, 1))):
        case = depthwise(size, (1, 4), padding=padding)
        assert not Correlation.forward(geometry_of(case)).lies_flat
        check_kernels(case, HALF)


@pytest.mark.parametrize("count", [1, 132])
def test_rows_upright_in_chunks(count: int, processors: Processors) -> None:
    """Each program has at least as many rows as it loads in addition."""
    device = processors(count)
    case = depthwise((1, 60), (1, 31), images=1)
    strides = (60 * 6, 1, 60 * 6, 6)
    operands = launch.OperandLayout(strides, strides, HALF, "ieee", device)
    rows = plan_weight_grad(geometry_of(case), operands)[0].arguments["rows"]
    assert rows == (30 if count == 1 else 15)
    check_kernels(case, HALF)
    check_kernels(depthwise((1, 60), (1, 4)), HALF)


def test_offsets_of_64_bits(monkeypatch: pytest.MonkeyPatch, processors: Processors) -> None:
    monkeypatch.setattr(tiles, "is_wide", lambda *_: True)
    processors(5)  # not in the cache of plans
    check_kernels(depthwise((5, 4), (9, 9)), HALF)
    check_kernels(depthwise((1, 9), (1, 4)), HALF)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # infinity times zero
@pytest.mark.parametrize("kernel", [(9, 9), (13, 4), (1, 31)], ids=str)
def test_infinity_reaches_only_the_outputs_that_meet_it(kernel: tuple[int, int]) -> None:
    """Taps that fill up a block belong to the previous block; they aren't pixels past the kernel."""
    case = depthwise((1, 40) if kernel[0] == 1 else (20, 20), kernel, channels=2, images=1)
    x, w, _ = (t.detach().abs() for t in case.tensors(HALF))
    x[0, 0, x.shape[2] // 2, 20 if kernel[0] == 1 else 10] = torch.inf
    y = kernels.forward(x, w, None, geometry_of(case))
    right = expected(case, (x, w, None), torch.ones(y.shape))[0]
    assert not right.isfinite().all()
    assert torch.equal(y.isfinite(), right.isfinite())


def test_blocks_of_taps_cover_the_kernel_and_fit_the_registers() -> None:
    tile = Tile("depthwise-blocks", 1, 4, 64, 64, warps=4, rows=8, columns=4)
    for r, s in ((9, 9), (13, 13), (31, 31), (1, 128), (51, 5)):
        for dtype, most in ((HALF, 26), (torch.float32, 12)):
            block = tap_block((r, s), tile, dtype)
            assert block[0] <= r and block[1] <= s and block[0] * block[1] <= most
        block = weight_tap_block((r, s), 56, torch.float16)
        assert block[0] * block[1] + block[0] <= 56
    for kernel in ((3, 3), (5, 5), (7, 7), (1, 31)):
        assert weight_tap_block(kernel, 56, torch.float16) == kernel


def test_large_kernels_of_stride_1_run_in_blocks() -> None:
    """13x13 in both passes, with few programs and with many."""
    for images in (1, 256):
        geometry = geometry_of(replace(depthwise((7, 7), (13, 13), 64, 1), input=(images, 64, 7, 7)))
        for pass_ in ("forward", "input_grad"):
            tile = kernels.choice.tile_of(pass_, geometry, HALF, "ieee", GPU)
            strides = (49 * 64, 1, 7 * 64, 64)
            operands = launch.OperandLayout(strides, strides, HALF, "ieee", GPU)
            plan = plan_pass(pass_, geometry, operands, tile=tile)
            assert plan.kernel.__name__ == "depthwise_blocks_kernel"
            assert (tile.rows, tile.columns, tile.pixels) == (7, 4, 2 if images == 1 else 4)
