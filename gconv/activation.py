"""The activations that kernels can apply to outputs before they store them, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}


def check_activation(activation: Any) -> None:
    """Raise ValueError unless ``activation`` is None or a key of ``ACTIVATIONS``."""
    if activation is not None and activation not in list(ACTIVATIONS):  # the value may not be hashable
        names = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activation must be None or one of {names}, got {activation!r}")


def finish(output: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """Return activation(output + residual), with PyTorch's broadcasting, types and gradients.

    May overwrite ``output``, since nothing else refers to it yet. It doesn't if ``output`` is a tracer's
    tensor, because an exported graph must not change tensors in place.
    """
    if residual is not None:
        output = output + residual
    if activation is None:
        return output
    inplace = type(output) is Tensor and (activation == "relu" or not output.requires_grad)
    return ACTIVATIONS[activation](output, inplace=inplace)
