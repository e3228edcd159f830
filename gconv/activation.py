"""What kernels can do to the outputs of a convolution before they store them, as PyTorch does it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}


def check_activation(activation: Any) -> None:
    """Raises ValueError where ``activation`` is not one that the kernels can apply."""
    if activation is not None and activation not in ACTIVATIONS:
        names = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activation must be None or one of {names}, got {activation!r}")


def finish(output: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """activation(output + residual), with PyTorch's broadcasting, types and gradients.

    May write over ``output``: nobody else has seen it. Not over a tracer's: an exported graph must change no
    tensor in place.
    """
    if residual is not None:
        output = output + residual
    if activation is None:
        return output
    inplace = type(output) is Tensor and (activation == "relu" or not output.requires_grad)
    return ACTIVATIONS[activation](output, inplace=inplace)
