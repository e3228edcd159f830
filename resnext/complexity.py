"""Parameters, FLOPs and memory traffic of a ResNeXt, counted on its modules.

FLOPs are counted as in the ResNeXt paper (arXiv 1611.05431): the multiply-adds of the convolutions and the
linear layer, one FLOP for each multiply-add. PyTorch's FLOP counter, which does the counting, counts two.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from resnext.model import Bottleneck, ResNeXt

# Table 2 of the paper: the width d for each cardinality C.
EQUAL_COMPLEXITY = {1: 64, 2: 40, 4: 24, 8: 14, 32: 4}
# Table 3 of the paper: ImageNet-1K top-1 errors of those networks in percent, at 50 and at 101 layers.
PAPER_ERRORS = {1: (23.9, 22.0), 2: (23.0, 21.7), 4: (22.6, 21.4), 8: (22.3, 21.3), 32: (22.2, 21.2)}


@dataclass(frozen=True)
class Stage:
    """A row of the structure table (table 1 of the paper).

    Attributes:
        name: "conv1" to "conv5", as in the paper, or "fc".
        output: size of the output for one image, (channels, height, width); (classes,) for "fc".
        layers: descriptions of the layers of one block, such as "3x3, 128, C=32".
        repeats: number of blocks.
        parameters: number of parameters.
        flops: multiply-adds for one image.
    """

    name: str
    output: tuple[int, ...]
    layers: tuple[str, ...]
    repeats: int
    parameters: int
    flops: int


def stages(model: ResNeXt, image_size: int | tuple[int, int] = 224) -> list[Stage]:
    """Return the structure table of a network: output size, parameters and FLOPs of each stage.

    Args:
        model: the network, which isn't changed: the counting runs on a copy on the meta device.
        image_size: height and width of the image, or one number for both. Defaults to 224.

    Returns:
        The stages in order, without empty ones.

    Raises:
        ValueError: ``image_size`` is below 1.
    """
    with FlopCounterMode(display=False) as counter:
        outputs = output_sizes(model, image_size)
    flops = {
        path.partition(".")[2]: sum(ops.values()) // 2 for path, ops in counter.get_flop_counts().items()
    }

    rows: list[tuple[str, tuple[str, ...], tuple[str, ...], int]] = [
        ("conv1", ("conv1", "bn1"), (_describe(model.conv1),), 1)
    ]
    for i, blocks in enumerate(model.stages, 1):
        if len(blocks):
            # The last block, since only the first one has a stride.
            layers = tuple(_describe(getattr(blocks[-1], f"conv{k}")) for k in (1, 2, 3))
            rows.append((f"conv{i + 1}", (f"layer{i}",), layers, len(blocks)))
    rows.append(("fc", ("fc",), ("global average pool", f"{model.fc.out_features}-d fc"), 1))
    return [
        Stage(
            name,
            outputs[modules[0]][1:],
            layers,
            repeats,
            sum(parameter_count(model.get_submodule(module)) for module in modules),
            sum(flops.get(module, 0) for module in modules),
        )
        for name, modules, layers, repeats in rows
    ]


def output_sizes(model: ResNeXt, image_size: int | tuple[int, int] = 224) -> dict[str, tuple[int, ...]]:
    """Return the output size of each module of a network for one image.

    Args:
        model: the network, which isn't changed.
        image_size: height and width of the image, or one number for both. Defaults to 224.

    Returns:
        Output sizes, (1, channels, height, width), by the qualified names of the modules.

    Raises:
        ValueError: ``image_size`` is below 1.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    model = copy.deepcopy(model).to("meta").eval()
    sizes = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _module, _input, output, name=name: sizes.update({name: tuple(output.shape)})
        )
    with torch.no_grad():
        model(torch.empty(1, model.conv1.in_channels, height, width, device="meta"))
    return sizes


@dataclass(frozen=True)
class Traffic:
    """Bytes of activations and of their gradients that are read and written for one image.

    Weights aren't counted, since the images of a batch share them.

    Attributes:
        read: bytes read.
        written: bytes written.
    """

    read: float = 0.0
    written: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.read + other.read, self.written + other.written)

    def __mul__(self, times: int) -> Traffic:
        return Traffic(times * self.read, times * self.written)

    @property
    def total(self) -> float:
        """Bytes read plus bytes written."""
        return self.read + self.written


@dataclass(frozen=True)
class StageTraffic:
    """Memory traffic of a stage, unfused (one PyTorch operator after the other) and fused.

    Attributes:
        name: "conv1" to "conv5", or "fc".
        inference: traffic of a forward pass in evaluation mode.
        fused_inference: the same after `gconv.fuse`.
        training: traffic of a forward and a backward pass in training mode.
        fused_training: the same with ``ResNeXt(..., fused=True)``.
    """

    name: str
    inference: Traffic
    fused_inference: Traffic
    training: Traffic
    fused_training: Traffic


def total_traffic(stages: Sequence[StageTraffic]) -> StageTraffic:
    """Return the sum of all stages as a stage named "total"."""
    forms = [field.name for field in fields(StageTraffic)[1:]]
    return StageTraffic("total", *(sum((getattr(s, form) for s in stages), Traffic()) for form in forms))


def traffic(model: ResNeXt, image_size: int | tuple[int, int] = 224, itemsize: int = 2) -> list[StageTraffic]:
    """Estimate the memory traffic of a network, stage by stage.

    The model assumes that each operator reads its inputs once and writes its outputs once, and that no cache
    keeps them for the next operator. In training, batch norm reads its input twice: for the statistics and to
    normalize. The bias that a folded batch norm leaves in a dense convolution is added in a separate pass, as
    PyTorch does with cuDNN.

    Args:
        model: the network, which isn't changed.
        image_size: height and width of the image, or one number for both. Defaults to 224.
        itemsize: bytes of an element. Defaults to 2, for 16-bit autocast.

    Returns:
        The traffic of each stage for one image, in order, without empty stages.

    Raises:
        ValueError: ``image_size`` is below 1.
    """
    size = {name: math.prod(shape) for name, shape in output_sizes(model, image_size).items()}
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    image, stem, pooled = model.conv1.in_channels * height * width, size["conv1"], size["maxpool"]
    indices = _INDEX_BYTES // itemsize * pooled if isinstance(model.maxpool, nn.MaxPool2d) else 0
    rows = {"conv1": [_stem(image, stem, pooled, indices, training) for training, _ in _MODES]}
    entering = pooled
    for i, stage in enumerate(model.stages, 1):
        totals = [Traffic()] * len(_MODES)
        for name, block in stage.named_children():
            z1, z2, y = (size[f"layer{i}.{name}.conv{k}"] for k in (1, 2, 3))
            projected = block.downsample is not None
            moved = (_block(entering, z1, z2, y, projected, training, fused) for training, fused in _MODES)
            totals = [total + block for total, block in zip(totals, moved, strict=True)]
            entering = y
        if len(stage):
            rows[f"conv{i + 1}"] = totals
    ends = Traffic(entering, size["avgpool"]), Traffic(entering + size["avgpool"], entering + size["avgpool"])
    rows["fc"] = [ends[training] for training, _ in _MODES]
    return [StageTraffic(name, *(moved * itemsize for moved in row)) for name, row in rows.items()]


_MODES = ((False, False), (False, True), (True, False), (True, True))  # training, fused
_INDEX_BYTES = 8  # max pooling writes the index of each maximum, in evaluation mode too


def _stem(image: int, y: int, pooled: int, indices: int, training: bool) -> Traffic:
    """Return the traffic of 7x7 convolution, batch norm, ReLU and max pool; the image needs no gradient."""
    moved = _conv(image, y, training, input_grad=False) + _norm(y, training) + _relu(y, training)
    if indices:
        moved += Traffic(y, pooled + indices)
    return moved + Traffic(pooled + indices, y) if training and indices else moved


def _block(x: int, z1: int, z2: int, y: int, projected: bool, training: bool, fused: bool) -> Traffic:
    """Return the traffic of a block: 1x1 from x to z1, 3x3 to z2, 1x1 to y, and the shortcut."""
    if not fused:
        middle = _norm(z1, training) + _relu(z1, training) + _conv(z1, z2, training)
        middle += _norm(z2, training) + _relu(z2, training)
    elif training:
        # The statistics of z1; the convolution; norm and ReLU of z2.
        middle = Traffic(z1, 0) + Traffic(z1, z2) + Traffic(z2, z2)
        # The sums of the second norm and its gradient; the input gradient of the convolution, which also
        # reads z1 for the ReLU and the sums of the first norm; the weight gradient; the gradient of the first
        # norm.
        middle += Traffic(2 * z2, 0) + Traffic(2 * z2, z2)
        middle += Traffic(z2 + z1, z1) + Traffic(z2 + z1, 0) + Traffic(2 * z1, z1)
    else:
        middle = _norm(z1, False) + _relu(z1, False) + Traffic(z1, z2)
    moved = _conv(x, z1, training) + middle + _conv(z2, y, training) + _norm(y, training)
    if projected:
        moved += _conv(x, y, training) + _norm(y, training)
    moved += Traffic(2 * y, y) + _relu(y, training)
    # The backward pass adds the gradients of branch and shortcut.
    return moved + Traffic(2 * x, x) if training else moved


def _conv(x: int, y: int, training: bool, input_grad: bool = True) -> Traffic:
    moved = Traffic(x, y)
    if training:
        moved += Traffic(x + y, 0) + (Traffic(y, x) if input_grad else Traffic())
    return moved


def _norm(y: int, training: bool) -> Traffic:
    """Return the traffic of a norm, or in evaluation of the bias that a folded norm leaves."""
    if not training:
        return Traffic(y, y)
    return Traffic(2 * y, y) + Traffic(2 * y, 0) + Traffic(2 * y, y)


def _relu(y: int, training: bool) -> Traffic:
    return Traffic(y, y) + (Traffic(2 * y, y) if training else Traffic())


def parameter_count(module: nn.Module) -> int:
    """Return the number of parameters of ``module``."""
    return sum(parameter.numel() for parameter in module.parameters())


def block_complexity(cardinality: int, width: int) -> tuple[int, int]:
    """Return the parameters and FLOPs of a conv2 block: 256 channels in and out, 56 x 56 pixels.

    The paper gives C (256 d + 9 d^2 + 256 d) parameters (equation 4, section 4.1); here they are counted on
    the block.

    Args:
        cardinality: number of groups, C.
        width: channels per group, d.

    Returns:
        The parameters of the convolutions, and their multiply-adds for one image.
    """
    with torch.device("meta"):
        block = Bottleneck(256, 256, cardinality, width)
        image = torch.empty(1, 256, 56, 56)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        block(image)
    parameters = sum(parameter_count(m) for m in block.modules() if isinstance(m, nn.Conv2d))
    return parameters, counter.get_total_flops() // 2


def matching_width(cardinality: int) -> int:
    """Return the width d at which a conv2 block of the given cardinality is as complex as a 32 x 4d block.

    This is the positive root d of C (512 d + 9 d^2) = parameters of a 32 x 4d block, rounded.

    Args:
        cardinality: number of groups, C, from 1 to 134.

    Raises:
        ValueError: ``cardinality`` is below 1, or so high that even d = 1 makes a more complex block.
    """
    budget, _ = block_complexity(32, 4)
    narrowest, _ = block_complexity(1, 1)
    if not 1 <= cardinality <= budget // narrowest:
        raise ValueError(f"cardinality must be from 1 to {budget // narrowest}, got {cardinality}")
    return max(1, round((-512 + (512**2 + 36 * budget / cardinality) ** 0.5) / 18))


def _describe(conv: nn.Conv2d) -> str:
    """Return a description such as "7x7, 64, stride 2", or "3x3, 128, C=32"."""
    parts = ["x".join(map(str, conv.kernel_size)), str(conv.out_channels)]
    if conv.groups > 1:
        parts.append(f"C={conv.groups}")
    if conv.stride != (1, 1):
        parts.append(f"stride {conv.stride[0]}")
    return ", ".join(parts)
