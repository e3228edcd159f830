"""The weight gradient's rows and blocks, interpreted, at the edges of tiles.

The tests set the tiles, so that all of them run, independent of the rules.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from edges import HALF, OPERANDS, Processors, check_weight_grad, layer, rows_of, seven_rows
from families import check, geometry_of, inside_nan
from marks import INTERPRETED_KERNELS
from norms import norm_results
from oracle import Case
from torch import Tensor
from triton.runtime import interpreter

from gconv import kernels
from gconv.kernels.tiles import Tile, side_of_blocks
from gconv.kernels.weight_grad import plan_reduce, plan_weight_grad

pytestmark = INTERPRETED_KERNELS


@pytest.mark.parametrize(("channels", "groups"), [((40, 24), 1), ((20, 40), 1), ((40, 40), 2)])
@pytest.mark.parametrize(("count", "splits"), [(1, 1), (500, 3)])
def test_bias_gradient_of_groups_wider_than_a_block(
    count: int, splits: int, channels: tuple[int, int], groups: int, processors: Processors
) -> None:
    """One program sums dy of a split and block of outputs; programs of other inputs and taps skip it."""
    inputs, outputs = channels
    case = Case("", (3, inputs, 4, 4), (outputs, inputs // groups, 1, 2), {"groups": groups})
    tile = Tile("taps", 1, 16, 16, 16, warps=4, resident=1)
    operands = OPERANDS._replace(device=processors(count))
    assert plan_weight_grad(geometry_of(case), operands, tile=tile)[1] == splits
    check_weight_grad(case, tile)


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("count", "rows"), [(1, 14), (3, 5), (132, 4)])
def test_weight_gradient_of_rows_that_span_two_tiles(
    count: int, rows: int, stride: int, padding: int, processors: Processors
) -> None:
    case = seven_rows(3, stride, padding)
    tile = Tile("slide", 4, 16, 16, 16, warps=1, resident=1)
    operands = OPERANDS._replace(device=processors(count))
    plan, splits, _ = plan_weight_grad(geometry_of(case), operands, tile=tile)
    assert (plan.arguments["rows"], splits) == (rows, -(-14 // rows))
    check_weight_grad(case, tile)


@pytest.mark.parametrize(
    ("stride", "padding", "turns"), [(1, 0, 9), (1, 1, 8), (1, 3, 8), (2, 0, 8), (2, 1, 8), (2, 3, 7)]
)
@pytest.mark.parametrize("count", [1, 3, 132])
def test_weight_gradient_of_two_groups_of_images(
    count: int, stride: int, padding: int, turns: int, processors: Processors
) -> None:
    case, rows = seven_rows(9, stride, padding), rows_of(turns, count)
    tile = Tile("strips", 4, 16, 16, 16, warps=1, resident=1, columns=2)
    operands = OPERANDS._replace(device=processors(count))
    plan, splits, _ = plan_weight_grad(geometry_of(case), operands, tile=tile)
    found = plan.arguments
    assert (found["turns"], found["rows"], splits) == (turns, rows, -(-2 * turns // rows))
    check_weight_grad(case, tile)


BLOCKS = [
    pytest.param(4, 4, 16, Tile("strips", 4, 16, 16, 16, warps=4, packs=4), id="four packs on four warps"),
    pytest.param(8, 8, 16, Tile("strips", 2, 16, 16, 16, warps=4, packs=8), id="two packs on each warp"),
    pytest.param(16, 16, 2, Tile("strips", 1, 16, 16, 16, warps=1, packs=2), id="two packs on one warp"),
    pytest.param(32, 32, 1, Tile("strips", 1, 16, 32, 32, warps=4), id="four blocks"),
    pytest.param(32, 32, 2, Tile("strips", 1, 16, 32, 32, warps=8, packs=2), id="four blocks of two packs"),
    pytest.param(24, 20, 1, Tile("strips", 1, 16, 32, 32, warps=4), id="four blocks, masked"),
    pytest.param(16, 32, 2, Tile("strips", 1, 16, 16, 32, warps=4, packs=2), id="two blocks of outputs"),
    pytest.param(32, 16, 2, Tile("strips", 1, 16, 32, 16, warps=4, packs=2), id="two blocks of inputs"),
    pytest.param(56, 40, 1, Tile("strips", 1, 16, 32, 32, warps=4), id="overlapping tiles of four blocks"),
    pytest.param(32, 32, 2, Tile("strips", 1, 16, 32, 32, warps=2), id="one product on two warps"),
]


@pytest.mark.parametrize(("inputs", "outputs", "groups", "tile"), BLOCKS)
@pytest.mark.parametrize(("columns", "width"), [(1, 5), (2, 5), (4, 1), (4, 9)])
def test_weight_gradient_in_blocks(
    columns: int, width: int, inputs: int, outputs: int, groups: int, tile: Tile
) -> None:
    """Each block of sums meets its own outputs and inputs, and the bias is summed once."""
    for stride in (1, 2):
        case = layer((4, stride * width), inputs, outputs, groups, stride=stride)
        assert geometry_of(case).output_size[3] == width
        check_weight_grad(case, replace(tile, columns=columns))


@pytest.mark.parametrize(("inputs", "outputs", "groups", "tile"), BLOCKS[:-1])
def test_batch_norm_before_a_weight_gradient_in_blocks(
    inputs: int, outputs: int, groups: int, tile: Tile
) -> None:
    for stride in (1, 2):
        case = layer((4, 5), inputs, outputs, groups, stride=stride)
        check(norm_results(case, HALF, tiles={"weight_grad": replace(tile, columns=2)}))


@pytest.fixture
def products_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter drop the bits of operands that TF32 doesn't have, as tensor cores do."""
    multiply = interpreter.InterpreterBuilder.create_dot

    def cut(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
        bits = handle.data.astype(np.float32).view(np.int32) & -(2**13)
        return interpreter.TensorHandle(bits.view(np.float32), handle.dtype)

    def rounded(builder: Any, a: Any, b: Any, *others: Any) -> Any:
        return multiply(builder, cut(a), cut(b), *others)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", rounded)


@pytest.mark.parametrize("packs", [1, 2])
@pytest.mark.usefixtures("products_in_tf32")
def test_only_products_round_to_tf32(packs: int) -> None:
    """Batch norm sees x, and the bias gradient dy, in full precision: here x is 1,000 times its deviation."""
    case = layer((5, 6), groups=8)
    geometry, (x, *_) = geometry_of(case), case.tensors(torch.float32)
    x, dy = x.detach() + 1000, torch.randn(geometry.output_size)
    norm = torch.tensor([1.0, -1000.0, 0.0]).view(3, 1).expand(3, x.shape[1])
    tile = Tile("strips", 4, 16, 16, 16, warps=packs, packs=packs, columns=2)
    dw, db = kernels.norm_weight_grad(inside_nan(dy), inside_nan(x), norm, geometry, True, tile)
    inside, grad = (x - 1000).relu().double(), dy.double()

    def weight_grad(a: Tensor, b: Tensor) -> Tensor:
        return torch.nn.grad.conv2d_weight(a, case.weight, b, padding=1, groups=8)

    limit = 2**-9 * weight_grad(inside, grad.abs())
    assert ((dw - weight_grad(inside, grad)).abs() <= limit).all()
    torch.testing.assert_close(db.double(), grad.sum((0, 2, 3)), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "packs", "warps", "side"),
    [
        ((16, 16), 4, 4, 16),
        ((16, 16), 8, 4, 16),
        ((32, 32), 1, 4, 16),
        ((32, 32), 1, 2, 32),
        ((16, 32), 1, 1, 32),
    ],
)
def test_a_tile_is_one_product_if_its_blocks_have_no_warps(
    shape: tuple[int, int], packs: int, warps: int, side: int
) -> None:
    assert side_of_blocks(Tile("strips", 1, 16, *shape, warps=warps, packs=packs)) == side


@pytest.mark.parametrize("splits", [1, 3, 16, 130, 300])
@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(1, 3, 1), (4, 8, 2)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_partial_sums_are_added_up(
    with_bias: bool, inputs: int, outputs: int, groups: int, splits: int
) -> None:
    """Any number of splits, and numbers of sums that are no multiple of a wide load."""
    case = layer((9, 9), inputs, outputs, groups)
    geometry, (channels, cg, *_) = geometry_of(case), case.weight
    size = 9 * channels * cg + with_bias * channels
    sums = torch.full((splits + 1, size), torch.nan)[:splits].normal_()
    dw = torch.full(case.weight, torch.nan)
    db = torch.full((channels,), torch.nan) if with_bias else None
    plan_reduce(geometry, splits, with_bias, dw.stride())(sums, dw, db)
    total = sums.double().sum(0)
    expected = total[: 9 * channels * cg].view(3, 3, channels, cg).permute(2, 3, 0, 1)
    torch.testing.assert_close(dw.double(), expected, rtol=1e-5, atol=1e-4)
    if db is not None:
        torch.testing.assert_close(db.double(), total[9 * channels * cg :], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("images", "width"), [(4, 9), (1, 40)])
def test_partial_sums_of_tiles_that_share_rows(images: int, width: int, processors: Processors) -> None:
    """Each part of a group of images stores its own sums."""
    case = layer((5, width), images=images)
    operands = OPERANDS._replace(device=processors(6))
    tile = Tile("strips", 4, 16, 16, 16, warps=1, resident=1)
    assert plan_weight_grad(geometry_of(case), operands, tile=tile)[1] == 6
    check_weight_grad(case, tile)


@pytest.mark.parametrize("size", [(5, 20), (4, 9), (1, 1)], ids=str)
@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.long), 132])
def test_weight_gradient_of_wide_groups(
    count: int, stride: int, padding: int, size: tuple[int, int], processors: Processors
) -> None:
    """Tiles of many images, in one program and in several; blocks that the channels don't fill."""
    if min(size) + 2 * padding < 3:
        return
    processors(count)
    case = layer(size, 20, 24, 1, images=3, stride=stride, padding=padding)
    check_weight_grad(case, Tile("strips", 1, 16, 16, 16, warps=1, resident=2))


@pytest.mark.parametrize("count", [1, 132])
def test_bias_gradient_of_wide_groups(count: int, processors: Processors) -> None:
    """Among the programs of one block of outputs, only that of the first block of inputs writes it."""
    processors(count)
    case = layer((3, 18), 40, 20, 2, images=2)
    check_weight_grad(case, Tile("strips", 1, 16, 16, 16, warps=1, resident=16))
