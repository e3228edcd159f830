"""The ResNeXt model family.

Source: Xie, Girshick, Dollar, Tu, He, "Aggregated Residual Transformations for Deep Neural Networks", arXiv
1611.05431. Modules have the names that torchvision and timm use, so state dicts load in all three without
changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gconv import GroupConv2d, conv_between_norms
from resnext.weights import Weights, fit, number_of_classes, read_weights

STEMS = ("imagenet", "small")


class Bottleneck(nn.Module):
    """The ResNeXt block: 1x1, grouped 3x3 and 1x1 convolution, each with batch norm, and a shortcut.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        cardinality: number of groups of the 3x3 convolution, C in the paper.
        group_width: channels per group, d in the paper.
        stride: stride of the 3x3 convolution and of the shortcut. Defaults to 1.
        fused: whether to run the batch norms around the 3x3 convolution inside its kernels, where
            `gconv.conv_between_norms` supports it: the same results with less memory traffic. Not if `relu`
            is replaced by another activation. Defaults to False.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        cardinality: int,
        group_width: int,
        stride: int = 1,
        *,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.fused = fused
        width = cardinality * group_width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = GroupConv2d(width, width, 3, stride, padding=1, groups=cardinality, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride), rounded up."""
        out = self.conv1(x)
        if self.fused and type(self.relu) is nn.ReLU:
            out = conv_between_norms(out, self.bn1, self.conv2, self.bn2)
        else:
            out = self.relu(self.bn2(self.conv2(self.relu(self.bn1(out)))))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """Return a projection if a block changes the shape of its input, or None for the identity."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class ResNeXt(nn.Module):
    """A ResNeXt: a stem, four stages of `Bottleneck` blocks, global average pooling and a linear layer.

    Args:
        repeats: number of blocks in each of the four stages, such as (3, 4, 6, 3). Trailing stages can be
            empty: the three-stage networks for CIFAR have (3, 3, 3, 0).
        cardinality: number of groups of each 3x3 convolution. Defaults to 32.
        base_width: channels per group in the first stage; each later stage doubles it. Defaults to 4.
        num_classes: number of outputs of the linear layer. Defaults to 1000.
        in_channels: number of channels of the images. Defaults to 3.
        stem: "imagenet", a 7x7 convolution and a 3x3 max pool, each with stride 2, or "small", a 3x3
            convolution for images of about 32 pixels. Defaults to "imagenet".
        stem_width: number of channels of the stem. The stages have 4, 8, 16 and 32 times as many output
            channels. Defaults to 64.
        zero_init_residual: whether to initialize the scale of each block's last batch norm to zero, so that
            the block starts as its shortcut. Defaults to False.
        fused: whether to run the batch norms around each 3x3 convolution inside its kernels, in training and
            evaluation. The network and its state dict stay the same. For inference only, `gconv.fuse` saves
            more. Defaults to False.

    Raises:
        ValueError: ``repeats`` doesn't have four entries, a number is too small, or ``stem`` is unknown.

    Examples:
        A network for 28 x 28 grayscale images, with one block per stage:

        ```python
        net = ResNeXt((1, 1, 1, 1), 8, 4, 10, in_channels=1, stem="small", stem_width=16)
        logits = net(torch.randn(2, 1, 28, 28))  # (2, 10)
        ```
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        repeats: Sequence[int],
        cardinality: int = 32,
        base_width: int = 4,
        num_classes: int = 1000,
        *,
        in_channels: int = 3,
        stem: str = "imagenet",
        stem_width: int = 64,
        zero_init_residual: bool = False,
        fused: bool = False,
    ) -> None:
        super().__init__()
        sizes = {
            "cardinality": cardinality,
            "base_width": base_width,
            "num_classes": num_classes,
            "in_channels": in_channels,
            "stem_width": stem_width,
        }
        _check_arguments(repeats, stem, sizes)
        self.repeats, self.cardinality, self.base_width = tuple(repeats), cardinality, base_width
        self.stem, self.fused = stem, fused

        kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = nn.Conv2d(in_channels, stem_width, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if stem == "imagenet" else nn.Identity()
        channels = stem_width
        for stage, blocks in enumerate(repeats):
            out_channels = 4 * stem_width * 2**stage
            layer = self._stage(
                blocks, channels, out_channels, base_width * 2**stage, stride=min(stage, 1) + 1
            )
            self.add_module(f"layer{stage + 1}", layer)
            channels = out_channels if blocks else channels
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        self._initialise(zero_init_residual)

    def _stage(
        self, blocks: int, in_channels: int, out_channels: int, group_width: int, stride: int
    ) -> nn.Sequential:
        layers = []
        for block in range(blocks):
            first = block == 0
            layers.append(
                Bottleneck(
                    in_channels if first else out_channels,
                    out_channels,
                    self.cardinality,
                    group_width,
                    stride if first else 1,
                    fused=self.fused,
                )
            )
        return nn.Sequential(*layers)

    def _initialise(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck) and zero_init_residual:
                nn.init.zeros_(module.bn3.weight)

    @property
    def stages(self) -> tuple[nn.Sequential, ...]:
        """The four stages. Trailing stages can be empty."""
        return self.layer1, self.layer2, self.layer3, self.layer4

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W) to the output of the last stage (N, channels, H', W')."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in self.stages:
            x = stage(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W) to logits (N, num_classes)."""
        return self.fc(torch.flatten(self.avgpool(self.forward_features(x)), 1))


def _check_arguments(repeats: Sequence[int], stem: str, sizes: dict[str, int]) -> None:
    repeats = tuple(repeats)
    if len(repeats) != 4:
        raise ValueError(
            f"repeats must have four entries, one for each stage, such as (3, 4, 6, 3), "
            f"or (3, 3, 3, 0) for three stages; got {len(repeats)}: {repeats}"
        )
    used = [blocks > 0 for blocks in repeats]
    if min(repeats) < 0 or not used[0] or used != sorted(used, reverse=True):
        raise ValueError(f"repeats must be positive, except for trailing zeros, got {repeats}")
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if stem not in STEMS:
        raise ValueError(f"stem must be one of {', '.join(map(repr, STEMS))}, got {stem!r}")


def _variant(
    name: str,
    repeats: Sequence[int],
    cardinality: int,
    base_width: int,
    weights: Weights | None,
    **options: Any,
) -> ResNeXt:
    """Build a named network, with the number of classes of ``weights`` unless ``num_classes`` is given."""
    if weights is None:
        return ResNeXt(repeats, cardinality, base_width, **options)
    state = read_weights(weights, name)
    if classes := number_of_classes(state):
        options.setdefault("num_classes", classes)
    model = ResNeXt(repeats, cardinality, base_width, **options)
    fit(model, state, weights)
    return model


def resnet50(*, weights: Weights | None = None, **options: Any) -> ResNeXt:
    """Build ResNet-50, the ResNeXt of cardinality 1: 25,557,032 parameters. See `resnext50_32x4d`."""
    return _variant("resnet50", (3, 4, 6, 3), 1, 64, weights, **options)


def resnet101(*, weights: Weights | None = None, **options: Any) -> ResNeXt:
    """Build ResNet-101, the ResNeXt of cardinality 1: 44,549,160 parameters. See `resnext50_32x4d`."""
    return _variant("resnet101", (3, 4, 23, 3), 1, 64, weights, **options)


def resnext50_32x4d(*, weights: Weights | None = None, **options: Any) -> ResNeXt:
    """Build ResNeXt-50 (32 x 4d): 25,028,904 parameters.

    Args:
        weights: trained weights: a file (.pth, .pt, .bin or .safetensors), or the name of weights that
            torchvision ("IMAGENET1K_V2", "DEFAULT") or timm ("a1h_in1k") publishes for this network, which
            are loaded through that library. The network has the number of classes of the weights unless
            ``num_classes`` is given; if it differs, the classifier stays untrained. Defaults to None, an
            untrained network.
        options: keyword arguments of `ResNeXt`.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the library can't load the weights, for instance without internet access.
        ImportError: the library that publishes the weights isn't installed.
        ValueError: the file is damaged, the name is unknown, or the weights don't fit the network.
    """
    return _variant("resnext50_32x4d", (3, 4, 6, 3), 32, 4, weights, **options)


def resnext101_32x8d(*, weights: Weights | None = None, **options: Any) -> ResNeXt:
    """Build ResNeXt-101 (32 x 8d): 88,791,336 parameters. See `resnext50_32x4d`."""
    return _variant("resnext101_32x8d", (3, 4, 23, 3), 32, 8, weights, **options)


def resnext101_64x4d(*, weights: Weights | None = None, **options: Any) -> ResNeXt:
    """Build ResNeXt-101 (64 x 4d): 83,455,272 parameters. See `resnext50_32x4d`."""
    return _variant("resnext101_64x4d", (3, 4, 23, 3), 64, 4, weights, **options)


def resnext29_8x64d(*, weights: Weights | None = None, **options: Any) -> ResNeXt:
    """Build ResNeXt-29 (8 x 64d) for CIFAR: 34.4M parameters, 10 classes. See `resnext50_32x4d`."""
    return _cifar("resnext29_8x64d", 8, weights, **options)


def resnext29_16x64d(*, weights: Weights | None = None, **options: Any) -> ResNeXt:
    """Build ResNeXt-29 (16 x 64d) for CIFAR: 68.1M parameters, 10 classes. See `resnext50_32x4d`."""
    return _cifar("resnext29_16x64d", 16, weights, **options)


def _cifar(name: str, cardinality: int, weights: Weights | None, **options: Any) -> ResNeXt:
    if weights is None:
        options.setdefault("num_classes", 10)
    return _variant(name, (3, 3, 3, 0), cardinality, 64, weights, **{"stem": "small", **options})


VARIANTS: dict[str, Callable[..., ResNeXt]] = {
    variant.__name__: variant
    for variant in (
        resnet50,
        resnet101,
        resnext50_32x4d,
        resnext101_32x8d,
        resnext101_64x4d,
        resnext29_8x64d,
        resnext29_16x64d,
    )
}
