"""The layers behave as PyTorch's, and also apply an activation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gconv
from gconv.kinds import CONV1D, CONV2D, CONV3D, CONV_TRANSPOSE1D, CONV_TRANSPOSE2D, Kind
from gconv.module import LAYERS

LAYER = {layer._gconv_kind: layer for layer in LAYERS}
OPTIONS = {
    "plain": {"padding": 1, "groups": 4},
    "stride 2": {"stride": 2, "padding": (1, 0), "groups": 2},
    "same": {"padding": "same", "groups": 4},
    "dilated, no bias": {"dilation": 2, "groups": 4, "bias": False},
    "depthwise": {"padding": 1, "groups": 8},
    "dense": {"padding": 1},
}
PADDING_MODES = ["zeros", "reflect", "replicate", "circular"]
OF_ONE_KIND = [
    (CONV1D, {"padding": 1, "groups": 4}),
    (CONV1D, {"padding": "same", "dilation": 2, "groups": 8}),
    (CONV3D, {"padding": 1, "groups": 4}),
    (CONV3D, {"padding": (0, 1, 1), "stride": (1, 2, 1), "groups": 2, "bias": False}),
    (CONV_TRANSPOSE1D, {"stride": 2, "padding": 1, "output_padding": 1, "groups": 4}),
    (CONV_TRANSPOSE2D, {"stride": 2, "padding": (1, 0), "output_padding": (0, 1), "groups": 4}),
    (CONV_TRANSPOSE2D, {"dilation": (2, 1), "groups": 8, "bias": False}),
    (CONV_TRANSPOSE2D, {}),
]
MADE = [
    pytest.param(CONV2D, options, mode, id=f"{name}-{mode}")
    for name, options in OPTIONS.items()
    for mode in PADDING_MODES
]
MADE += [
    pytest.param(kind, options, mode, id=f"{kind}, {options}, {mode}")
    for kind, options in OF_ONE_KIND
    for mode in PADDING_MODES
    if (kind, mode) != (CONV3D, "reflect") and not (kind.transposed and mode != "zeros")
]


def both(kind: Kind, *sizes: int, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Return gconv's layer and PyTorch's, initialized with the same random numbers."""
    layers = []
    for layer in (LAYER[kind], kind.layer):
        torch.manual_seed(3)
        layers.append(layer(*sizes, **options))
    return layers[0], layers[1]


def compare(layers: tuple[nn.Module, nn.Module], size: tuple[int, ...], *arguments: Any) -> None:
    """Compare the outputs and gradients of two layers."""
    results = []
    for layer in layers:
        x = torch.arange(1.0, 1 + torch.Size(size).numel(), dtype=torch.float64).sin().view(size)
        y = layer(x.requires_grad_(), *arguments)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("kind", "options", "padding_mode"), MADE)
@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("batched", [True, False], ids=["batch", "no batch"])
def test_layers_are_pytorchs(
    kind: Kind, options: dict, padding_mode: str, backend: str, batched: bool
) -> None:
    layers = both(kind, 8, 8, 3, **options, padding_mode=padding_mode, dtype=torch.float64)
    lengths = (5, 6, 4) if kind.dims == 3 else (9, 7)[: kind.dims]
    with gconv.backend(backend):
        compare(layers, (*[2] * batched, 8, *lengths))


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_take_pytorchs_state_and_give_it(layer: type[nn.Module]) -> None:
    theirs = layer._gconv_kind.layer(8, 12, 3, groups=4)
    ours = layer(8, 12, 3, groups=4)
    assert isinstance(ours, layer._gconv_kind.layer)
    ours.load_state_dict(theirs.state_dict())
    back = layer._gconv_kind.layer(8, 12, 3, groups=4)
    back.load_state_dict(ours.state_dict())
    for one, other in zip(back.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("batched", [True, False], ids=["batch", "no batch"])
@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("kind", [CONV_TRANSPOSE1D, CONV_TRANSPOSE2D], ids=str)
def test_transposed_layers_make_an_output_of_the_size_that_is_asked_for(
    kind: Kind, backend: str, batched: bool
) -> None:
    layers = both(kind, 8, 4, 3, stride=3, padding=1, groups=4, dtype=torch.float64)
    size = (*[2] * batched, 8, *[4] * kind.dims)
    for length in (10, 11, 12):
        with gconv.backend(backend):
            compare(layers, size, [length] * kind.dims)
            assert layers[0](torch.ones(size).double(), [length] * kind.dims).shape[-1] == length
    for layer in layers:
        with pytest.raises(ValueError, match="requested an output size of"):
            layer(torch.ones(size).double(), [13] * kind.dims)


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "hardswish"])
@pytest.mark.parametrize("kind", LAYER, ids=str)
def test_layers_with_an_activation(kind: Kind, activation: str) -> None:
    layer = LAYER[kind](8, 8, 3, groups=4, activation=activation)
    x = torch.randn(2, 8, *[5] * kind.dims)
    right = getattr(F, activation)(kind.pytorch(x, layer.weight, layer.bias, groups=4))
    assert torch.equal(layer(x), right)
    assert f"groups=4, activation={activation!r}" in repr(layer)


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_show_themselves_as_pytorchs_do(layer: type[nn.Module]) -> None:
    for options in ({}, {"padding": 1, "stride": 2}, {"dilation": 2, "groups": 4, "bias": False}):
        assert repr(layer(8, 8, 3, **options)) == f"Group{layer._gconv_kind.layer(8, 8, 3, **options)!r}"


@pytest.mark.parametrize("kind", LAYER, ids=str)
def test_layers_initialise_as_pytorchs(kind: Kind) -> None:
    ours, theirs = both(kind, 8, 12, 3, groups=4)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("kind", LAYER, ids=str)
def test_layers_on_the_meta_device_and_in_other_dtypes(kind: Kind) -> None:
    layer = LAYER[kind](8, 12, 3, groups=4, device="meta", dtype=torch.bfloat16)
    length = 8 if kind.transposed else 4
    for name in ("aten", "reference"):
        with gconv.backend(name):
            y = layer(torch.empty(2, 8, *[6] * kind.dims, device="meta", dtype=torch.bfloat16))
        assert (y.dtype, y.device.type) == (torch.bfloat16, "meta")
        assert y.shape == (2, 12, *[length] * kind.dims)


@pytest.mark.parametrize("layer", LAYERS)
def test_script_is_refused_by_name(layer: type[nn.Module]) -> None:
    with pytest.raises(RuntimeError, match=rf"torch\.jit\.script can't compile {layer.__name__}: script"):
        torch.jit.script(nn.Sequential(layer(8, 8, 3, groups=4)))
