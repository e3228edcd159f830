"""Comparisons of the kernels with batch norm inside, and of the norm kernels, with float64."""

from __future__ import annotations

import torch
from families import Compared, Place, check, every_other, geometry_of, inside_nan
from oracle import Case, bounds, expected
from torch import Tensor

from gconv import batch_norm, kernels
from gconv.kernels import batch_norm as norm_kernels
from gconv.kernels.tiles import Tile

MEAN = 0.25  # subtracted from x in the sum with x


def norm_results(
    case: Case,
    dtype: torch.dtype,
    device: str = "cpu",
    tiles: dict[str, Tile] | None = None,
    place: Place = inside_nan,
) -> Compared:
    """Return result, reference and bound of each pass with batch norm and ReLU before and statistics after.

    The input of the convolution is rounded to ``dtype``. Sums are compared with sums over the stored output.

    Args:
        case: the convolution.
        dtype: dtype of operands and results.
        device: device of the kernels. Defaults to "cpu".
        tiles: tiles by pass. Defaults to those that gconv chooses.
        place: copies operands to memory. Defaults to ``inside_nan``.
    """
    geometry, tiles = geometry_of(case), tiles or {}
    x, w, bias = (None if t is None else t.detach() for t in case.tensors(dtype))
    scale, shift = (torch.linspace(*ends, geometry.input_size[1]) for ends in ((-1, 1.5), (1, -0.5)))
    norm = torch.stack([scale, shift, torch.full_like(scale, MEAN)])
    grad = torch.randn(geometry.output_size, dtype=torch.float64).to(dtype)
    truth, limits = _truth(case, (x, w, bias), norm, grad, device)

    norm, weight, dy = norm.to(device), place(w.to(device)), place(grad.to(device))
    x, b = place(x.to(device)), None if bias is None else every_other(bias.to(device))
    y, moments = kernels.norm_forward(x, norm, weight, b, geometry, tiles.get("forward"))
    da, sums = kernels.norm_input_grad(dy, weight, x, norm, geometry, tiles.get("input_grad"))
    tile = tiles.get("weight_grad")
    dw, db = kernels.norm_weight_grad(dy, x, norm, geometry, bias is not None, tile)
    results = [y, da, dw] + ([] if db is None else [db])
    names = ("output", "input gradient", "weight gradient", "bias gradient")
    found = dict(zip(names, zip(results, truth, limits, strict=True), strict=False))
    held = torch.finfo(torch.float32).eps * y.numel()
    return found | _moments(y, moments, held) | _sums(da, x, sums, held)


def _truth(
    case: Case, tensors: tuple[Tensor | None, ...], norm: Tensor, grad: Tensor, device: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Return output and gradients in float64, and their bounds."""
    x, w, bias = tensors
    scale, shift = norm[0].view(-1, 1, 1), norm[1].view(-1, 1, 1)
    if device == "cpu":  # the interpreter rounds twice, a GPU's multiply-add once
        inside = x.float() * scale + shift
    else:
        inside = (x.double() * scale.double() + shift.double()).float()
    truth = expected(case, (_rounded(inside.relu(), x.dtype, device), w, bias), grad)
    truth[1] = torch.where(inside > 0, truth[1], 0)
    limits = bounds(case, truth, x.dtype)
    # If products are summed in another order, a value between two numbers of dtype can round to either.
    limits[0] += 8 * torch.finfo(x.dtype).eps
    return truth, limits


def _rounded(tensor: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """Round float32 to ``dtype`` as kernels do: Triton's interpreter truncates to bfloat16, GPUs round."""
    if dtype == torch.bfloat16 and device == "cpu":
        tensor = (tensor.view(torch.int32) & -0x10000).view(torch.float32)
    return tensor.to(dtype)


def _moments(y: Tensor, moments: Tensor, held: float) -> Compared:
    """Return mean and variance of the output with reference and bound; ``held``: error of a float32 sum."""
    variance, average = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    of_variance = held * (variance + variance.sqrt() * average.abs()) + (held * average).square()
    return {
        "mean": (moments[0], average, held * (average.abs() + variance.sqrt())),
        "variance": (moments[1], variance, of_variance),
    }


def _sums(da: Tensor, x: Tensor, sums: Tensor, held: float) -> Compared:
    """Return the sums for the gradients of scale and shift, with reference and bound."""
    found = {}
    of_grad = da.double() * (x.double() - MEAN)
    for name, result, terms in (("sum", sums[0], da.double()), ("sum with x", sums[1], of_grad)):
        found[name] = result, terms.sum((0, 2, 3)), held * terms.abs().sum((0, 2, 3))
    return found


def check_padding(case: Case, device: str = "cpu", tiles: dict[str, Tile] | None = None) -> None:
    """Check that padding is zero even if the norm would make more of zero than float16 can hold.

    Here the norm is 316 x + 94800, and x is near -300. Channels that hardly vary have such norms.
    """
    geometry, tiles = geometry_of(case), tiles or {}
    x, w, bias = (None if t is None else t.detach() for t in case.tensors(torch.float16))
    x = 2 * x.round() - 300
    norm = torch.tensor([316.0, 94800.0, 0.0]).view(3, 1).repeat(1, x.shape[1])
    inside = (316 * x.float() + 94800).relu().half()
    grad = torch.randn(geometry.output_size, dtype=torch.float64)
    w, grad = ((t / 512).half() for t in (w, grad))  # bounds are for products of standard deviation 1
    truth = expected(case, (inside, w, bias), grad)
    limits = bounds(case, truth, torch.float16)

    x, weight, dy = (inside_nan(t.to(device)) for t in (x, w, grad))
    norm, b = norm.to(device), None if bias is None else every_other(bias.to(device))
    y, _ = kernels.norm_forward(x, norm, weight, b, geometry, tiles.get("forward"))
    dw, _ = kernels.norm_weight_grad(dy, x, norm, geometry, False, tiles.get("weight_grad"))
    check({"output": (y, truth[0], limits[0]), "weight gradient": (dw, truth[2], limits[2])})


def check_norm_kernels(x: Tensor, grad: Tensor, norm: Tensor, slope: Tensor, tolerance: float) -> None:
    """Compare the norm kernels with their equations.

    Args:
        x: input of the norm, (N, C, H, W).
        grad: gradient of its output.
        norm: scale, shift and mean of each channel, (3, C).
        slope: slope of the input gradient, (2, C).
        tolerance: for float32; for other dtypes it is 2e-2.
    """
    tolerance = tolerance if x.dtype == torch.float32 else 2e-2
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(norm_kernels.normalise(x, norm), batch_norm.normalise(x, norm), **close)
    ours, right = (of.through_norm(grad, x, norm, slope) for of in (norm_kernels, batch_norm))
    torch.testing.assert_close(ours, right, **close)
    exact = batch_norm.moments(x.double()).float()
    torch.testing.assert_close(norm_kernels.moments(x), exact, rtol=1e-5, atol=1e-5)
