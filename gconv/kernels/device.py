"""What the kernels need to know about the GPU they run on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, or Triton's interpreter.

    Args:
        kind: "cuda", "hip", or "cpu" for Triton's interpreter.
        name: the driver's name for it.
        processors: number of streaming multiprocessors or compute units.
        capability: compute capability of an NVIDIA GPU times ten; 0 for others.
        bandwidth: peak memory bandwidth in bytes per second; infinite if unknown.
    """

    kind: str
    name: str
    processors: int
    capability: int = 0
    bandwidth: float = math.inf


@cache
def device_of(device: torch.device) -> Device:
    """Return the description of a torch device."""
    if device.type != "cuda":
        return Device("cpu", "interpreter", 2)
    properties = torch.cuda.get_device_properties(device)
    count = properties.multi_processor_count
    if torch.version.hip is not None:
        return Device("hip", properties.name, count)
    capability = 10 * properties.major + properties.minor
    return Device("cuda", properties.name, count, capability, bandwidth_of(properties))


def bandwidth_of(properties: Any) -> float:
    """Return a GPU's peak memory bandwidth in bytes per second: clock (kHz) x bus (bits) x two transfers."""
    found = 2e3 * getattr(properties, "memory_clock_rate", 0) * getattr(properties, "memory_bus_width", 0) / 8
    return found or math.inf  # a driver may report 0, for example for memory shared with the host


def precision_of(dtype: torch.dtype) -> str:
    """Return how ``F.conv2d`` multiplies tensors of a type on a GPU: in "tf32", or in full ("ieee")."""
    if dtype != torch.float32 or torch.version.hip is not None:  # first, as reading the setting takes 1 us
        return "ieee"
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # the stubs lack cudnn.conv
    return "tf32" if conv.fp32_precision == "tf32" else "ieee"
