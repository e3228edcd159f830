"""A valid call of each convolution, to change one argument of."""

from __future__ import annotations

from typing import Any

import torch

from gconv.kinds import CONV2D, Kind

BACKENDS = ("aten", "reference")
X, W, B = torch.randn(1, 4, 5, 5), torch.randn(6, 2, 3, 3), torch.randn(6)


def right(kind: Kind) -> dict[str, Any]:
    """Return valid arguments: 4 channels in, 6 out, 2 groups, kernels of length 3 on inputs of length 5."""
    if kind is CONV2D:
        return {"input": X, "weight": W, "bias": B, "groups": 2}
    channels = (4, 3) if kind.transposed else (6, 2)
    weight = torch.randn(*channels, *[3] * kind.dims)
    return {"input": torch.randn(1, 4, *[5] * kind.dims), "weight": weight, "bias": B, "groups": 2}
