"""The convolutions that gconv supports, and how a 2-d convolution computes each of them.

The backends only have 2-d convolutions. The others are turned into one:

- 1-d: (N, C, L) becomes (N, C, 1, L), an image of one row. This is a view.
- Transposed: the forward pass is the input gradient of a convolution. The gradients are then the forward pass
  and the weight gradient of that convolution.
- 3-d: slices become images, (N D, C, H, W), and taps in depth become channels: see ``Depth``. With one
  tap nothing is copied if the tensor is in channels_last_3d and all slices are used. With T taps the input is
  copied T times.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gconv.geometry import PASSES, ConvGeometry, kernel_in_words, steps_in_words
from gconv.torch_internals import suggest_memory_format, transforms_active


class Kind:
    """One of PyTorch's convolution functions.

    Args:
        dims: number of spatial dimensions, 1, 2 or 3.
        transposed: whether it is a transposed convolution. Defaults to False.

    Attributes:
        name: name of the function, such as "conv_transpose2d".
        pytorch: the function in ``torch.nn.functional``.
        layer: the module in ``torch.nn``.
        lazy: the lazy module in ``torch.nn``, which takes the number of input channels from its first input.
        sizes: the axes of an input without batch, such as "C, H, W".
        taps: the axes of a kernel, such as "R, S".
    """

    def __init__(self, dims: int, transposed: bool = False) -> None:
        self.dims, self.transposed = dims, transposed
        self.name = f"conv{'_transpose' if transposed else ''}{dims}d"
        layer = f"Conv{'Transpose' if transposed else ''}{dims}d"
        self.pytorch: Callable[..., Tensor] = getattr(F, self.name)
        self.layer: type[nn.Module] = getattr(nn, layer)
        self.lazy: type[nn.Module] = getattr(nn, f"Lazy{layer}")
        self.sizes = {1: "C, L", 2: "C, H, W", 3: "C, D, H, W"}[dims]
        self.taps = {1: "S", 2: "R, S", 3: "T, R, S"}[dims]

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> str:
        """Pickle and copy a kind by the name of its constant below."""
        return self.name.upper()

    def pass_of_geometry(self, pass_: str) -> str:
        """Return which pass of the 2-d geometry computes a pass of this convolution, or vice versa."""
        swapped = {"forward": "input_grad", "input_grad": "forward"}
        return swapped.get(pass_, pass_) if self.transposed else pass_

    def settings_of(self, layer: Any) -> tuple[Any, ...]:
        """Return the settings of a layer, in the order of the arguments of ``pytorch`` after the bias."""
        if self.transposed:
            return layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
        return layer.stride, layer.padding, layer.dilation, layer.groups


CONV1D, CONV2D, CONV3D = Kind(1), Kind(2), Kind(3)
CONV_TRANSPOSE1D, CONV_TRANSPOSE2D = Kind(1, transposed=True), Kind(2, transposed=True)
KINDS = (CONV1D, CONV2D, CONV3D, CONV_TRANSPOSE1D, CONV_TRANSPOSE2D)


def kind_of(layer: nn.Module | type[nn.Module] | None) -> Kind | None:
    """Return the kind of a layer or of a class of layers, or None if gconv doesn't support it."""
    cls = layer if isinstance(layer, type) else type(layer)
    return next((kind for kind in KINDS if issubclass(cls, kind.layer)), None)


class Depth(NamedTuple):
    """The settings of a 3-d convolution along its depth.

    Args:
        slices: number of output slices, D'.
        taps, stride, dilation: of the kernel, in depth.
        before, after: slices of zeros to pad with.
    """

    slices: int
    taps: int
    stride: int
    dilation: int
    before: int
    after: int

    @property
    def folds(self) -> bool:
        """Whether the slices of the input can be the images, without a copy."""
        return self.taps == self.stride == 1 and self.before == self.after == 0

    def fold(self, input: Tensor) -> Tensor:
        """Turn slices into images and taps into channels: (N, C, D, H, W) -> (N D', C T, H, W).

        Channel c T + t of image d is channel c of input slice d stride + t dilation - before.
        """
        if self.before or self.after:
            input = F.pad(input, (0, 0, 0, 0, self.before, self.after))
        reach = self.stride * (self.slices - 1) + 1
        starts = range(0, self.taps * self.dilation, self.dilation)
        slices = [input[:, :, start : start + reach : self.stride].transpose(1, 2) for start in starts]
        images = slices[0] if self.taps == 1 else torch.stack(slices, dim=3).flatten(2, 3)
        return images.flatten(0, 1)

    def unfold(self, output: Tensor) -> Tensor:
        """Turn images back into slices: (N D', K, P, Q) -> (N, K, D', P, Q)."""
        return output.unflatten(0, (-1, self.slices)).transpose(1, 2)


class Call(NamedTuple):
    """A convolution whose arguments passed the checks.

    Args:
        kind: which function was called.
        settings: the arguments of ``kind.pytorch`` after the bias, as plain numbers.
        input_size, weight_size, output_size: sizes of the call, with a batch if the input has one.
        geometry: the 2-d convolution that computes it; its input gradient, if transposed.
        depth: settings along the depth of a 3-d convolution. Defaults to None, for the other kinds.
        beyond: rows and columns at the end of a transposed convolution's output that no input reaches.
        adds_gradients: whether a gradient is a sum of several results, each of which would be rounded to 16
            bits.
    """

    kind: Kind
    settings: tuple[Any, ...]
    input_size: tuple[int, ...]
    weight_size: tuple[int, ...]
    output_size: tuple[int, ...]
    geometry: ConvGeometry
    depth: Depth | None = None
    beyond: tuple[int, int] = (0, 0)
    adds_gradients: bool = False

    @property
    def passes(self) -> tuple[str, ...]:
        """The passes of the geometry that the call may need, including gradients if they are enabled."""
        passes = PASSES if torch.is_grad_enabled() else PASSES[:1]
        return tuple(map(self.kind.pass_of_geometry, passes))

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self.geometry.groups

    @property
    def channels_per_group(self) -> tuple[int, int]:
        """Input and output channels of one group."""
        axis = -self.kind.dims - 1
        return self.input_size[axis] // self.groups, self.output_size[axis] // self.groups

    def compulsory_bytes(self, itemsize: int) -> int:
        """Return the bytes that a pass must move: input, weight and output once each."""
        sizes = (self.input_size, self.weight_size, self.output_size)
        return itemsize * sum(math.prod(size) for size in sizes)

    def __str__(self) -> str:
        """Describe the sizes, such as "8 x 512/512 x 1500 -> 512, kernel 31": N x C/groups x L -> K, S."""
        axis = -self.kind.dims - 1
        batch, (c, *lengths) = self.input_size[:axis], self.input_size[axis:]
        groups = f"/{self.groups}" if self.groups > 1 else ""
        size = " x ".join(map(str, [*batch, f"{c}{groups}", *lengths]))
        stride, dilation = self.settings[0], self.settings[4 if self.kind.transposed else 2]
        words = [kernel_in_words(self.weight_size[2:]), *steps_in_words(stride, dilation)]
        words += ["transposed"] * self.kind.transposed
        return ", ".join([f"{size} -> {self.output_size[axis]}", *words])

    def as_images(self, input: Tensor) -> Tensor:
        """Return an input or output, with or without a batch, as a batch of images."""
        batch = input if input.ndim == self.kind.dims + 2 else input.unsqueeze(0)
        if self.kind.dims == 1:
            return batch.unsqueeze(2)
        return batch if self.depth is None else self.depth.fold(batch)

    def as_kernel(self, weight: Tensor) -> Tensor:
        """Return the weight of the 2-d convolution."""
        if self.kind.dims == 1:
            return weight.unsqueeze(2)
        return weight if self.depth is None else weight.flatten(1, 2)

    def as_output(self, images: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        """Return output images in the shape of the result, with a batch if ``input`` has one."""
        if self.kind.dims == 1:
            images = images.squeeze(2)
        elif self.depth is not None:
            images = self.depth.unfold(images).contiguous(memory_format=_layout_of_volumes(input, weight))
        return images if input.ndim == self.kind.dims + 2 else images.squeeze(0)


def conv2d_call(geometry: ConvGeometry) -> Call:
    """Return the call of a 2-d convolution with this geometry."""
    top, bottom, left, right = geometry.padding
    padding = (top, left) if (top, left) == (bottom, right) else "same"
    settings = (geometry.stride, padding, geometry.dilation, geometry.groups)
    sizes = (geometry.input_size, geometry.weight_size, geometry.output_size)
    return Call(CONV2D, settings, *sizes, geometry)


def _layout_of_volumes(input: Tensor, weight: Tensor) -> torch.memory_format:
    """Return the layout of the result of a 3-d convolution, with the rule of ``F.conv3d``."""
    if not torch.compiler.is_compiling() and transforms_active():
        return torch.contiguous_format  # the only one that vmap supports
    batch = input if input.ndim == 5 else input.unsqueeze(0)
    either = is_channels_last(batch) or is_channels_last(weight)
    return torch.channels_last_3d if either else torch.contiguous_format


def is_channels_last(tensor: Tensor) -> bool:
    """Return whether PyTorch's ``suggest_memory_format`` considers images or volumes channels_last.

    That function takes 8 us, so unambiguous strides are checked first.
    """
    layout = torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d
    channels_last = tensor.is_contiguous(memory_format=layout)
    if channels_last != tensor.is_contiguous():
        return channels_last
    return suggest_memory_format(tensor) == layout


def layout_of(tensor: Tensor, dims: int = 2) -> str:
    """Return "channels_last" if the channels are adjacent in memory, otherwise "contiguous".

    Args:
        tensor: (N, C, ...) or (C, ...).
        dims: number of spatial dimensions.
    """
    return "channels_last" if tensor.stride(-dims - 1) == 1 else "contiguous"
