"""What the kernels need to know of the machine they run on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True, slots=True)
class Device:
    """A processor of tensors.

    Args:
        kind: "cuda", "hip", or "cpu" for Triton's interpreter.
        name: as its driver calls it.
        processors: streaming multiprocessors or compute units.
        capability: compute capability of NVIDIA's, times ten; 0 for others.
    """

    kind: str
    name: str
    processors: int
    capability: int = 0


@cache
def device_of(device: torch.device) -> Device:
    """The description of a torch device."""
    if device.type != "cuda":
        return Device("cpu", "interpreter", 2)
    properties = torch.cuda.get_device_properties(device)
    count = properties.multi_processor_count
    if torch.version.hip is not None:
        return Device("hip", properties.name, count)
    return Device("cuda", properties.name, count, 10 * properties.major + properties.minor)


def float32_precision() -> str:
    """How ``F.conv2d`` would multiply float32 on a GPU now: "tf32", or "ieee" in full."""
    allowed = torch.version.hip is None and torch.backends.cudnn.conv.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"
