"""Batch norm inside strips of columns and pairs, interpreted, at the edges of tiles.

The tests set the tiles, so that all of them run, independent of the rules.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from edges import Processors, check_norm_strips, layer, seven_rows, strips
from families import geometry_of
from marks import INTERPRETED_KERNELS
from norms import check_padding

from gconv import kernels

pytestmark = INTERPRETED_KERNELS


@pytest.mark.parametrize("stride", [1, 2])
def test_norms_gather_from_blocks_of_outputs(stride: int) -> None:
    """There are as many parts as splits, for any blocks."""
    check_norm_strips(layer((4, 5), 24, 24, 2, stride=stride), outputs=16)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("columns", "width"), [(1, 1), (1, 5), (2, 1), (2, 5), (3, 2), (3, 8), (4, 9)])
def test_batch_norm_in_rows_that_are_no_multiple_of_a_strip(columns: int, width: int, stride: int) -> None:
    """If a strip ends outside the image, only the columns inside are normalized and counted."""
    case = layer((3, stride * width), stride=stride)
    assert geometry_of(case).output_size[3] == width
    check_norm_strips(case, columns=columns)


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.long)], ids=str
)
@pytest.mark.parametrize(("columns", "size"), [(1, (1, 19)), (2, (1, 19)), (1, (4, 5)), (2, (4, 5))], ids=str)
def test_batch_norm_in_two_packs(columns: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    for stride in (1, 2):
        check_norm_strips(layer(size, 8, 8, 8, images=1, stride=stride), dtype, columns=columns, packs=2)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("packs", [1, 2])
def test_padding_is_zero_even_if_the_norm_of_zero_overflows(packs: int, stride: int) -> None:
    case = layer((4, 5), 8, 8, 8, stride=stride)
    tile = strips(case, columns=2, packs=packs)
    check_padding(case, tiles={"forward": tile, "weight_grad": tile})


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("count", "packs"),
    [pytest.param(1, 1, marks=pytest.mark.long), (3, 2), pytest.param(132, 1, marks=pytest.mark.long)],
)
def test_batch_norm_in_programs_of_rows_that_span_two_tiles(
    count: int, packs: int, stride: int, padding: int, processors: Processors
) -> None:
    """A program gathers from all of its rows, in any tile; each program stores a part."""
    processors(count)
    case = replace(seven_rows(9, stride, padding), weight=(32, 4, 3, 3))
    case = replace(case, input=(9, 32, *case.input[2:]), settings={**case.settings, "groups": 8})
    check_norm_strips(case, columns=2, packs=packs, resident=2)


def test_programs_that_no_image_is_left_for_gather_nothing(processors: Processors) -> None:
    """Of 17 images in groups of five, the last two have no strip in the second of a group's two tiles."""
    processors(132)
    check_norm_strips(layer((3, 6), images=17), columns=1)


@pytest.mark.parametrize(
    ("inputs", "outputs", "groups", "changes"),
    [
        (24, 24, 2, {"columns": 2}),
        (32, 32, 2, {"outputs": 16, "columns": 2}),
        (3, 5, 7, {"columns": 3}),
        (32, 13, 1, {"columns": 2}),
        (4, 4, 6, {"pixels": 32, "columns": 2}),
    ],
)
def test_batch_norm_of_groups_of_any_width(
    inputs: int, outputs: int, groups: int, changes: dict[str, int]
) -> None:
    for stride in (1, 2):
        check_norm_strips(layer((4, 5), inputs, outputs, groups, stride=stride), **changes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("columns", "packs"), [(1, 2), (4, 1)])
def test_moments_in_strips_are_stable_for_large_means(
    columns: int, packs: int, dtype: torch.dtype, processors: Processors
) -> None:
    """Means of as many deviations as sixteen bits can represent: y differs in its last digits.

    A sum of squares in float32 would lose the variance.
    """
    processors(1)
    case = layer((12, 9), 4, 4, 8, images=3)
    x, w, _ = (t.detach() for t in case.tensors(dtype))
    norm = torch.tensor([1.0, 0.0, 0.0]).view(3, 1).expand(3, x.shape[1]).contiguous()
    bias = torch.full((w.shape[0],), 1.5 / torch.finfo(dtype).eps, dtype=dtype)
    tile = strips(case, columns=columns, packs=packs)
    y, moments = kernels.norm_forward(x, norm, w, bias, geometry_of(case), tile)
    variance, mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    assert (mean.square() > 1e3 * variance).all()
    torch.testing.assert_close(moments[0].double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(moments[1].double(), variance, rtol=1e-4, atol=0)
