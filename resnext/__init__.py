"""ResNeXt, the network family that shows what :mod:`gconv` does."""

from resnext.model import (
    Bottleneck,
    ResNeXt,
    resnet50,
    resnet101,
    resnext29_8x64d,
    resnext29_16x64d,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
)

__all__ = [
    "Bottleneck",
    "ResNeXt",
    "resnet50",
    "resnet101",
    "resnext29_8x64d",
    "resnext29_16x64d",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
]
