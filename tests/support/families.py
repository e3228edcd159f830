"""Geometries for every kernel, and comparisons of the kernels' results with float64.

NaN surrounds the operands, so that reads outside them show up in the results.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from oracle import Case, Compared, bounds, call_of, expected
from torch import Tensor

from gconv import kernels
from gconv.activation import ACTIVATIONS
from gconv.geometry import PASSES, ConvGeometry
from gconv.kernels.tiles import Tile

Place = Callable[[Tensor], Tensor]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SAME = {"padding": 1}
PAST = {"padding": (2, 0), "stride": 2}

# Group widths from 1 to dense, powers of two and others, equal and unequal, and the edge cases of each
# kernel.
FAMILIES = [
    Case("slide, width 4", (3, 16, 9, 7), (16, 4, 3, 3), {**SAME, "groups": 4}),
    Case("slide, one tile and a bit", (5, 16, 3, 14), (16, 8, 3, 3), {**SAME, "groups": 2}),
    Case("slide, no padding, wide step", (2, 8, 6, 9), (8, 4, 3, 3), {"stride": (1, 2), "groups": 2}),
    Case("slide, more padding than kernel", (1, 8, 3, 3), (8, 4, 3, 3), {"padding": 4, "groups": 2}),
    Case("slide, dilated along rows", (1, 8, 5, 9), (8, 4, 3, 3), {"dilation": (1, 2), "groups": 2}),
    Case("slide, width 3 to 5", (2, 18, 5, 5), (30, 3, 3, 3), {**SAME, "groups": 6}),
    Case("slide, width 13", (1, 26, 5, 5), (26, 13, 3, 3), {**SAME, "groups": 2}),
    Case("slide, width 24", (1, 48, 5, 5), (48, 24, 3, 3), {**SAME, "groups": 2}),
    Case("slide, width 32", (1, 32, 5, 5), (32, 32, 3, 3), SAME),
    Case("slide, width 1 to 4", (2, 6, 5, 5), (24, 1, 3, 3), {**SAME, "groups": 6}),
    Case("strips, two packs", (3, 32, 4, 5), (32, 8, 3, 3), {**SAME, "groups": 4}),
    Case("strips, two packs, stride 2", (2, 32, 5, 4), (32, 16, 3, 3), {**SAME, "stride": 2, "groups": 2}),
    Case("strips, width 40", (2, 80, 3, 5), (80, 40, 3, 3), {**SAME, "groups": 2}),
    Case("strips, width 56, stride 2", (1, 112, 5, 4), (112, 56, 3, 3), {**SAME, "stride": 2, "groups": 2}),
    Case("strips, width 68 to 36", (1, 68, 3, 3), (36, 68, 3, 3), SAME),
    Case("strips, width 20 to 112", (1, 20, 2, 3), (112, 20, 3, 3), SAME),
    Case("strips, width 112, one pixel", (1, 112, 1, 1), (112, 112, 3, 3), SAME),
    Case("strips, one row, two packs", (1, 32, 1, 19), (32, 16, 3, 3), {**SAME, "groups": 2}),
    Case("stride 2, even", (2, 8, 10, 10), (8, 4, 3, 3), {**SAME, "stride": 2, "groups": 2}),
    Case("stride 2, odd", (2, 8, 9, 11), (8, 4, 3, 3), {**SAME, "stride": 2, "groups": 2}),
    Case("stride 2, no padding, rest", (1, 8, 10, 8), (8, 2, 3, 3), {"stride": 2, "groups": 4}),
    Case("stride 2, width 24 to 8", (1, 24, 7, 7), (8, 24, 3, 3), {**SAME, "stride": 2}),
    Case("stride 2, padding 3", (1, 8, 6, 5), (8, 4, 3, 3), {"padding": 3, "stride": 2, "groups": 2}),
    Case("stride 2, two packs, odd", (3, 32, 5, 7), (32, 4, 3, 3), {**SAME, "stride": 2, "groups": 8}),
    Case("stride 2, two packs, padding 2 by 0", (9, 32, 4, 9), (32, 16, 3, 3), {**PAST, "groups": 2}),
    Case("stride 2, width 32, one row", (1, 32, 1, 9), (32, 32, 3, 3), {**SAME, "stride": 2}),
    Case("stride 2 by 1", (1, 8, 7, 6), (8, 4, 3, 3), {**SAME, "stride": (2, 1), "groups": 2}),
    Case("taps, 1x1", (2, 32, 5, 5), (16, 16, 1, 1), {"groups": 2}),
    Case("taps, 5x5, stride 3", (1, 12, 9, 8), (12, 6, 5, 5), {"padding": 2, "stride": 3, "groups": 2}),
    Case("taps, 2x4, same", (1, 12, 5, 6), (12, 6, 2, 4), {"padding": "same", "groups": 2}),
    Case("taps, dilated", (1, 8, 8, 8), (8, 4, 3, 3), {"padding": 3, "dilation": 3, "groups": 2}),
    Case("taps, width 56", (1, 112, 4, 4), (112, 56, 2, 3), {**SAME, "groups": 2}),
    Case("taps, width 72 to 40", (1, 72, 4, 4), (40, 72, 3, 1), {}),
    Case("taps, width 112", (1, 112, 3, 4), (112, 112, 1, 2), {}),
    Case("taps, width 264", (1, 264, 3, 3), (264, 264, 1, 1), {}),
    Case("depthwise", (2, 20, 6, 9), (20, 1, 3, 3), {**SAME, "groups": 20}),
    Case("depthwise, 70 channels", (1, 70, 4, 4), (70, 1, 3, 3), {**SAME, "groups": 70}),
    Case("depthwise, 7x7", (1, 6, 8, 8), (6, 1, 7, 7), {"padding": 3, "groups": 6}),
    Case("depthwise, stride 2", (2, 6, 7, 8), (6, 1, 3, 3), {**SAME, "stride": 2, "groups": 6}),
    Case("depthwise, dilated", (1, 6, 7, 8), (6, 1, 3, 2), {"dilation": (2, 1), "groups": 6}),
    Case("depthwise, 9x8, beyond the registers", (1, 3, 9, 8), (3, 1, 9, 8), {"padding": 2, "groups": 3}),
    Case("depthwise, 13x13", (2, 20, 7, 5), (20, 1, 13, 13), {"padding": 6, "groups": 20}),
    Case("depthwise, row of 4", (3, 20, 1, 9), (20, 1, 1, 4), {"padding": (0, 1), "groups": 20}),
    Case("depthwise, row of 31", (2, 20, 1, 40), (20, 1, 1, 31), {"padding": (0, 15), "groups": 20}),
    Case("depthwise, row of 4, stride 2", (1, 6, 1, 9), (6, 1, 1, 4), {"stride": (1, 2), "groups": 6}),
]
# Layers of real networks: too large for the interpreter.
LARGE = [
    Case("128 x 56", (8, 128, 56, 56), (128, 4, 3, 3), {"padding": 1, "groups": 32}),
    Case("256 x 56, stride 2", (8, 256, 56, 56), (256, 8, 3, 3), {"padding": 1, "groups": 32, "stride": 2}),
    Case("1024 x 7", (32, 1024, 7, 7), (1024, 32, 3, 3), {"padding": 1, "groups": 32}),
]


def named(name: str) -> Case:
    """Return the case in ``FAMILIES`` with that name."""
    return next(case for case in FAMILIES if case.name == name)


def geometry_of(case: Case) -> ConvGeometry:
    return call_of(case.kind, *case.tensors(torch.float32)[:2], **case.settings)[1].geometry


def inside_nan(tensor: Tensor, channels: int = 1) -> Tensor:
    """Copy a tensor to a channels_last window of a larger tensor of NaN.

    With a margin of one channel the window starts at an odd element, where loads can't be vectorized.
    """
    margins = (1, channels, 1, 1)
    sizes = [size + 2 * margin for size, margin in zip(tensor.shape, margins, strict=True)]
    wide = torch.full(sizes, torch.nan, dtype=tensor.dtype, device=tensor.device)
    wide = wide.contiguous(memory_format=torch.channels_last)
    return wide[tuple(slice(margin, -margin) for margin in margins)].copy_(tensor)


def aligned(tensor: Tensor) -> Tensor:
    """Copy a tensor inside NaN, aligned to 16 bytes like usual tensors; pixels too if 8 divides C."""
    return inside_nan(tensor, channels=8)


def every_other(tensor: Tensor) -> Tensor:
    """Return a copy whose numbers alternate with NaN in memory."""
    return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0]


def kernel_results(
    case: Case, dtype: torch.dtype, relu: bool = False, device: str = "cpu", place: Place = inside_nan
) -> Compared:
    """Return result, reference and bound of each pass; ``place`` copies operands to memory."""
    tensors, geometry = case.tensors(dtype), geometry_of(case)
    x, w = (place(t.detach().to(device)) for t in tensors[:2])
    bias = None if tensors[2] is None else every_other(tensors[2].detach().to(device))
    grad = torch.randn(geometry.output_size, dtype=torch.float64).to(dtype)
    dy = place(grad.to(device))
    dw, db = kernels.weight_grad(dy, x, geometry, bias is not None)
    results = [kernels.forward(x, w, bias, geometry, "relu" if relu else None)]
    results += [kernels.input_grad(dy, w, None, geometry), dw] + ([] if db is None else [db])
    truth = [t.to(device) for t in expected(case, tensors, grad)]
    truth[0] = truth[0].relu() if relu else truth[0]
    limits = bounds(case, truth, dtype)
    assert all(result.dtype == dtype for result in results)
    names = ("output", "input gradient", "weight gradient", "bias gradient")
    return dict(zip(names, zip(results, truth, limits, strict=True), strict=False))


def check_kernels(
    case: Case, dtype: torch.dtype, relu: bool = False, device: str = "cpu", place: Place = inside_nan
) -> None:
    check(kernel_results(case, dtype, relu, device, place))


def check_epilogue(
    pass_: str,
    case: Case,
    activation: str | None,
    residual: bool,
    dtype: torch.dtype = torch.float16,
    tile: Tile | None = None,
) -> None:
    """Compare "forward" or "input_grad" with float64, with bias, residual and activation.

    Args:
        pass_: the pass.
        case: the convolution; its ``bias`` determines for both passes whether there is one.
        activation: the activation, or None.
        residual: whether to add a residual.
        dtype: dtype of operands and results. Defaults to float16.
        tile: tile of the kernel. Defaults to None: the one that gconv chooses.
    """
    geometry, (x, w, _) = geometry_of(case), case.tensors(dtype)
    source = x.detach() if pass_ == "forward" else torch.randn(geometry.output_size).to(dtype)
    size = geometry.output_size if pass_ == "forward" else geometry.input_size
    bias = torch.randn(size[1]).to(dtype) if case.bias else None
    side = (4 * torch.randn(size)).to(dtype) if residual else None
    beside = (None if bias is None else every_other(bias), geometry, activation)
    run = kernels.forward if pass_ == "forward" else kernels.input_grad
    result = run(
        inside_nan(source), inside_nan(w.detach()), *beside, None if side is None else inside_nan(side), tile
    )
    grad = source if pass_ == "input_grad" else torch.ones(geometry.output_size)
    right = expected(case, (x, w, None), grad)[PASSES.index(pass_)]
    right = right if bias is None else right + bias.double().view(-1, 1, 1)
    right = right if side is None else right + side.double()
    bound = bounds(case, [right, right], dtype)[PASSES.index(pass_)]
    right = right if activation is None else ACTIVATIONS[activation](right)
    # The steepest activation is hardswish, with a slope of at most 1.5.
    check({pass_: (result, right, 1.5 * bound + torch.finfo(dtype).eps)})


def check(results: Compared) -> None:
    """Check that every result differs from the reference by at most its bound."""
    for name, (result, right, bound) in results.items():
        assert result.shape == right.shape, name
        right, bound = right.to(result.device), bound.to(result.device)
        wrong = ~((result.double() - right).abs() <= bound)
        assert not wrong.any(), f"{name}: {wrong.sum()} of {wrong.numel()} beyond the bound"
