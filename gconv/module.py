"""The layers: PyTorch's convolution modules, running through gconv's functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NoReturn

import torch.nn.functional as F
from torch import Tensor, nn

from gconv.activation import check_activation
from gconv.arguments import integer, numbers
from gconv.functional import (
    group_conv1d,
    group_conv2d,
    group_conv3d,
    group_conv_transpose1d,
    group_conv_transpose2d,
)
from gconv.kinds import CONV1D, CONV2D, CONV3D, CONV_TRANSPOSE1D, CONV_TRANSPOSE2D, Kind
from gconv.torch_internals import ConvolutionBase, has_hooks, output_padding_of, zeros_around

Numbers = int | Iterable[int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class GroupConvolution(ConvolutionBase):
    """What gconv's layers have in common; each also is one of PyTorch's own class.

    Attributes:
        activation: None, "relu", "relu6", "silu" or "hardswish", applied to the result.
    """

    # Names that no subclass of PyTorch's layers has: which convolution, and gconv's function for it.
    _gconv_kind: Kind
    _gconv_function: Callable[..., Tensor]

    # On the class, so that a module whose class was swapped has them: the activation, and what it was before.
    activation: str | None = None
    _gconv_original: type[nn.Module]

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.activation is None else f"{text}, activation={self.activation!r}"

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse ``torch.jit.script``, which asks for this first, with an error that says what to do."""
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}: script before gconv.convert or after "
            "gconv.revert, or use torch.export or torch.jit.trace"
        )


class _Convolution(GroupConvolution):
    """The layers that are not transposed."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Numbers,
        stride: Numbers = 1,
        padding: Numbers | str = 0,
        dilation: Numbers = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
    ) -> None:
        check_activation(activation)
        channels = _check_channels(in_channels, out_channels, groups)
        dims = self._gconv_kind.dims
        if not isinstance(padding, str):
            padding = numbers("padding", padding, 0, dims, Iterable)
        kernel_size = numbers("kernel_size", kernel_size, 1, dims, Iterable)
        stride = numbers("stride", stride, 1, dims, Iterable)
        steps = (stride, padding, numbers("dilation", dilation, 1, dims, Iterable))
        init: Any = super().__init__  # of PyTorch's class, which comes after this one
        init(*channels[:2], kernel_size, *steps, channels[2], bias, padding_mode, device, dtype)
        self.activation = activation

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = pad_input(self, input)
        settings = (self.stride, padding, self.dilation, self.groups)
        return self._gconv_function(input, weight, bias, *settings, activation=self.activation)


class _Transposed(GroupConvolution):
    """The transposed layers."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Numbers,
        stride: Numbers = 1,
        padding: Numbers = 0,
        output_padding: Numbers = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Numbers = 1,
        padding_mode: Literal["zeros"] = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
    ) -> None:
        check_activation(activation)
        channels = _check_channels(in_channels, out_channels, groups)
        sizes = [
            numbers(name, value, least, self._gconv_kind.dims, Iterable)
            for name, value, least in (
                ("kernel_size", kernel_size, 1),
                ("stride", stride, 1),
                ("padding", padding, 0),
                ("output_padding", output_padding, 0),
                ("dilation", dilation, 1),
            )
        ]
        init: Any = super().__init__  # of PyTorch's class, which comes after this one
        init(*channels[:2], *sizes[:4], channels[2], bias, sizes[4], padding_mode, device, dtype)
        self.activation = activation

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        extra = output_padding_of(self, input, output_size)
        settings = (self.stride, self.padding, extra, self.groups, self.dilation)
        return self._gconv_function(input, self.weight, self.bias, *settings, activation=self.activation)


class GroupConv1d(_Convolution, nn.Conv1d):
    """An ``nn.Conv1d`` whose convolution runs through :func:`gconv.group_conv1d`.

    Takes the arguments of ``nn.Conv1d``, has its parameters and state dict, and is one for ``isinstance``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype: as in ``nn.Conv1d``.
        activation: as in :class:`GroupConv2d`.

    Shape:
        (N, C, L) -> (N, K, Q), or (C, L) -> (K, Q).

    Raises:
        TypeError, ValueError, RuntimeError: as in :class:`GroupConv2d`.
    """

    _gconv_kind = CONV1D
    _gconv_function = staticmethod(group_conv1d)
    _gconv_original = nn.Conv1d


class GroupConv2d(_Convolution, nn.Conv2d):
    """An ``nn.Conv2d`` whose convolution runs through :func:`gconv.group_conv2d`.

    Takes the arguments of ``nn.Conv2d``, has its parameters and state dict, and is one for ``isinstance``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype: as in ``nn.Conv2d``. Pairs may be anything iterable, such as a NumPy array.
        activation: None, "relu", "relu6", "silu" or "hardswish", applied to the result.

    Shape:
        (N, C, H, W) -> (N, K, P, Q), or (C, H, W) -> (K, P, Q).

    Raises:
        TypeError: a number is not an integer.
        ValueError: ``groups`` does not divide the channels; an unknown ``activation`` or ``padding_mode``.
        RuntimeError: ``kernel_size``, ``stride`` or ``dilation`` is below 1, or ``padding`` below 0.
    """

    _gconv_kind = CONV2D
    _gconv_function = staticmethod(group_conv2d)
    _gconv_original = nn.Conv2d


class GroupConv3d(_Convolution, nn.Conv3d):
    """An ``nn.Conv3d`` whose convolution runs through :func:`gconv.group_conv3d`.

    Takes the arguments of ``nn.Conv3d``, has its parameters and state dict, and is one for ``isinstance``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype: as in ``nn.Conv3d``.
        activation: as in :class:`GroupConv2d`.

    Shape:
        (N, C, D, H, W) -> (N, K, D', P, Q), or (C, D, H, W) -> (K, D', P, Q).

    Raises:
        TypeError, ValueError, RuntimeError: as in :class:`GroupConv2d`.
    """

    _gconv_kind = CONV3D
    _gconv_function = staticmethod(group_conv3d)
    _gconv_original = nn.Conv3d


class GroupConvTranspose1d(_Transposed, nn.ConvTranspose1d):
    """An ``nn.ConvTranspose1d`` whose convolution runs through :func:`gconv.group_conv_transpose1d`.

    Takes the arguments of ``nn.ConvTranspose1d``, has its parameters and state dict, and is one for
    ``isinstance``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation,
            padding_mode, device, dtype: as in ``nn.ConvTranspose1d``.
        activation: as in :class:`GroupConv2d`.

    Shape:
        (N, C, L) -> (N, K, Q), or (C, L) -> (K, Q).

    Raises:
        TypeError, ValueError, RuntimeError: as in :class:`GroupConvTranspose2d`.
    """

    _gconv_kind = CONV_TRANSPOSE1D
    _gconv_function = staticmethod(group_conv_transpose1d)
    _gconv_original = nn.ConvTranspose1d


class GroupConvTranspose2d(_Transposed, nn.ConvTranspose2d):
    """An ``nn.ConvTranspose2d`` whose convolution runs through :func:`gconv.group_conv_transpose2d`.

    Takes the arguments of ``nn.ConvTranspose2d``, has its parameters and state dict, and is one for
    ``isinstance``. Its ``forward`` takes an ``output_size``, too.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation,
            padding_mode, device, dtype: as in ``nn.ConvTranspose2d``.
        activation: as in :class:`GroupConv2d`.

    Shape:
        (N, C, H, W) -> (N, K, P, Q), or (C, H, W) -> (K, P, Q).

    Raises:
        TypeError: a number is not an integer.
        ValueError: ``groups`` does not divide the channels; an unknown ``activation``; or a ``padding_mode``
            other than "zeros".
        RuntimeError: ``kernel_size``, ``stride`` or ``dilation`` is below 1, or a padding below 0.
    """

    _gconv_kind = CONV_TRANSPOSE2D
    _gconv_function = staticmethod(group_conv_transpose2d)
    _gconv_original = nn.ConvTranspose2d


LAYERS: tuple[type[GroupConvolution], ...] = (
    GroupConv1d,
    GroupConv2d,
    GroupConv3d,
    GroupConvTranspose1d,
    GroupConvTranspose2d,
)


LAYER_OF = {layer._gconv_kind: layer for layer in LAYERS}


def _check_channels(in_channels: Any, out_channels: Any, groups: Any) -> tuple[int, int, int]:
    """Check the channels of a layer and its groups, and return them as ints."""
    groups = integer("groups", groups)
    in_channels, out_channels = integer("in_channels", in_channels), integer("out_channels", out_channels)
    for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
        if channels < 1:
            raise ValueError(f"{name} must be at least 1, got {channels}")
        if groups > 0 and channels % groups:
            raise ValueError(f"{name}={channels} is not divisible by groups={groups}")
    return in_channels, out_channels, groups


def pad_input(layer: Any, input: Tensor) -> tuple[Tensor, Any]:
    """Pad the input by the layer's ``padding_mode``; return it and the padding left to the convolution."""
    if layer.padding_mode == "zeros":
        return input, layer.padding
    return F.pad(input, zeros_around(layer), mode=layer.padding_mode), 0


def is_watched(module: nn.Module) -> bool:
    """Return whether a module has hooks, or a replaced forward, so that it must be called as a whole."""
    replaced = {"forward", "_conv_forward"} & module.__dict__.keys()
    return bool(replaced) or has_hooks(module)
