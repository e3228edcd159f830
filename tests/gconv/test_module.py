"""``GroupConv2d`` is ``nn.Conv2d`` with an activation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gconv

LAYERS = {
    "plain": {"padding": 1, "groups": 4},
    "stride 2": {"stride": 2, "padding": (1, 0), "groups": 2},
    "same": {"padding": "same", "groups": 4},
    "dilated, no bias": {"dilation": 2, "groups": 4, "bias": False},
    "depthwise": {"padding": 1, "groups": 8},
    "dense": {"padding": 1},
}
PADDING_MODES = ["zeros", "reflect", "replicate", "circular"]


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("size", [(2, 8, 9, 7), (8, 9, 7)], ids=["batch", "one image"])
def test_module_is_nn_conv2d(options: dict, padding_mode: str, backend: str, size: tuple[int, ...]) -> None:
    theirs = nn.Conv2d(8, 8, 3, **options, padding_mode=padding_mode, dtype=torch.float64)
    ours = gconv.GroupConv2d(8, 8, 3, **options, padding_mode=padding_mode, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    results = []
    for layer in (ours, theirs):
        x = torch.arange(1.0, 1 + torch.Size(size).numel(), dtype=torch.float64).sin().view(size)
        with gconv.backend(backend):
            y = layer(x.requires_grad_())
            y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(*results)


def test_module_with_relu() -> None:
    layer = gconv.GroupConv2d(8, 8, 3, groups=4, activation="relu")
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(layer(x), F.conv2d(x, layer.weight, layer.bias, groups=4).relu())
    assert "groups=4, activation='relu'" in repr(layer)
    assert "activation" not in repr(gconv.GroupConv2d(8, 8, 3, groups=4))


def test_module_initialises_as_nn_conv2d() -> None:
    torch.manual_seed(3)
    theirs = nn.Conv2d(8, 12, 3, groups=4)
    torch.manual_seed(3)
    ours = gconv.GroupConv2d(8, 12, 3, groups=4)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_module_on_the_meta_device_and_in_other_dtypes() -> None:
    layer = gconv.GroupConv2d(8, 12, 3, groups=4, device="meta", dtype=torch.bfloat16)
    for name in ("aten", "reference"):
        with gconv.backend(name):
            y = layer(torch.empty(2, 8, 6, 6, device="meta", dtype=torch.bfloat16))
        assert (y.shape, y.dtype, y.device.type) == ((2, 12, 4, 4), torch.bfloat16, "meta")
