"""Small networks with every kind of grouped convolution: speech, images and video."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import gconv


class Conformer(nn.Module):
    """The convolution module of a Conformer (arXiv 2005.08100), with a transposed tensor as input."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, 2 * channels)
        self.depthwise = nn.Conv1d(
            channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False
        )
        self.batch_norm = nn.BatchNorm1d(channels)
        self.contract = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.glu(self.expand(self.norm(x)))
        y = nn.functional.silu(self.batch_norm(self.depthwise(y.transpose(1, 2))))
        return x + self.contract(y.transpose(1, 2))


class Speech(nn.Module):
    """Waveform to waveform: a strided layer, a positional one, a Conformer module, a transposed layer."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Conv1d(1, 8, 5, stride=2, padding=2)
        position = nn.Conv1d(8, 8, 4, padding="same", groups=4)  # an even kernel, as in wav2vec 2.0
        self.position = parametrizations.weight_norm(position, dim=2)
        self.block = Conformer(8, 7)
        self.decode = nn.ConvTranspose1d(8, 8, 4, stride=2, padding=1, groups=8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Conv1d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encode(x)
        x = x + nn.functional.gelu(self.position(x))
        x = self.block(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.norm(self.decode(x)).relu())

    @staticmethod
    def example(batch: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(batch, 1, 22, generator=torch.Generator().manual_seed(batch), dtype=dtype)


class UNet(nn.Module):
    """Images to images: grouped and depthwise layers, downsampling and upsampling, with a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.down = nn.Sequential(
            nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=4, bias=False), nn.BatchNorm2d(16), nn.SiLU()
        )
        self.large = nn.Conv2d(16, 16, 9, padding=4, groups=16)
        self.up = nn.Sequential(
            nn.ConvTranspose2d(16, 8, 2, stride=2, groups=4), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.smooth = nn.ConvTranspose2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.down(x)
        y = self.up(y + self.large(y))
        return self.head(self.norm(self.smooth(torch.cat([x, y], 1))).relu())

    @staticmethod
    def example(batch: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(batch, 3, 8, 6, generator=torch.Generator().manual_seed(batch), dtype=dtype)


class Video(nn.Module):
    """Video to classes: layers of X3D (arXiv 2004.04730), of depth 1 and 3."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 8, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1), bias=False)
        self.frames = nn.Conv3d(8, 8, (1, 3, 3), padding=(0, 1, 1), groups=4, bias=False)
        self.norm = nn.BatchNorm3d(8)
        self.volume = nn.Conv3d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.volume(self.norm(self.frames(x)).relu()) + x
        return self.head(x.mean((2, 3, 4)))

    @staticmethod
    def example(batch: int, dtype: torch.dtype) -> Tensor:
        x = torch.randn(batch, 3, 4, 8, 6, generator=torch.Generator().manual_seed(batch), dtype=dtype)
        return x.contiguous(memory_format=torch.channels_last_3d)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"speech": Speech, "u-net": UNet, "video": Video}
# The layers that are converted with depthwise=True.
SWAPPED = {
    "speech": ["position", "block.depthwise", "decode"],
    "u-net": ["down.0", "large", "up.0", "smooth"],
    "video": ["frames", "volume"],
}


def twins(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """Return a network and its converted copy."""
    torch.manual_seed(3)
    plain = NETWORKS[name]().to(dtype)
    converted = copy.deepcopy(plain)
    report = gconv.convert(converted, depthwise=True)
    assert [layer.name for layer in report.converted] == SWAPPED[name], report
    return plain, converted
