"""Strips of columns and pairs, interpreted, at the edges of tiles.

The tests set the tiles, so that all of them run, independent of the rules.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from edges import (
    HALF,
    OPERANDS,
    Processors,
    check_norm_strips,
    check_strips,
    layer,
    rows_of,
    seven_rows,
    strips,
)
from families import FAMILIES, check, check_epilogue, every_other, geometry_of, inside_nan
from marks import INTERPRETED_KERNELS
from oracle import Case, bounds, expected
from torch import Tensor

from gconv import kernels
from gconv.activation import ACTIVATIONS
from gconv.kernels import launch, tiles
from gconv.kernels.forward import packed, plan_pass
from gconv.kernels.tiles import Tile
from gconv.kernels.walk import images_in_group

pytestmark = INTERPRETED_KERNELS


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("inputs", "outputs", "groups", "columns"), [(4, 4, 4, 3), (16, 16, 2, 2), (32, 32, 1, 1), (13, 24, 2, 2)]
)
def test_strips_of_float32(inputs: int, outputs: int, groups: int, columns: int, stride: int) -> None:
    """TF32 runs in these tiles on a GPU; the interpreter multiplies in full precision."""
    case = layer((4, 5), inputs, outputs, groups, stride=stride)
    check_strips(case, torch.float32, columns=columns)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("columns", "width"),
    [(1, 1), (1, 5), (2, 1), (2, 4), (2, 5), (3, 2), (3, 6), (3, 7), (3, 8), (4, 1), (4, 3), (4, 8), (4, 9)],
)
def test_rows_narrower_than_a_strip_or_no_multiple_of_it(columns: int, width: int, stride: int) -> None:
    """``width`` is that of the outputs; at stride 2, with and without the last column that is read."""
    for extra in range(stride):
        case = layer((3, stride * width - extra), stride=stride)
        assert geometry_of(case).output_size[3] == width
        check_strips(case, columns=columns)


@pytest.mark.parametrize(("groups", "width"), [(16, 4), (4, 8), (4, 16)])
@pytest.mark.parametrize("columns", [1, 2])
def test_two_packs_a_program(columns: int, groups: int, width: int) -> None:
    for stride in (1, 2):
        check_strips(layer((4, 5), width, width, groups, stride=stride), columns=columns, packs=2)


@pytest.mark.parametrize(("packs", "warps"), [(4, 2), (4, 4), (8, 4), (8, 8)])
def test_many_packs_a_program(packs: int, warps: int) -> None:
    for stride in (1, 2):
        case = layer((4, 5), 8, 8, 16, stride=stride)
        tensors, geometry = case.tensors(HALF), geometry_of(case)
        x, w = (inside_nan(t.detach()) for t in tensors[:2])
        dy = torch.randn(geometry.output_size).to(HALF)
        truth, tile = expected(case, tensors, dy), {"packs": packs, "warps": warps, "columns": 2}
        limits = bounds(case, truth, HALF)
        y = kernels.forward(x, w, every_other(tensors[2].detach()), geometry, None, tile=strips(case, **tile))
        dx = kernels.input_grad(inside_nan(dy), w, None, geometry, tile=strips(case, True, **tile))
        check({"output": (y, truth[0], limits[0]), "input gradient": (dx, truth[1], limits[1])})


@pytest.mark.parametrize(
    ("groups", "packs", "left", "warps"),
    [(64, 8, 8, 4), (16, 8, 4, 2), (8, 8, 2, 1), (12, 8, 1, 1), (12, 2, 1, 1)],
)
def test_fewer_packs_where_groups_do_not_fill_them(groups: int, packs: int, left: int, warps: int) -> None:
    tile = Tile("strips", 4, 16, 16, 16, warps=max(1, packs // 2), packs=packs)
    found = tiles.with_whole_packs(tile, groups, 4, 4)
    assert (found.packs, found.warps) == (left, warps)


@pytest.mark.parametrize(("groups", "width"), [(12, 4), (3, 4), (2, 8), (6, 8), (1, 16), (3, 16)])
def test_packs_that_make_no_pairs_run_one_by_one(groups: int, width: int) -> None:
    """The tile of the nearest layer may have two packs, when this layer has one or three."""
    for stride in (1, 2):
        check_strips(layer((3, 5), width, width, groups, stride=stride), columns=2, packs=2)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("columns", "packs"), [(1, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize(("images", "each", "group", "parts"), [(4, 9, 4, 3), (7, 3, 4, 1), (1, 20, 1, 2)])
def test_tiles_of_many_images_and_images_in_two_tiles(
    images: int, each: int, group: int, parts: int, columns: int, packs: int, stride: int
) -> None:
    """Four images share three tiles; of seven images, three are in the second group; one takes two tiles."""
    case = layer((3, each * columns * stride), groups=8, images=images, stride=stride)
    plan = plan_pass("forward", geometry_of(case), OPERANDS, tile=strips(case, columns=columns, packs=packs))
    assert (plan.arguments["group"], plan.arguments["parts"]) == (group, parts)
    check_strips(case, columns=columns, packs=packs)


@pytest.mark.parametrize(("images", "strips"), [(256, 28), (256, 14), (256, 7), (255, 9), (3, 33), (1, 1)])
def test_groups_of_images_fill_tiles(images: int, strips: int) -> None:
    group = images_in_group(images, strips, 16, 100)
    tiles_in_all = -(-images // group) * -(-group * strips // 16)
    assert 1 <= group <= images and tiles_in_all <= images * -(-strips // 16)
    if images == 256:
        assert tiles_in_all == images * strips // 16  # no lane is empty
    for most in (1, 3):
        group = images_in_group(images, strips, 16, most)
        assert -(-group * strips // 16) <= max(most, -(-strips // 16))


@pytest.mark.parametrize(
    ("stride", "padding", "turns"), [(1, 0, 9), (1, 1, 8), (1, 3, 8), (2, 1, 8), (2, 3, 8)]
)
@pytest.mark.parametrize("count", [1, 3, 132])
def test_programs_of_rows_of_two_groups_of_images(
    count: int, stride: int, padding: int, turns: int, processors: Processors
) -> None:
    """Five images of seven rows, then four: all in one program, and in several that begin and end within."""
    case, tile = seven_rows(9, stride, padding), {"columns": 2, "resident": 1}
    operands = OPERANDS._replace(device=processors(count))
    plan = plan_pass("forward", geometry_of(case), operands, tile=strips(case, **tile))
    found = plan.arguments
    assert (found["group"], found["turns"], found["rows"]) == (5, turns, rows_of(turns, count))
    check_strips(case, **tile)


@pytest.mark.parametrize("count", [1, 3, 132])
def test_programs_of_row_pairs_of_two_groups_of_images(count: int, processors: Processors) -> None:
    """An image's eight turns begin above it: the first and the last pair each have one row outside."""
    case, tile = seven_rows(9, 2, 1), {"columns": 2, "resident": 1}
    operands = OPERANDS._replace(device=processors(count))
    plan = plan_pass("input_grad", geometry_of(case), operands, tile=strips(case, True, **tile))
    found = plan.arguments
    assert (found["group"], found["turns"], found["rows"]) == (5, 8, rows_of(8, count))
    check_strips(case, **tile)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 2), (1, 34)], ids=str)
@pytest.mark.parametrize("padding", [1, 2])
def test_images_of_one_row_or_column(padding: int, size: tuple[int, int]) -> None:
    """The smallest images at stride 2: of the T + 1 columns that are loaded, one or none exists."""
    check_strips(layer(size, groups=8, images=1, stride=2, padding=padding), columns=2, packs=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_residue_kernel_in_sixteen_bits(dtype: torch.dtype) -> None:
    """No rule chooses it on NVIDIA GPUs, but tuning may."""
    for case in FAMILIES:
        if not case.name.startswith("stride 2,"):
            continue
        tile = replace(strips(case, True), kernel="residue", pixels=32, warps=2)
        tensors, geometry = case.tensors(dtype), geometry_of(case)
        dy = torch.randn(geometry.output_size).to(dtype)
        truth = expected(case, tensors, dy)
        dx = kernels.input_grad(inside_nan(dy), inside_nan(tensors[1].detach()), None, geometry, tile=tile)
        check({case.name: (dx, truth[1], bounds(case, truth, dtype)[1])})


@pytest.mark.parametrize("padding", [0, 2, 3, 4, (0, 3), (3, 0)], ids=str)
@pytest.mark.parametrize("size", [(5, 6), (6, 5)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_odd_and_even_sizes_with_padding_past_the_kernel(
    stride: int, size: tuple[int, int], padding: int | tuple[int, int], processors: Processors
) -> None:
    processors(132)
    check_strips(layer(size, groups=8, stride=stride, padding=padding), columns=2, packs=2)


@pytest.mark.parametrize(
    ("inputs", "outputs", "groups", "changes"),
    [
        (24, 24, 2, {"columns": 2}),
        (32, 32, 1, {"columns": 4}),
        (24, 24, 2, {"outputs": 16}),
        (32, 32, 2, {"outputs": 16, "columns": 2}),
        (8, 32, 2, {"columns": 2}),
        (32, 13, 1, {"columns": 3}),
        (3, 5, 6, {"columns": 2}),
        (5, 3, 7, {"columns": 3}),
        (1, 4, 5, {"columns": 2}),
        (4, 4, 4, {"pixels": 32, "columns": 2}),
        (36, 52, 1, {"columns": 2}),
        (13, 72, 1, {"columns": 2}),
        (72, 13, 1, {"columns": 1}),
    ],
)
def test_groups_of_any_width(inputs: int, outputs: int, groups: int, changes: dict[str, int]) -> None:
    """Also blocks of outputs, which no rule makes, and widths that leave some lanes without a channel."""
    for stride in (1, 2):
        check_strips(layer((4, 5), inputs, outputs, groups, stride=stride), **changes)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize(("columns", "packs", "stride"), [(2, 2, 1), (3, 1, 2)])
def test_bias_residual_and_activation(
    columns: int, packs: int, stride: int, residual: bool, activation: str | None
) -> None:
    case = layer((4, 5), groups=8, stride=stride)
    for pass_, transposed in (("forward", False), ("input_grad", True)):
        tile = strips(case, transposed, columns=columns, packs=packs)
        check_epilogue(pass_, case, activation, residual, tile=tile)


@pytest.mark.parametrize("columns", [1, 3])
def test_offsets_of_64_bits(columns: int, monkeypatch: pytest.MonkeyPatch, processors: Processors) -> None:
    monkeypatch.setattr(tiles, "is_wide", lambda *_: True)
    processors(5)  # not in the cache of plans
    for stride in (1, 2):
        check_strips(layer((4, 5), stride=stride), columns=columns)
        check_norm_strips(layer((4, 5), stride=stride), columns=columns)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("load", "groups", "unit"), [(16, 8, 8), (8, 8, 4), (16, 6, 4), (16, 5, 2)])
def test_loads_of_each_width(load: int, groups: int, unit: int, dtype: torch.dtype) -> None:
    """Strides are in units of what a load brings and what divides them all."""
    case = layer((4, 5), inputs=2, outputs=2, groups=groups)
    x, w, _ = (t.detach() for t in case.tensors(dtype))
    x, geometry, tile = (
        x.contiguous(memory_format=torch.channels_last),
        geometry_of(case),
        strips(case, load=load),
    )
    assert (
        plan_pass("forward", geometry, launch.OperandLayout.of(x, w), tile=tile).arguments["X_UNIT"] == unit
    )
    y = kernels.forward(x, w, None, geometry, None, tile=tile)
    right = expected(case, (x, w, None), torch.ones(y.shape))[0]
    check({"output": (y, right, bounds(case, [right], dtype)[0])})


FORMS = {
    "contiguous": lambda w: w.contiguous(),
    "channels_last": lambda w: w.contiguous(memory_format=torch.channels_last),
    "a window": inside_nan,
    "every other number": every_other,
    "outputs innermost": lambda w: w.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "taps flipped in memory": lambda w: w.flip(3).transpose(2, 3).contiguous().transpose(2, 3).flip(3),
}


def dense_packs(case: Case, weight: Tensor, tile: Tile, transposed: bool) -> Tensor:
    """Return ``weight`` between the channels of each pack  # (packs, 9, inputs, outputs), zero past them"""
    blocks = weight.unflatten(0, (case.groups, -1))  # (groups, outputs, inputs, 3, 3)
    blocks = blocks.flip(3, 4) if transposed else blocks.transpose(1, 2)
    inputs, outputs = blocks.shape[1:3]
    dense = weight.new_zeros(-(-case.groups // tile.groups), 9, tile.inputs, tile.outputs)
    for g, block in enumerate(blocks):
        at = g % tile.groups
        rows, columns = (slice(at * side, (at + 1) * side) for side in (inputs, outputs))
        dense[g // tile.groups, :, rows, columns] = block.flatten(2).permute(2, 0, 1)
    return dense


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "input_grad"])
@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("inputs", "outputs", "groups"), [(4, 4, 8), (3, 5, 7), (24, 32, 2), (40, 56, 2), (72, 13, 1)]
)
def test_weights_of_any_strides_are_packed_for_the_threads(
    inputs: int, outputs: int, groups: int, dtype: torch.dtype, transposed: bool, form: str
) -> None:
    """Thread t of four reads its 16 bytes of a block's inputs, in the order of its registers."""
    case = layer((4, 4), inputs, outputs, groups)
    tile = strips(case, transposed, outputs=128) if max(inputs, outputs) > 64 else strips(case, transposed)
    in_register = 4 // dtype.itemsize
    weight, block = FORMS[form](case.tensors(dtype)[1].detach()), min(tile.inputs, 16 * in_register)
    found = packed(weight, geometry_of(case), transposed, tile).view(
        -1, 9, tile.inputs // block, tile.outputs, block
    )
    order = torch.arange(block).view(-1, 4, in_register).transpose(0, 1).flatten()
    dense = dense_packs(case, weight, tile, transposed).unflatten(2, (-1, block))
    assert torch.equal(found, dense.transpose(3, 4)[..., order])
