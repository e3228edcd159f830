"""Subclasses of ``nn.Conv2d`` keep their behavior when they are converted."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from convolutions import Halved, Named, Padded, PaddedDecorated, Unplugged
from torch import Tensor, nn

import gconv

timm_layers = functools.partial(zoo.load, "timm.layers")
SUBCLASSES: dict[str, Callable[[], nn.Conv2d]] = {
    "super().forward": lambda: Padded(8, 8, 3, groups=4),
    "decorated": lambda: PaddedDecorated(8, 8, 3, groups=4),
    "_conv_forward": lambda: Halved(8, 8, 3, groups=4),
    "no forward": lambda: Named(8, 4, "mine"),
    "Conv2dSame": lambda: timm_layers().Conv2dSame(8, 12, (3, 4), groups=4),
    "Conv2dSame, odd": lambda: timm_layers().Conv2dSame(8, 12, 3, dilation=2, groups=4),
    "Conv2dSame, stride": lambda: timm_layers().Conv2dSame(8, 12, (3, 4), stride=(2, 3), groups=4),
    "Conv2dSame, stride 3": lambda: timm_layers().Conv2dSame(8, 12, 2, stride=3, dilation=(2, 1), groups=4),
    "ScaledStdConv2d": lambda: timm_layers().ScaledStdConv2d(8, 12, 3, stride=2, groups=4, gamma=1.7),
    "ScaledStdConv2dSame": lambda: timm_layers().ScaledStdConv2dSame(8, 12, 3, stride=2, groups=4),
    "ScaledStdConv2dSame, static": lambda: timm_layers().ScaledStdConv2dSame(8, 12, 3, groups=4, padding=0),
    "frozen": lambda: Unplugged(8, 8, 3, groups=4),
}


@pytest.mark.parametrize("make", SUBCLASSES.values(), ids=SUBCLASSES)
def test_subclasses_keep_what_they_do(make: Callable[[], nn.Conv2d]) -> None:
    original = make().double()
    for parameter in original.parameters():
        nn.init.normal_(parameter)
    layer = copy.deepcopy(original)
    report = gconv.convert(layer, channels_last=False)  # another layout rounds differently
    assert report.converted, report
    assert isinstance(layer, gconv.GroupConv2d) and isinstance(layer, type(original))
    assert repr(layer) == f"Group{original!r}"
    # Sizes that are divisible by the strides, and others.
    for size in ((3, 8, 9, 12), (3, 8, 12, 7), (8, 10, 10)):
        x = torch.randn(size, dtype=torch.float64)
        results = []
        for module, backend in ((original, "auto"), (layer, "aten"), (layer, "reference")):
            with gconv.backend(backend):
                y = module(x.requires_grad_())
            parameters = list(module.parameters())
            results.append([y.detach(), *torch.autograd.grad(y.sin().sum(), [x, *parameters])])
        assert all(map(torch.equal, results[1], results[0]))
        torch.testing.assert_close(results[2], results[0])


def test_what_was_patched_in_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it was patched before conversion, for example to change the padding."""
    same, plain = timm_layers().Conv2dSame(8, 8, 3, groups=4), nn.Conv2d(8, 8, 3, groups=4)
    monkeypatch.setattr(type(same), "forward", lambda self, x: x)
    assert "computes the convolution itself" in gconv.convert(same).skipped[0].reason
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda self, x, weight, bias: x)
    assert "has a custom _conv_forward" in gconv.convert(plain).skipped[0].reason


def test_an_activation_is_applied_after_an_equation_too() -> None:
    for make in (timm_layers().Conv2dSame, timm_layers().ScaledStdConv2d):
        layer, x = make(8, 8, 3, groups=4), torch.randn(2, 8, 9, 9)
        gconv.convert(layer)
        expected = layer(x).relu()
        layer.activation = "relu"
        assert torch.equal(layer(x), expected)


def test_attributes_named_as_gconvs_own_do_not_matter() -> None:
    layer = Padded(8, 8, 3, groups=4)
    layer._original = nn.Parameter(torch.ones(()))
    gconv.convert(layer)
    twin = copy.deepcopy(layer)
    assert gconv.revert(twin) == ("",) and type(twin) is Padded


class Quantised(Tensor):
    """Weights stored times 100, which only ``F.conv2d`` divides again."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.conv2d:
            with torch._C.DisableTorchFunctionSubclass():
                input, weight, *rest = args
                return F.conv2d(input, weight.as_subclass(Tensor) / 100, *rest, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_weights_that_mean_something_else_keep_their_meaning(backend: str) -> None:
    layer, x = nn.Conv2d(8, 8, 3, groups=4, bias=False), torch.randn(2, 8, 9, 9)
    layer.weight = nn.Parameter((layer.weight * 100).detach().as_subclass(Quantised), requires_grad=False)
    expected = layer(x)
    gconv.convert(layer)
    with gconv.backend(backend):
        torch.testing.assert_close(layer(x), expected)
        layer.activation = "relu"
        torch.testing.assert_close(layer(x), expected.relu())


def test_converted_classes_are_constructed_copied_and_pickled_as_their_own() -> None:
    layer = Named(8, 4, "mine")
    gconv.convert(layer)
    again = type(layer)(16, 2)
    assert (again.in_channels, again.groups, again.name) == (16, 2, "?")
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    x = torch.randn(1, 8, 5, 5)
    for twin in (copy.deepcopy(layer), copy.copy(layer), torch.load(saved, weights_only=False)):
        assert type(twin) is type(layer)
        torch.testing.assert_close(twin(x), layer(x))
        assert gconv.revert(twin) == ("",) and type(twin) is Named
        torch.testing.assert_close(twin(x), layer(x))


def test_revert_knows_copies_that_lost_the_mark() -> None:
    class Copied(Padded):
        def __deepcopy__(self, memo: dict) -> Copied:
            twin = type(self)(8, 8, 3, groups=4)
            twin.load_state_dict(self.state_dict())
            return twin

    layer = Copied(8, 8, 3, groups=4)
    gconv.convert(layer)
    twin = copy.deepcopy(layer)
    assert gconv.revert(twin) == ("",) and type(twin) is Copied
