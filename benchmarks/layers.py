"""The layers that are timed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """One grouped 3x3 convolution with padding 1 and no bias, as many channels out as in."""

    name: str
    channels: int
    size: int
    groups: int
    stride: int = 1

    def tensors(self, batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Input (N, C, H, W) and weight (C, C / groups, 3, 3), channels_last, normally distributed."""
        image = torch.randn(batch, self.channels, self.size, self.size, dtype=dtype)
        weight = torch.randn(self.channels, self.channels // self.groups, 3, 3, dtype=dtype)
        return tuple(t.contiguous(memory_format=torch.channels_last) for t in (image, weight))

    @property
    def settings(self) -> dict[str, int]:
        """Keyword arguments of ``F.conv2d``."""
        return {"stride": self.stride, "padding": 1, "groups": self.groups}


# The distinct grouped layers of ResNeXt-50 32x4d at 224 pixels.
RESNEXT50 = [
    Layer("conv2, 128 x 56", 128, 56, 32),
    Layer("conv3, 256 x 56, stride 2", 256, 56, 32, stride=2),
    Layer("conv3, 256 x 28", 256, 28, 32),
    Layer("conv4, 512 x 28, stride 2", 512, 28, 32, stride=2),
    Layer("conv4, 512 x 14", 512, 14, 32),
    Layer("conv5, 1024 x 14, stride 2", 1024, 14, 32, stride=2),
    Layer("conv5, 1024 x 7", 1024, 7, 32),
]
