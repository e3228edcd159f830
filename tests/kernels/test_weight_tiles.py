"""The weight gradient's rows and blocks, interpreted, at the edges of tiles.

The tests set the tiles, so that all of them run, independent of the rules.
"""

from __future__ import annotations

import pytest
from edges import OPERANDS, Processors, check_weight_grad, layer, rows_of, seven_rows
from families import geometry_of
from marks import INTERPRETED_KERNELS
from oracle import Case

from gconv.kernels.tiles import Tile
from gconv.kernels.weight_grad import plan_weight_grad

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
