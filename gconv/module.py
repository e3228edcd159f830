"""``GroupConv2d``: the layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NoReturn

import torch.nn.functional as F
from torch import Tensor, nn

from gconv.activation import check_activation
from gconv.functional import group_conv2d, integer, pair
from gconv.torch_internals import has_hooks, zeros_around


class GroupConv2d(nn.Conv2d):
    """An ``nn.Conv2d`` whose convolution runs through :func:`gconv.group_conv2d`.

    Takes what ``nn.Conv2d`` takes, has its parameters and state dict, and is one for ``isinstance``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype: as in ``nn.Conv2d``. Pairs may be anything iterable, such as a NumPy array.
        activation: None, "relu", "relu6", "silu" or "hardswish", applied to the result.

    Shape:
        (N, C, H, W) -> (N, K, P, Q), or (C, H, W) -> (K, P, Q).

    Raises:
        TypeError: a number that is no integer.
        ValueError: ``groups`` does not divide the channels; an unknown ``activation`` or ``padding_mode``.
        RuntimeError: a zero or negative ``kernel_size``, ``stride`` or ``dilation``; a negative ``padding``.
    """

    # On the class, so that a module whose class was swapped has them: the activation, and what it was before.
    activation: str | None = None
    _gconv_original: type[nn.Conv2d] = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Iterable[int],
        stride: int | Iterable[int] = 1,
        padding: int | Iterable[int] | str = 0,
        dilation: int | Iterable[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
    ) -> None:
        check_activation(activation)
        kernel_size = pair("kernel_size", kernel_size, least=1, sequences=Iterable)
        stride = pair("stride", stride, least=1, sequences=Iterable)
        dilation = pair("dilation", dilation, least=1, sequences=Iterable)
        if not isinstance(padding, str):
            padding = pair("padding", padding, least=0, sequences=Iterable)
        groups = integer("groups", groups)
        in_channels, out_channels = integer("in_channels", in_channels), integer("out_channels", out_channels)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels < 1:
                raise ValueError(f"{name} must be at least 1, got {channels}")
            if groups > 0 and channels % groups:
                raise ValueError(f"{name}={channels} is not divisible by groups={groups}")
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.activation = activation

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = pad_input(self, input)
        return group_conv2d(
            input, weight, bias, self.stride, padding, self.dilation, self.groups, activation=self.activation
        )

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.activation is None else f"{text}, activation={self.activation!r}"

    def __prepare_scriptable__(self) -> NoReturn:
        """``torch.jit.script`` asks for this before it compiles; what it said otherwise would be no help."""
        raise RuntimeError(
            "torch.jit.script cannot compile GroupConv2d: script before gconv.convert or after gconv.revert, "
            "or take torch.export or torch.jit.trace"
        )


def pad_input(layer: nn.Conv2d, input: Tensor) -> tuple[Tensor, Any]:
    """The input as the layer's ``padding_mode`` pads it, and the padding that is left to the convolution."""
    if layer.padding_mode == "zeros":
        return input, layer.padding
    return F.pad(input, zeros_around(layer), mode=layer.padding_mode), 0


def is_watched(module: nn.Module) -> bool:
    """Whether a module has hooks, or does something else than its class: who runs its part must call it."""
    replaced = {"forward", "_conv_forward"} & module.__dict__.keys()
    return bool(replaced) or has_hooks(module)
