"""What the kernels need to know of the machine they run on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Device:
    """A processor of tensors.

    Args:
        kind: "cuda", "hip", or "cpu" for Triton's interpreter.
        name: as its driver calls it.
        processors: streaming multiprocessors or compute units.
        capability: compute capability of NVIDIA's, times ten; 0 for others.
        bandwidth: bytes a second that its memory could move at most; infinite if that is not known.
    """

    kind: str
    name: str
    processors: int
    capability: int = 0
    bandwidth: float = math.inf


@cache
def device_of(device: torch.device) -> Device:
    """The description of a torch device."""
    if device.type != "cuda":
        return Device("cpu", "interpreter", 2)
    properties = torch.cuda.get_device_properties(device)
    count = properties.multi_processor_count
    if torch.version.hip is not None:
        return Device("hip", properties.name, count)
    capability = 10 * properties.major + properties.minor
    return Device("cuda", properties.name, count, capability, bandwidth_of(properties))


def bandwidth_of(properties: Any) -> float:
    """Return the peak bytes a second of a GPU's memory: clock (kHz) times bus (bits), two transfers each."""
    found = 2e3 * getattr(properties, "memory_clock_rate", 0) * getattr(properties, "memory_bus_width", 0) / 8
    return found or math.inf  # unknown where a driver reports 0, as for memory shared with the host


def precision_of(dtype: torch.dtype) -> str:
    """Return how ``F.conv2d`` would multiply tensors of a type on a GPU now: "tf32", or "ieee" in full."""
    if dtype != torch.float32 or torch.version.hip is not None:  # first: the setting takes 1 us to read
        return "ieee"
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # the stubs lack cudnn.conv
    return "tf32" if conv.fp32_precision == "tf32" else "ieee"
