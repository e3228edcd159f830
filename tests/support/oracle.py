"""Expected results from PyTorch in float64, and tolerances from dtype and reduction length."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gconv import functional
from gconv.arguments import prepare
from gconv.kinds import CONV1D, CONV2D, CONV3D, CONV_TRANSPOSE1D, CONV_TRANSPOSE2D, Call, Kind
from gconv.module import LAYERS

FUNCTIONS = {layer._gconv_kind: layer._gconv_function for layer in LAYERS}


Compared = dict[str, tuple[Tensor, Tensor, Tensor]]  # result, reference and bound, by name


@dataclass(frozen=True)
class Case:
    """One call of a grouped convolution; ``settings`` are keyword arguments of ``kind.pytorch``."""

    name: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    bias: bool = True
    kind: Kind = CONV2D

    @property
    def groups(self) -> int:
        return self.settings.get("groups", 1)

    @property
    def channels_per_group(self) -> tuple[int, int]:
        """Input and output channels of one group."""
        first, second = self.weight[0] // self.groups, self.weight[1]
        return (first, second) if self.kind.transposed else (second, first)

    @property
    def outputs(self) -> int:
        return self.channels_per_group[1] * self.groups

    def tensors(
        self, dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return input, weight and bias that require gradients; their values are exact in ``dtype``."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*size: int) -> Tensor:
            values = torch.randn(size, generator=generator, dtype=torch.float64)
            return values.to(dtype).requires_grad_()

        return draw(*self.input), draw(*self.weight), draw(self.outputs) if self.bias else None

    def pytorch(self, *tensors: Tensor | None) -> Tensor:
        """Call PyTorch's function."""
        return self.kind.pytorch(*tensors, **self.settings)

    def run(self, path: str, *tensors: Tensor | None, activation: str | None = None) -> Tensor:
        """Call gconv's function on one of ``PATHS``."""
        return run(path, *tensors, kind=self.kind, activation=activation, **self.settings)


# "aten" and "reference" as users request them. "aten operators" are gconv's operators around PyTorch's
# passes, as they run if another backend runs only some of the passes.
PATHS = ("aten", "reference", "aten operators")


def run(
    path: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kind: Kind = CONV2D,
    activation: str | None = None,
    **settings: Any,
) -> Tensor:
    """Call gconv's function of a kind on one of ``PATHS``."""
    if path != "aten operators":
        return FUNCTIONS[kind](input, weight, bias, **settings, activation=activation, backend=path)
    dtype, call = call_of(kind, input, weight, bias, **settings)
    tensors = [None if t is None else t.to(dtype) for t in (input, weight, bias)]
    return functional._run_operators(call, *tensors, activation, None, "aten")


def call_of(
    kind: Kind, input: Tensor, weight: Tensor, bias: Tensor | None = None, **settings: Any
) -> tuple[torch.dtype, Call]:
    """Check the arguments of a convolution and return its dtype and call."""
    bound = inspect.signature(FUNCTIONS[kind]).bind(input, weight, bias, **settings)
    bound.apply_defaults()
    return prepare(kind, input, weight, bias, bound.args[3:])


def expected(
    case: Case, tensors: tuple[Tensor | None, ...], grad: Tensor, relu: bool = False
) -> list[Tensor]:
    """Return output and gradients of PyTorch's function in float64."""
    wide = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    output = case.pytorch(*wide)
    output = output.relu() if relu else output
    return [output.detach(), *torch.autograd.grad(output, [t for t in wide if t is not None], grad.double())]


def bounds(case: Case, truth: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the tolerance of each element of output and gradients, for data of standard deviation 1.

    The result is rounded to ``dtype`` once, with an error of half an epsilon times its size; one epsilon is
    allowed. Before that it is a sum of ``length`` products of standard deviation 1, computed in float32 or
    wider. Each partial sum, of size sqrt(length), is rounded, which adds up to at most ``length`` epsilons.
    The factor 6 covers draws several deviations from the mean.
    """
    (group_in, group_out), taps = case.channels_per_group, math.prod(case.weight[2:])
    pixels = max(truth[0].numel() // case.outputs, math.prod(case.input) // case.weight[0])
    held = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    narrow, wide = torch.finfo(dtype), torch.finfo(held)
    lengths = (group_in * taps, group_out * taps, pixels, pixels)
    return [
        narrow.eps * (t.abs() + narrow.tiny) + 6 * wide.eps * (n + math.sqrt(n))
        for t, n in zip(truth, lengths, strict=False)
    ]


def fenced(tensor: Tensor) -> Tensor:
    """Copy a tensor to a window inside NaN, with adjacent channels, so that reads outside it show."""
    wide = torch.full([size + 2 for size in tensor.shape], torch.nan, dtype=tensor.dtype)
    axis = min(1, tensor.ndim - 1)
    window = wide.movedim(axis, -1).contiguous().movedim(-1, axis)[(slice(1, -1),) * tensor.ndim]
    return window.copy_(tensor)


def compare(
    case: Case,
    path: str,
    dtype: torch.dtype,
    activation: str | None = None,
    device: str = "cpu",
    tensors: tuple[Tensor | None, ...] | None = None,
) -> Compared:
    """Return output and gradients of a case, with reference and bound, and check shapes and dtypes.

    Uses the tensors of the case, unless others of standard deviation 1 are passed.
    """
    drawn = case.tensors(dtype) if tensors is None else tensors
    tensors = [None if t is None else t.detach().to(device).requires_grad_() for t in drawn]
    output = case.run(path, *tensors, activation=activation)
    grad = torch.randn(output.shape, dtype=torch.float64, device=device).to(dtype)
    results = [output.detach(), *torch.autograd.grad(output, [t for t in tensors if t is not None], grad)]
    truth = expected(case, tuple(tensors), grad, relu=activation == "relu")
    for result, right in zip(results, truth, strict=True):
        assert result.dtype == dtype and result.shape == right.shape
    names = ("output", "input gradient", "weight gradient", "bias gradient")
    return dict(zip(names, zip(results, truth, bounds(case, truth, dtype), strict=False), strict=False))


def check(
    case: Case,
    path: str,
    dtype: torch.dtype,
    activation: str | None = None,
    device: str = "cpu",
    tensors: tuple[Tensor | None, ...] | None = None,
) -> None:
    """Check that output and gradients of a case are within the bounds that ``compare`` returns."""
    for name, (result, right, bound) in compare(case, path, dtype, activation, device, tensors).items():
        excess = (result.double() - right).abs() - bound
        assert (excess <= 0).all(), f"{name}: {excess.amax():.2e} more than the bound"


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


def _cases(kind: Kind, *cases: Case) -> list[Case]:
    return [replace(case, name=f"{kind}, {case.name}", kind=kind) for case in cases]


# The other kinds of convolution, with the edge cases of each.
OTHERS = [
    *_cases(
        CONV1D,
        Case("grouped", (2, 8, 9), (8, 2, 3), {"padding": 1, "groups": 4}),
        Case("depthwise, stride 2", (2, 6, 12), (6, 1, 5), {"padding": 2, "stride": 2, "groups": 6}),
        Case(
            "even kernel, same, dilated",
            (2, 6, 11),
            (6, 2, 4),
            {"padding": "same", "dilation": 2, "groups": 3},
        ),
        Case("valid", (1, 4, 7), (6, 2, 3), {"padding": "valid", "groups": 2}, bias=False),
        Case("no batch", (6, 9), (6, 2, 3), {"padding": (1,), "groups": 3}),
        Case("no sequences", (0, 6, 9), (6, 2, 3), {"groups": 3}),
        Case("one frame", (2, 4, 1), (4, 2, 1), {"groups": 2}),
        Case("kernel beyond the sequence", (1, 4, 3), (4, 1, 9), {"padding": 4, "groups": 4}),
        Case("dense", (2, 3, 8), (4, 3, 3), {}),
    ),
    *_cases(
        CONV3D,
        Case("depth 1", (2, 8, 3, 5, 4), (8, 2, 1, 3, 3), {"padding": (0, 1, 1), "groups": 4}),
        Case("depth 1, stride 2", (1, 8, 5, 5, 4), (8, 2, 1, 3, 3), {"stride": (2, 1, 2), "groups": 4}),
        Case(
            "depth 1, padded in depth", (1, 4, 3, 4, 4), (4, 2, 1, 2, 2), {"padding": (1, 0, 0), "groups": 2}
        ),
        Case("3x3x3", (2, 6, 4, 5, 4), (6, 2, 3, 3, 3), {"padding": 1, "groups": 3}),
        Case("depthwise", (1, 4, 5, 4, 6), (4, 1, 3, 3, 3), {"padding": 1, "stride": 2, "groups": 4}),
        Case(
            "same, even, dilated",
            (1, 4, 5, 4, 5),
            (4, 2, 2, 3, 2),
            {"padding": "same", "dilation": (3, 1, 2), "groups": 2},
        ),
        Case(
            "dilated, stride",
            (1, 4, 8, 6, 7),
            (6, 2, 2, 3, 2),
            {"dilation": (3, 2, 1), "stride": (2, 1, 3), "groups": 2},
        ),
        Case("no batch", (4, 3, 5, 4), (4, 2, 2, 3, 1), {"groups": 2}, bias=False),
        Case("no volumes", (0, 4, 3, 5, 4), (4, 2, 2, 3, 1), {"groups": 2}),
    ),
    *_cases(
        CONV_TRANSPOSE1D,
        Case("grouped, stride 2", (2, 8, 7), (8, 3, 4), {"stride": 2, "padding": 1, "groups": 4}),
        Case(
            "output padding",
            (2, 6, 5),
            (6, 1, 3),
            {"stride": 3, "padding": 1, "output_padding": 2, "groups": 6},
        ),
        Case("no batch", (4, 6), (4, 2, 3), {"groups": 2}, bias=False),
        Case(
            "frames beyond every input",
            (1, 4, 3),
            (4, 2, 2),
            {"dilation": 3, "output_padding": 2, "groups": 2},
        ),
    ),
    *_cases(
        CONV_TRANSPOSE2D,
        Case("2x2, stride 2", (2, 8, 4, 5), (8, 2, 2, 2), {"stride": 2, "groups": 4}),
        Case(
            "3x3, stride 2",
            (2, 8, 4, 5),
            (8, 2, 3, 3),
            {"stride": 2, "padding": 1, "output_padding": 1, "groups": 4},
        ),
        Case(
            "4x4, stride 2, depthwise", (1, 6, 5, 3), (6, 1, 4, 4), {"stride": 2, "padding": 1, "groups": 6}
        ),
        Case("stride 1", (2, 6, 5, 4), (6, 3, 3, 3), {"padding": 1, "groups": 3}),
        Case(
            "stride 3 by 2, dilated",
            (1, 6, 4, 5),
            (6, 2, 3, 2),
            {"stride": (3, 2), "dilation": (1, 2), "output_padding": (2, 1), "groups": 3},
        ),
        Case(
            "stride beyond the kernel",
            (1, 4, 3, 3),
            (4, 1, 2, 2),
            {"stride": 3, "output_padding": 1, "groups": 2},
        ),
        Case(
            "rows beyond every input",
            (1, 4, 3, 2),
            (4, 2, 2, 3),
            {"dilation": (4, 2), "stride": (2, 1), "output_padding": (3, 1), "groups": 2},
        ),
        Case(
            "rows beyond, padded",
            (1, 4, 3, 3),
            (4, 2, 3, 2),
            {"dilation": (4, 3), "output_padding": (3, 2), "padding": (1, 2), "groups": 2},
        ),
        Case("padding beyond the kernel", (1, 4, 6, 6), (4, 2, 1, 2), {"padding": 2, "groups": 2}),
        Case("no batch", (4, 3, 4), (4, 2, 3, 3), {"stride": 2, "groups": 2}),
        Case("no images", (0, 4, 3, 4), (4, 2, 3, 3), {"stride": 2, "groups": 2}),
        Case("dense", (2, 3, 4, 4), (3, 5, 3, 3), {"stride": 2}),
    ),
]
