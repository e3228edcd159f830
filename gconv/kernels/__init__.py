"""The Triton backend: the three passes as kernels for NVIDIA and AMD GPUs, channels_last throughout."""

from __future__ import annotations

from functools import cache

import torch

from gconv.geometry import ConvGeometry
from gconv.kernels import tiles
from gconv.kernels.correlation import Correlation
from gconv.kernels.device import device_of, float32_precision
from gconv.kernels.forward import forward
from gconv.kernels.input_grad import input_grad
from gconv.kernels.weight_grad import weight_grad

__all__ = ["Correlation", "forward", "input_grad", "pays", "tile_of", "weight_grad"]


def tile_of(pass_: str, geometry: ConvGeometry, dtype: torch.dtype, device: torch.device) -> tiles.Tile:
    """Kernel and tile that a pass runs in, under PyTorch's present settings."""
    return tiles.tile_of(pass_, geometry, dtype, float32_precision(), device_of(device))


def pays(pass_: str, geometry: ConvGeometry, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels are expected to beat PyTorch's own: where they move each activation once."""
    return _pays(pass_, geometry, dtype, float32_precision(), device)


@cache
def _pays(
    pass_: str, geometry: ConvGeometry, dtype: torch.dtype, precision: str, device: torch.device
) -> bool:
    return tiles.tile_of(pass_, geometry, dtype, precision, device_of(device)).kernel in ("slide", "residue")
