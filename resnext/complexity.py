"""Parameters and FLOPs, counted on the modules themselves.

FLOPs here are those of the paper (arXiv 1611.05431): multiply-adds, one for each pair, of the convolutions
and the linear layer. PyTorch's counter, which does the counting, counts two.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from resnext.model import Bottleneck, ResNeXt

# Table 2 of the paper: the width d at each cardinality C.
EQUAL_COMPLEXITY = {1: 64, 2: 40, 4: 24, 8: 14, 32: 4}
# Table 3 of the paper: ImageNet-1K top-1 errors of those networks in percent, at 50 and at 101 layers.
PAPER_ERRORS = {1: (23.9, 22.0), 2: (23.0, 21.7), 4: (22.6, 21.4), 8: (22.3, 21.3), 32: (22.2, 21.2)}


@dataclass(frozen=True)
class Stage:
    """One row of the paper's structure table.

    Attributes:
        name: "conv1" to "conv5", as the paper calls the stages, then "fc".
        output: (channels, height, width) that the stage puts out.
        layers: the convolutions of one block, or whatever it is made of, in words.
        repeats: blocks.
        parameters: learned numbers.
        flops: multiply-adds for one image.
    """

    name: str
    output: tuple[int, ...]
    layers: tuple[str, ...]
    repeats: int
    parameters: int
    flops: int


def stages(model: ResNeXt, image_size: int | tuple[int, int] = 224) -> list[Stage]:
    """The structure table of ``model``: what each stage puts out, holds and computes for one image.

    Args:
        model: left as it is; the counting runs on a copy without data.
        image_size: height and width, or one number for both.

    Raises:
        ValueError: ``image_size`` is below 1.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    model = copy.deepcopy(model).to("meta").eval()
    outputs = {}
    for name, module in model.named_children():
        module.register_forward_hook(
            lambda _module, _input, output, name=name: outputs.update({name: output})
        )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, model.conv1.in_channels, height, width, device="meta"))
    flops = {
        path.partition(".")[2]: sum(ops.values()) // 2 for path, ops in counter.get_flop_counts().items()
    }

    rows = [("conv1", ("conv1", "bn1"), (_describe(model.conv1),), 1)]
    for i in range(1, 5):
        blocks = model.get_submodule(f"layer{i}")
        if len(blocks):
            # The last block: the first has the stride, the others have not.
            layers = tuple(_describe(conv) for conv in (blocks[-1].conv1, blocks[-1].conv2, blocks[-1].conv3))
            rows.append((f"conv{i + 1}", (f"layer{i}",), layers, len(blocks)))
    rows.append(("fc", ("fc",), ("global average pool", f"{model.fc.out_features}-d fc"), 1))
    return [
        Stage(
            name,
            tuple(outputs[modules[0]].shape[1:]),
            layers,
            repeats,
            sum(parameter_count(model.get_submodule(module)) for module in modules),
            sum(flops.get(module, 0) for module in modules),
        )
        for name, modules, layers, repeats in rows
    ]


def parameter_count(module: nn.Module) -> int:
    """Learned numbers of ``module``."""
    return sum(parameter.numel() for parameter in module.parameters())


def block_complexity(cardinality: int, width: int) -> tuple[int, int]:
    """Parameters and multiply-adds of a conv2 block's convolutions: 256 channels in and out, 56 x 56 pixels.

    C (256 d + 9 d^2 + 256 d) parameters in the paper, section 4.1; counted here on the block itself.
    """
    with torch.device("meta"):
        block = Bottleneck(256, 256, cardinality, width)
        image = torch.empty(1, 256, 56, 56)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        block(image)
    parameters = sum(parameter_count(m) for m in block.modules() if isinstance(m, nn.Conv2d))
    return parameters, counter.get_total_flops() // 2


def matching_width(cardinality: int) -> int:
    """The width d at which a conv2 block of ``cardinality`` C is as complex as ResNeXt's 32 x 4d.

    The positive root of C (512 d + 9 d^2) = parameters of 32 x 4d, rounded.

    Raises:
        ValueError: ``cardinality`` is below 1, or so high that even d = 1 is more complex.
    """
    budget, _ = block_complexity(32, 4)
    narrowest, _ = block_complexity(1, 1)
    if not 1 <= cardinality <= budget // narrowest:
        raise ValueError(f"cardinality must be from 1 to {budget // narrowest}, got {cardinality}")
    return max(1, round((-512 + (512**2 + 36 * budget / cardinality) ** 0.5) / 18))


def _describe(conv: nn.Conv2d) -> str:
    """Such as "7x7, 64, stride 2", or "3x3, 128, C=32"."""
    parts = ["x".join(map(str, conv.kernel_size)), str(conv.out_channels)]
    if conv.groups > 1:
        parts.append(f"C={conv.groups}")
    if conv.stride != (1, 1):
        parts.append(f"stride {conv.stride[0]}")
    return ", ".join(parts)
