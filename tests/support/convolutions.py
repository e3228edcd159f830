"""A network of convolutions, and subclasses of ``nn.Conv2d`` as found in practice, for ``convert``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def grouped_network() -> nn.Module:
    """Return a network with dense, grouped and depthwise convolutions, one of which is used twice."""
    shared = nn.Conv2d(16, 16, 3, padding=1, groups=4)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        shared,
        nn.Conv2d(16, 16, 3, stride=2, padding=1, dilation=(2, 1), groups=16, padding_mode="reflect"),
        shared,
        nn.Conv2d(16, 8, 1),
    )


class Padded(nn.Conv2d):
    """A subclass that leaves the convolution to nn.Conv2d."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Halved(nn.Conv2d):
    """A subclass that calls ``_conv_forward``."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight / 2, self.bias)


class Named(Padded):
    """A subclass with additional settings and no forward."""

    def __init__(self, channels: int, groups: int, name: str = "?") -> None:
        super().__init__(channels, channels, 3, groups=groups)
        self.name = name

    def extra_repr(self) -> str:
        return f"{self.name}, {super().extra_repr()}"


class ByItself(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, groups=self.groups).sin()


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight, bias) * 2


class Activated(nn.Conv2d):
    activation = torch.sin

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(super().forward(x))


class FromC(nn.Conv2d):
    forward = functools.partial(torch.sin)


class ChildOfByItself(ByItself):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def counted(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorate a forward method."""

    @functools.wraps(forward)
    def wrapper(*args: Any) -> Tensor:
        return forward(*args)

    return wrapper


class ByItselfDecorated(nn.Conv2d):
    @counted
    def forward(self, x: Tensor) -> Tensor:
        super().train(self.training)  # super() of another method
        return F.conv2d(x, self.weight, self.bias, groups=self.groups)


class PaddedDecorated(nn.Conv2d):
    @counted
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 0, 1, 0)))


class PickledItsWay(nn.Conv2d):
    def __reduce__(self) -> tuple:
        return nn.Identity, ()


class MadeWithArguments(nn.Conv2d):
    def __new__(cls, *args: Any, **options: Any) -> MadeWithArguments:
        return super().__new__(cls)

    def __getnewargs__(self) -> tuple:
        return (self.in_channels,)


class Final(nn.Conv2d):
    def __init_subclass__(cls) -> None:
        raise RuntimeError("no subclasses, please")


class LazyForever(nn.LazyConv2d):
    cls_to_become = None


class Unplugged(nn.Conv2d):
    """A subclass that doesn't allow setting its class."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise AttributeError("frozen")
        super().__setattr__(name, value)
