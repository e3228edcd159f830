"""Batch norm, ReLU, convolution, batch norm, ReLU: the modules for ``conv_between_norms``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from marks import interpreted
from torch import Tensor, nn

import gconv

# Backend, dtype, and tolerance relative to the largest number: a few rounding errors of the dtype.
WAYS = [
    pytest.param("reference", torch.float64, 1e-9, id="reference, float64"),
    pytest.param("triton", torch.float32, 1e-4, id="triton, float32", marks=interpreted),
]


def sandwich(
    channels: int = 8,
    groups: int = 2,
    stride: int = 1,
    bias: bool = False,
    dtype: torch.dtype = torch.float64,
) -> nn.ModuleList:
    """Return norm, convolution and norm, with random parameters and statistics."""
    conv = gconv.GroupConv2d(channels, channels, 3, stride, padding=1, groups=groups, bias=bias)
    norms = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
    for norm in norms:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return nn.ModuleList([norms[0], conv, norms[1]]).to(dtype)


def one_by_one(x: Tensor, before: nn.Module, conv: nn.Module, after: nn.Module) -> Tensor:
    """Run the modules one after the other, to get the expected result."""
    return F.relu(after(conv(F.relu(before(x)))))


def assert_alike(ours: dict[str, Tensor], right: dict[str, Tensor], part: float) -> None:
    """Compare tensors by name; each may differ by ``part`` times its largest expected number plus 1."""
    assert ours.keys() == right.keys()
    for name, expected in right.items():
        assert ours[name].shape == expected.shape, name
        apart = (ours[name].double() - expected.double()).abs().max()
        assert apart <= part * (1 + expected.abs().max()), f"{name}: {apart:.1e}"
