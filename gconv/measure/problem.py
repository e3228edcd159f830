"""One pass of one convolution as something to measure: operands, PyTorch's way, ours, and the truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from gconv import aten
from gconv.geometry import ConvGeometry
from gconv.measure.timing import sets_of_operands

# Types by name: what tensors are made of, and how a GPU multiplies float32.
TYPES = {
    "float16": (torch.float16, "ieee"),
    "bfloat16": (torch.bfloat16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "float32": (torch.float32, "ieee"),
}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
# How far a right result may be from float64, as a part of the largest number: some roundings of its type.
# One wrong pixel is further away, and so is TF32 where float32 was asked for.
TOLERANCES = {"float16": 1e-3, "bfloat16": 8e-3, "tf32": 2e-3, "float32": 1e-4}
IMAGES_COMPARED = 8  # of a batch; a weight gradient is compared whole


@contextmanager
def cudnn_precision(precision: str) -> Iterator[None]:
    """Multiply float32 in cuDNN and in the kernels as "tf32" or in full, "ieee"; for the whole process.

    Uses the older of PyTorch's two settings, which covers convolutions and recurrent layers alike: where they
    differ, torch.compile and torch.export raise.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    torch._C._set_cudnn_allow_tf32(precision == "tf32")
    try:
        yield
    finally:
        torch._C._set_cudnn_allow_tf32(before[0] == "tf32")
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before


class Operands(NamedTuple):
    """x (N, C, H, W), weight (K, C / groups, R, S) and dy (N, K, P, Q); a pass takes two of them."""

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
        """Of the tensors."""
        return TYPES[self.type][0]

    @property
    def bytes(self) -> int:
        """Bytes that the pass cannot avoid moving."""
        return self.geometry.compulsory_bytes(self.dtype.itemsize)

    def precision(self) -> AbstractContextManager[None]:
        """Multiply float32 inside as ``type`` says; tensors of 16 bits need nothing."""
        return nullcontext() if self.dtype != torch.float32 else cudnn_precision(TYPES[self.type][1])

    def draw(self, device: torch.device, layout: str = "channels_last") -> Operands:
        """Normally distributed operands in a layout of ``LAYOUTS``."""
        sizes = (self.geometry.input_size, self.geometry.weight_size, self.geometry.output_size)
        tensors = (torch.randn(size, dtype=self.dtype, device=device) for size in sizes)
        return Operands(*(t.contiguous(memory_format=LAYOUTS[layout]) for t in tensors))

    def draw_sets(self, device: torch.device, layout: str = "channels_last") -> list[Operands]:
        """As many sets of operands as it takes that a GPU's cache holds none of them."""
        return [self.draw(device, layout) for _ in range(sets_of_operands(self.bytes, device))]

    def run(self, operands: Operands, backend: str = "auto") -> Tensor:
        """The pass on a backend of ours, through its operator."""
        x, w, dy = operands
        if self.pass_ == "forward":
            return torch.ops.gconv.forward(x, w, None, *self.geometry.settings, None, None, backend)
        if self.pass_ == "input_grad":
            return torch.ops.gconv.input_grad(dy, w, x.shape, *self.geometry.settings, backend)
        return torch.ops.gconv.weight_grad(dy, x, w.shape, *self.geometry.settings, False, backend)[0]

    def run_pytorch(self, operands: Operands) -> Tensor:
        """The pass as ``F.conv2d`` and its gradient run it."""
        (x, w, dy), g = operands, self.geometry
        if self.pass_ == "forward":
            return aten.forward(x, w, None, g, None)
        if self.pass_ == "weight_grad":
            return aten.weight_grad(dy, x, g, False)[0]
        if g.padding.top != g.padding.bottom or g.padding.left != g.padding.right:
            return aten.input_grad(dy, w, g)
        padding, mask = (g.padding.top, g.padding.left), [True, False, False]
        return torch.ops.aten.convolution_backward(
            dy, x, w, None, g.stride, padding, g.dilation, False, [0, 0], g.groups, mask
        )[0]

    def truth(self, operands: Operands) -> Tensor:
        """The result in float64, by PyTorch: of every image for the weight gradient, else of some."""
        if self.pass_ != "weight_grad":
            return self._exactly(operands, slice(None, None, self._step))
        n = len(operands.x)
        return sum(
            self._exactly(operands, slice(i, i + IMAGES_COMPARED)) for i in range(0, n, IMAGES_COMPARED)
        )

    def error(self, result: Tensor, truth: Tensor) -> float:
        """The largest difference, as a part of the largest number; NaN where the result holds one."""
        part = result if self.pass_ == "weight_grad" else result[:: self._step]
        return ((part.double() - truth).abs().max() / truth.abs().max()).item()

    def matches(self, error: float) -> bool:
        """Whether an ``error`` is that of a right result. NaN is not."""
        return error <= TOLERANCES[self.type]

    @property
    def _step(self) -> int:
        return -(-self.geometry.input_size[0] // IMAGES_COMPARED)

    def _exactly(self, operands: Operands, images: slice) -> Tensor:
        x, w, dy = (
            t.double().contiguous() for t in (operands.x[images], operands.weight, operands.dy[images])
        )
        exact = replace(self, geometry=replace(self.geometry, input_size=tuple(x.shape)))
        return exact.run_pytorch(Operands(x, w, dy))


def run_poisoned(run: Callable[[Operands], Tensor], operands: Operands) -> Tensor:
    """A result whose memory most likely held NaN before: what is not written shows."""
    size = run(operands).shape
    torch.full(size, torch.nan, dtype=operands.x.dtype, device=operands.x.device)  # freed at once
    return run(operands)
