"""One pass of one convolution to measure: its operands, PyTorch's result, gconv's, and the exact one."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gconv import aten
from gconv.geometry import ConvGeometry
from gconv.measure.timing import sets_of_operands
from gconv.namespace import registered
from gconv.torch_internals import set_cudnn_tf32

# The dtype of the tensors by name, and how a GPU multiplies float32.
TYPES = {
    "float16": (torch.float16, "ieee"),
    "bfloat16": (torch.bfloat16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "float32": (torch.float32, "ieee"),
}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
# The largest error of a right result, relative to the largest number in float64: a few roundings of its type.
# One wrong pixel exceeds it, and so does TF32 where float32 was asked for.
TOLERANCES = {"float16": 1e-3, "bfloat16": 8e-3, "tf32": 2e-3, "float32": 1e-4}
IMAGES_COMPARED = 8  # of a batch; a weight gradient is compared as a whole


@contextmanager
def cudnn_precision(precision: str) -> Iterator[None]:
    """Multiply float32 in cuDNN and in the kernels as "tf32" or "ieee", in the whole process.

    Uses the older of PyTorch's two settings, which covers convolutions and recurrent layers alike:
    torch.compile and torch.export raise if these differ.
    """
    cudnn: Any = torch.backends.cudnn  # PyTorch's annotations leave out its settings by kind of layer
    before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    set_cudnn_tf32(precision == "tf32")
    try:
        yield
    finally:
        set_cudnn_tf32(before[0] == "tf32")
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before


class Operands(NamedTuple):
    """x (N, C, H, W), weight (K, C / groups, R, S) and dy (N, K, P, Q); a pass reads two of them."""

    x: Tensor
    weight: Tensor
    dy: Tensor


@dataclass(frozen=True, slots=True)
class Problem:
    """One pass of one convolution in one type.

    Args:
        pass_: "forward", "input_grad" or "weight_grad".
        geometry: the sizes.
        type: a key of ``TYPES``.
    """

    pass_: str
    geometry: ConvGeometry
    type: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tensors."""
        return TYPES[self.type][0]

    @property
    def bytes(self) -> int:
        """Bytes that the pass cannot avoid moving."""
        return self.geometry.compulsory_bytes(self.dtype.itemsize)

    def precision(self) -> AbstractContextManager[None]:
        """Return a context that multiplies float32 as ``type`` says; 16-bit types need none."""
        return nullcontext() if self.dtype != torch.float32 else cudnn_precision(TYPES[self.type][1])

    def draw(self, device: torch.device, layout: str = "channels_last") -> Operands:
        """Return normally distributed operands in a layout of ``LAYOUTS``."""
        sizes = (self.geometry.input_size, self.geometry.weight_size, self.geometry.output_size)
        tensors = (torch.randn(size, dtype=self.dtype, device=device) for size in sizes)
        return Operands(*(t.contiguous(memory_format=LAYOUTS[layout]) for t in tensors))

    def draw_sets(self, device: torch.device, layout: str = "channels_last") -> list[Operands]:
        """Return so many sets of operands that a GPU's cache holds none of them."""
        return [self.draw(device, layout) for _ in range(sets_of_operands(self.bytes, device))]

    def run(self, operands: Operands, backend: str = "auto") -> Tensor:
        """Run the pass on a backend of gconv, through its operator."""
        x, w, dy = operands
        if self.pass_ == "forward":
            return registered.forward(x, w, None, *self.geometry.settings, None, None, backend)
        if self.pass_ == "input_grad":
            return registered.input_grad(dy, w, None, x.shape, *self.geometry.settings, None, None, backend)
        return registered.weight_grad(dy, x, w.shape, *self.geometry.settings, False, backend)[0]

    def run_pytorch(self, operands: Operands) -> Tensor:
        """Run the pass as ``F.conv2d`` and its gradient do."""
        (x, w, dy), g = operands, self.geometry
        if self.pass_ == "forward":
            return aten.forward(x, w, None, g, None)
        if self.pass_ == "weight_grad":
            return aten.weight_grad(dy, x, g, False)[0]
        if g.padding.top != g.padding.bottom or g.padding.left != g.padding.right:
            return aten.input_grad(dy, w, None, g)
        padding, mask = (g.padding.top, g.padding.left), [True, False, False]
        return torch.ops.aten.convolution_backward(
            dy, x, w, None, g.stride, padding, g.dilation, False, [0, 0], g.groups, mask
        )[0]

    def truth(self, operands: Operands) -> Tensor:
        """Compute the result in float64 by PyTorch: whole for the weight gradient, else for some images."""
        if self.pass_ != "weight_grad":
            return self._exactly(operands, slice(None, None, self._step))
        starts = range(0, len(operands.x), IMAGES_COMPARED)
        parts = (self._exactly(operands, slice(start, start + IMAGES_COMPARED)) for start in starts)
        return reduce(operator.add, parts)

    def error(self, result: Tensor, truth: Tensor) -> float:
        """Return the largest difference over the largest number; NaN if the result holds NaN."""
        part = result if self.pass_ == "weight_grad" else result[:: self._step]
        return ((part.double() - truth).abs().max() / truth.abs().max()).item()

    def matches(self, error: float) -> bool:
        """Whether an ``error`` is small enough for a right result; NaN is not."""
        return error <= TOLERANCES[self.type]

    @property
    def _step(self) -> int:
        return -(-self.geometry.input_size[0] // IMAGES_COMPARED)

    def _exactly(self, operands: Operands, images: slice) -> Tensor:
        parts = (operands.x[images], operands.weight, operands.dy[images])
        exact = Operands(*(part.double().contiguous() for part in parts))
        n, c, h, w = exact.x.shape
        geometry = replace(self.geometry, input_size=(n, c, h, w))
        return replace(self, geometry=geometry).run_pytorch(exact)


def run_poisoned(run: Callable[[Operands], Tensor], operands: Operands) -> Tensor:
    """Compute a result in memory that most likely held NaN before, so that unwritten numbers show."""
    size = run(operands).shape
    torch.full(size, torch.nan, dtype=operands.x.dtype, device=operands.x.device)  # freed at once
    return run(operands)
