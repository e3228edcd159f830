"""The Triton backend: the three passes as kernels for NVIDIA and AMD GPUs, channels_last throughout."""

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
    """Kernel and tile that a pass runs in, under PyTorch's present settings."""
    return choice.tile_of(pass_, geometry, dtype, precision_of(dtype), device_of(device))


def verdict(
    pass_: str, geometry: ConvGeometry, dtype: torch.dtype, layout: str, device: torch.device
) -> choice.Verdict:
    """Whether the kernels are faster than PyTorch's own, under PyTorch's present settings, and why.

    Args:
        pass_: "forward", "input_grad" or "weight_grad".
        geometry: the sizes.
        dtype: of the tensors.
        layout: theirs, "channels_last" or "contiguous", which the kernels convert.
        device: where they are.
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
    """Whether the kernels pay in any of ``passes`` that takes PyTorch's own at least ``host`` microseconds.

    Other arguments are those of :func:`verdict`, whose answers this comes to.
    """
    return choice.pays_for_a_call(
        passes, geometry, dtype, precision_of(dtype), layout, device_of(device), host
    )
