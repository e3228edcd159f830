"""Expected results, from float64 ``F.conv2d``, and tolerances, from dtype and reduction length."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gconv
from gconv import autograd, functional


@dataclass(frozen=True)
class Case:
    """One call of a grouped convolution; ``settings`` are keyword arguments of ``F.conv2d``."""

    name: str
    input: tuple[int, ...]
    weight: tuple[int, int, int, int]
    settings: dict[str, Any] = field(default_factory=dict)
    bias: bool = True

    @property
    def groups(self) -> int:
        return self.settings.get("groups", 1)

    def tensors(
        self, dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return input, weight and bias that require gradients; their values are exact in ``dtype``."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*size: int) -> Tensor:
            values = torch.randn(size, generator=generator, dtype=torch.float64)
            return values.to(dtype).requires_grad_()

        return draw(*self.input), draw(*self.weight), draw(self.weight[0]) if self.bias else None


# "aten" and "reference" as a user asks for them; "aten operators" are our operators around PyTorch's passes,
# which take over where another backend runs some of the passes only.
PATHS = ("aten", "reference", "aten operators")


def run(path: str, input: Tensor, weight: Tensor, bias: Tensor | None = None, **settings: Any) -> Tensor:
    """Call ``group_conv2d`` on one of ``PATHS``."""
    if path != "aten operators":
        return gconv.group_conv2d(input, weight, bias, **settings, backend=path)
    activation = settings.pop("activation", None)
    arguments = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, **settings}
    dtype, geometry = functional.prepare(input, weight, bias, activation=activation, **arguments)
    batch, weight = (input if input.ndim == 4 else input.unsqueeze(0)).to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    output = autograd.group_conv(batch, weight, bias, geometry, activation, "aten")
    return output if input.ndim == 4 else output.squeeze(0)


def expected(
    case: Case, tensors: tuple[Tensor | None, ...], grad: Tensor, relu: bool = False
) -> list[Tensor]:
    """Return output and gradients of ``F.conv2d`` in float64."""
    wide = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    output = F.conv2d(*wide, **case.settings)
    output = output.relu() if relu else output
    return [output.detach(), *torch.autograd.grad(output, [t for t in wide if t is not None], grad.double())]


def bounds(case: Case, truth: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the tolerance of each element of output and gradients, for data of deviation 1.

    The result is rounded once to ``dtype``: half an epsilon of its own size, one epsilon here. Before that it
    is a sum of ``length`` products of deviation 1, held in float32 or wider: each partial sum, of size
    sqrt(length), is rounded, which adds up to ``length`` epsilons at most. 6: for draws some deviations out.
    """
    k, group_in, r, s = case.weight
    group_out, pixels = k // case.groups, truth[0].numel() // k
    held = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    narrow, wide = torch.finfo(dtype), torch.finfo(held)
    lengths = (group_in * r * s, group_out * r * s, pixels, pixels)
    return [
        narrow.eps * (t.abs() + narrow.tiny) + 6 * wide.eps * (n + math.sqrt(n))
        for t, n in zip(truth, lengths, strict=False)
    ]


CASES = [
    Case("3x3, ResNeXt", (2, 8, 7, 6), (8, 2, 3, 3), {"padding": 1, "groups": 4}, bias=False),
    Case("3x3, no padding", (2, 8, 7, 6), (8, 2, 3, 3), {"groups": 4}),
    Case("stride 2, odd size", (2, 8, 7, 5), (8, 2, 3, 3), {"stride": 2, "padding": 1, "groups": 4}),
    Case("stride 2, even size", (2, 8, 8, 6), (8, 2, 3, 3), {"stride": 2, "padding": 1, "groups": 4}),
    Case("stride 3 by 2", (1, 6, 11, 9), (6, 3, 3, 3), {"stride": (3, 2), "padding": (0, 2), "groups": 2}),
    Case("stride beyond the kernel", (2, 4, 9, 9), (4, 2, 2, 2), {"stride": 3, "groups": 2}),
    Case("1x1", (2, 8, 5, 5), (12, 2, 1, 1), {"groups": 4}),
    Case("1x1, stride 2", (2, 8, 5, 5), (12, 2, 1, 1), {"stride": 2, "groups": 4}),
    Case("dilation 2", (2, 6, 9, 8), (6, 2, 3, 3), {"padding": 2, "dilation": 2, "groups": 3}),
    Case(
        "dilation 3 by 1, stride 2",
        (1, 4, 11, 9),
        (4, 2, 3, 3),
        {"dilation": (3, 1), "stride": 2, "groups": 2},
    ),
    Case("kernel 5x2", (2, 4, 8, 7), (8, 2, 5, 2), {"padding": (2, 1), "groups": 2}),
    Case("kernel 1x7", (1, 4, 5, 9), (4, 1, 1, 7), {"padding": (0, 3), "groups": 4}),
    Case("same", (2, 6, 7, 6), (6, 2, 3, 3), {"padding": "same", "groups": 3}),
    Case(
        "same, dilated, 2x5", (2, 6, 7, 6), (6, 2, 2, 5), {"padding": "same", "dilation": (1, 2), "groups": 3}
    ),
    Case("same, 4x4", (2, 6, 7, 6), (6, 2, 4, 4), {"padding": "same", "groups": 3}),
    Case("valid", (2, 6, 7, 6), (6, 2, 3, 3), {"padding": "valid", "groups": 3}),
    Case("dense", (2, 5, 6, 6), (7, 5, 3, 3), {"padding": 1}),
    Case("one channel a group", (2, 6, 6, 7), (6, 1, 3, 3), {"padding": 1, "groups": 6}),
    Case("depth multiplier 3", (2, 4, 6, 7), (12, 1, 3, 3), {"padding": 1, "groups": 4}),
    Case("more in than out", (2, 12, 6, 5), (4, 6, 3, 3), {"padding": 1, "groups": 2}),
    Case("widths 5 and 3", (2, 15, 5, 6), (9, 5, 3, 3), {"padding": 1, "groups": 3}),
    Case("one image", (6, 7, 6), (6, 2, 3, 3), {"padding": 1, "groups": 3}),
    Case("one image, same", (6, 7, 6), (6, 2, 2, 3), {"padding": "same", "groups": 3}, bias=False),
    Case("no images", (0, 6, 7, 6), (6, 2, 3, 3), {"padding": 1, "groups": 3}),
    Case("one pixel", (3, 4, 1, 1), (4, 2, 3, 3), {"padding": 1, "groups": 2}),
    Case("padding beyond the image", (1, 4, 2, 2), (4, 2, 3, 3), {"padding": 3, "groups": 2}),
    Case("one row", (2, 4, 1, 9), (4, 2, 1, 3), {"padding": (0, 1), "groups": 2}),
]
