"""The Triton backend: forward pass, input gradient and weight gradient as kernels for NVIDIA and AMD GPUs.

All of them work on channels_last tensors. docs/kernels.md explains their design.
"""

from __future__ import annotations

import torch

from gconv.geometry import ConvGeometry
from gconv.kernels import choice
from gconv.kernels.correlation import Correlation
from gconv.kernels.device import device_of, precision_of
from gconv.kernels.forward import forward, norm_forward
from gconv.kernels.input_grad import input_grad, norm_input_grad
from gconv.kernels.tiles import Tile
from gconv.kernels.weight_grad import norm_weight_grad, weight_grad

__all__ = [
    "Correlation",
    "forward",
    "input_grad",
    "norm_forward",
    "norm_input_grad",
    "norm_weight_grad",
    "pays_for_a_call",
    "tile_of",
    "verdict",
    "weight_grad",
]


def tile_of(pass_: str, geometry: ConvGeometry, dtype: torch.dtype, device: torch.device) -> Tile:
    """Return the kernel and tile that a pass runs in, under PyTorch's current settings."""
    return choice.tile_of(pass_, geometry, dtype, precision_of(dtype), device_of(device))


def verdict(
    pass_: str, geometry: ConvGeometry, dtype: torch.dtype, layout: str, device: torch.device
) -> choice.Verdict:
    """Return whether the kernel of a pass is faster than PyTorch, under PyTorch's current settings, and why.

    Args:
        pass_: "forward", "input_grad" or "weight_grad".
        geometry: the convolution.
        dtype: of the tensors.
        layout: of the tensors, "channels_last" or "contiguous". The kernels convert contiguous tensors.
        device: of the tensors.
    """
    return choice.verdict(pass_, geometry, dtype, precision_of(dtype), layout, device_of(device))


def pays_for_a_call(
    passes: tuple[str, ...],
    geometry: ConvGeometry,
    dtype: torch.dtype,
    layout: str,
    device: torch.device,
    host: float,
) -> bool:
    """Return whether a kernel is faster in any of ``passes`` that takes PyTorch ``host`` us or more.

    The other arguments are those of ``verdict``.
    """
    return choice.pays_for_a_call(
        passes, geometry, dtype, precision_of(dtype), layout, device_of(device), host
    )
