"""ResNeXt on `gconv`'s grouped convolutions.

The named networks (``resnext50_32x4d`` and the others) build a `ResNeXt` of a published size, with or without
trained weights. ``python -m resnext`` trains, evaluates and exports networks from the command line.
"""

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
