"""One pass of one convolution to measure: its operands, PyTorch's and gconv's result, and a reference."""

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

# By name: the dtype of the tensors, and how a GPU multiplies float32.
TYPES = {
    "float16": (torch.float16, "ieee"),
    "bfloat16": (torch.bfloat16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "float32": (torch.float32, "ieee"),
}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
# The largest error that a right result may have, relative to the largest value of the float64 reference: a
# few roundings of the type. One wrong pixel exceeds it, and so does TF32 in place of float32.
TOLERANCES = {"float16": 1e-3, "bfloat16": 8e-3, "tf32": 2e-3, "float32": 1e-4}
IMAGES_COMPARED = 8  # images of a batch that are compared; weight gradients are compared in full


@contextmanager
def cudnn_precision(precision: str) -> Iterator[None]:
    """Set how cuDNN and the kernels multiply float32 in this process, "tf32" or "ieee", and restore it after.

    Uses the older of PyTorch's two settings, because it covers both convolutions and recurrent layers:
    torch.compile and torch.export raise an error if the two kinds of layers differ.
    """
    cudnn: Any = torch.backends.cudnn  # PyTorch's annotations lack the settings for each kind of layer
    before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    set_cudnn_tf32(precision == "tf32")
    try:
        yield
    finally:
        set_cudnn_tf32(before[0] == "tf32")
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before


class Operands(NamedTuple):
    """The tensors of a problem, of which each pass reads two.

    Attributes:
        x: input, (N, C, H, W).
        weight: weight, (K, C / groups, R, S).
        dy: gradient of the output, (N, K, P, Q).
    """

    x: Tensor
    weight: Tensor
    dy: Tensor


@dataclass(frozen=True, slots=True)
class Problem:
    """One pass of one convolution in one type.

    Args:
        pass_: "forward", "input_grad" or "weight_grad".
        geometry: the convolution's sizes and settings.
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
        """Compulsory bytes: those that the pass can't avoid moving."""
        return self.geometry.compulsory_bytes(self.dtype.itemsize)

    def precision(self) -> AbstractContextManager[None]:
        """Return a context in which float32 is multiplied as ``type`` says; it does nothing for 16 bits."""
        return nullcontext() if self.dtype != torch.float32 else cudnn_precision(TYPES[self.type][1])

    def draw(self, device: torch.device, layout: str = "channels_last") -> Operands:
        """Return normally distributed operands. ``layout`` is a key of ``LAYOUTS``."""
        sizes = (self.geometry.input_size, self.geometry.weight_size, self.geometry.output_size)
        tensors = (torch.randn(size, dtype=self.dtype, device=device) for size in sizes)
        return Operands(*(t.contiguous(memory_format=LAYOUTS[layout]) for t in tensors))

    def draw_sets(self, device: torch.device, layout: str = "channels_last") -> list[Operands]:
        """Return enough sets of operands that none of them stays in the GPU's cache when used in turn."""
        return [self.draw(device, layout) for _ in range(sets_of_operands(self.bytes, device))]

    def run(self, operands: Operands, backend: str = "auto") -> Tensor:
        """Run the pass on a backend of gconv, through gconv's operator."""
        x, w, dy = operands
        if self.pass_ == "forward":
            return registered.forward(x, w, None, *self.geometry.settings, None, None, backend)
        if self.pass_ == "input_grad":
            return registered.input_grad(dy, w, None, x.shape, *self.geometry.settings, None, None, backend)
        return registered.weight_grad(dy, x, w.shape, *self.geometry.settings, False, backend)[0]

    def run_pytorch(self, operands: Operands) -> Tensor:
        """Run the pass on PyTorch's convolution, as ``F.conv2d`` and its gradients do."""
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
        """Return the reference: PyTorch's result in float64.

        For the forward pass and the input gradient, only ``IMAGES_COMPARED`` images of the batch or fewer.
        """
        if self.pass_ != "weight_grad":
            return self._exactly(operands, slice(None, None, self._step))
        starts = range(0, len(operands.x), IMAGES_COMPARED)
        parts = (self._exactly(operands, slice(start, start + IMAGES_COMPARED)) for start in starts)
        return reduce(operator.add, parts)

    def error(self, result: Tensor, truth: Tensor) -> float:
        """Return the largest difference, relative to the largest value of ``truth``; NaN if any is NaN."""
        part = result if self.pass_ == "weight_grad" else result[:: self._step]
        return ((part.double() - truth).abs().max() / truth.abs().max()).item()

    def matches(self, error: float) -> bool:
        """Whether ``error`` is small enough for a right result. False for NaN."""
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
    """Compute a result in memory that most likely contained NaN before, to reveal elements never written."""
    size = run(operands).shape
    torch.full(size, torch.nan, dtype=operands.x.dtype, device=operands.x.device)  # freed immediately
    return run(operands)
