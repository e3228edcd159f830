"""The layers: PyTorch's convolution modules, computed by gconv's functions."""

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
    """Base class of gconv's layers, each of which is also a subclass of a PyTorch layer.

    Attributes:
        activation: None, "relu", "relu6", "silu" or "hardswish", applied to the result.
    """

    # The kind of convolution and gconv's function for it. The prefix avoids clashes with names in subclasses
    # of PyTorch's layers.
    _gconv_kind: Kind
    _gconv_function: Callable[..., Tensor]

    # Class attributes, so that converted modules have them too: the activation, and the class before
    # conversion.
    activation: str | None = None
    _gconv_original: type[nn.Module]

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.activation is None else f"{text}, activation={self.activation!r}"

    def __prepare_scriptable__(self) -> NoReturn:
        """Raise an error for ``torch.jit.script``, which calls this method first."""
        raise RuntimeError(
            f"torch.jit.script can't compile {type(self).__name__}: script before gconv.convert or after "
            "gconv.revert, or use torch.export or torch.jit.trace"
        )


class _Convolution(GroupConvolution):
    """Base class of the layers that are not transposed."""

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
        init: Any = super().__init__  # of the PyTorch class, which is next in the MRO
        init(*channels[:2], kernel_size, *steps, channels[2], bias, padding_mode, device, dtype)
        self.activation = activation

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = pad_input(self, input)
        settings = (self.stride, padding, self.dilation, self.groups)
        return self._gconv_function(input, weight, bias, *settings, activation=self.activation)


class _Transposed(GroupConvolution):
    """Base class of the transposed layers."""

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
        init: Any = super().__init__  # of the PyTorch class, which is next in the MRO
        init(*channels[:2], *sizes[:4], channels[2], bias, sizes[4], padding_mode, device, dtype)
        self.activation = activation

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        extra = output_padding_of(self, input, output_size)
        settings = (self.stride, self.padding, extra, self.groups, self.dilation)
        return self._gconv_function(input, self.weight, self.bias, *settings, activation=self.activation)


class GroupConv1d(_Convolution, nn.Conv1d):
    """An ``nn.Conv1d`` computed by ``gconv.group_conv1d``, on the fastest backend.

    Its constructor accepts the arguments of ``nn.Conv1d``, and an activation. State dicts are
    interchangeable.

    Args:
        in_channels: number of input channels, C.
        out_channels: number of output channels, K.
        kernel_size: length of the kernel, S.
        stride: distance between the inputs of neighboring outputs. Defaults to 1.
        padding: zeros on each side, "valid" or "same". Defaults to 0.
        dilation: distance between the taps of the kernel. Defaults to 1.
        groups: number of groups, which divides C and K. Defaults to 1.
        bias: whether to learn a bias. Defaults to True.
        padding_mode: "zeros", "reflect", "replicate" or "circular". Defaults to "zeros".
        device: device of the parameters. Defaults to None, PyTorch's default device.
        dtype: dtype of the parameters. Defaults to None, PyTorch's default dtype.
        activation: None, "relu", "relu6", "silu" or "hardswish", applied to the result. Defaults to None.

    Shape:
        (N, C, L) -> (N, K, Q), or (C, L) -> (K, Q)

    Raises:
        TypeError: a number is not an integer.
        ValueError: ``groups`` doesn't divide the channels, or ``activation`` or ``padding_mode`` is unknown.
        RuntimeError: ``kernel_size``, ``stride`` or ``dilation`` is less than 1, or ``padding`` less than 0.
    """

    _gconv_kind = CONV1D
    _gconv_function = staticmethod(group_conv1d)
    _gconv_original = nn.Conv1d


class GroupConv2d(_Convolution, nn.Conv2d):
    """An ``nn.Conv2d`` computed by ``gconv.group_conv2d``, on the fastest backend.

    Its constructor accepts the arguments of ``nn.Conv2d``, and an activation. State dicts are
    interchangeable.

    Args:
        in_channels: number of input channels, C.
        out_channels: number of output channels, K.
        kernel_size: size of the kernel, one number or (R, S).
        stride: distance between the inputs of neighboring outputs, one number or (vertical, horizontal).
            Defaults to 1.
        padding: zeros on each side, one number or (vertical, horizontal), "valid" or "same". Defaults to 0.
        dilation: distance between the taps of the kernel, one number or (vertical, horizontal). Defaults to
            1.
        groups: number of groups, which divides C and K. Defaults to 1.
        bias: whether to learn a bias. Defaults to True.
        padding_mode: "zeros", "reflect", "replicate" or "circular". Defaults to "zeros".
        device: device of the parameters. Defaults to None, PyTorch's default device.
        dtype: dtype of the parameters. Defaults to None, PyTorch's default dtype.
        activation: None, "relu", "relu6", "silu" or "hardswish", applied to the result. Defaults to None.

    Shape:
        (N, C, H, W) -> (N, K, P, Q), or (C, H, W) -> (K, P, Q)

    Raises:
        TypeError: a number is not an integer.
        ValueError: ``groups`` doesn't divide the channels, or ``activation`` or ``padding_mode`` is unknown.
        RuntimeError: ``kernel_size``, ``stride`` or ``dilation`` is less than 1, or ``padding`` less than 0.

    Examples:
        >>> layer = gconv.GroupConv2d(128, 128, 3, padding=1, groups=32, activation="relu")
        >>> layer(torch.randn(8, 128, 56, 56)).shape
        torch.Size([8, 128, 56, 56])
        >>> isinstance(layer, nn.Conv2d)
        True
    """

    _gconv_kind = CONV2D
    _gconv_function = staticmethod(group_conv2d)
    _gconv_original = nn.Conv2d


class GroupConv3d(_Convolution, nn.Conv3d):
    """An ``nn.Conv3d`` computed by ``gconv.group_conv3d``, on the fastest backend.

    Its constructor accepts the arguments of ``nn.Conv3d``, and an activation. State dicts are
    interchangeable.

    Args:
        in_channels: number of input channels, C.
        out_channels: number of output channels, K.
        kernel_size: size of the kernel, one number or (T, R, S).
        stride: distance between the inputs of neighboring outputs, one number or three. Defaults to 1.
        padding: zeros on each side, one number or three, "valid" or "same". Defaults to 0.
        dilation: distance between the taps of the kernel, one number or three. Defaults to 1.
        groups: number of groups, which divides C and K. Defaults to 1.
        bias: whether to learn a bias. Defaults to True.
        padding_mode: "zeros", "reflect", "replicate" or "circular". Defaults to "zeros".
        device: device of the parameters. Defaults to None, PyTorch's default device.
        dtype: dtype of the parameters. Defaults to None, PyTorch's default dtype.
        activation: None, "relu", "relu6", "silu" or "hardswish", applied to the result. Defaults to None.

    Shape:
        (N, C, D, H, W) -> (N, K, D', P, Q), or (C, D, H, W) -> (K, D', P, Q)

    Raises:
        TypeError: a number is not an integer.
        ValueError: ``groups`` doesn't divide the channels, or ``activation`` or ``padding_mode`` is unknown.
        RuntimeError: ``kernel_size``, ``stride`` or ``dilation`` is less than 1, or ``padding`` less than 0.
    """

    _gconv_kind = CONV3D
    _gconv_function = staticmethod(group_conv3d)
    _gconv_original = nn.Conv3d


class GroupConvTranspose1d(_Transposed, nn.ConvTranspose1d):
    """An ``nn.ConvTranspose1d`` computed by ``gconv.group_conv_transpose1d``, on the fastest backend.

    Its constructor accepts the arguments of ``nn.ConvTranspose1d``, and an activation. State dicts are
    interchangeable. ``forward`` accepts ``output_size`` too.

    Args:
        in_channels: number of input channels, C.
        out_channels: number of output channels, K.
        kernel_size: length of the kernel, S.
        stride: distance between the outputs of neighboring inputs. Defaults to 1.
        padding: outputs to cut off on each side. Defaults to 0.
        output_padding: outputs to add at the end, less than stride or dilation. Defaults to 0.
        groups: number of groups, which divides C and K. Defaults to 1.
        bias: whether to learn a bias. Defaults to True.
        dilation: distance between the taps of the kernel. Defaults to 1.
        padding_mode: only "zeros". Defaults to "zeros".
        device: device of the parameters. Defaults to None, PyTorch's default device.
        dtype: dtype of the parameters. Defaults to None, PyTorch's default dtype.
        activation: None, "relu", "relu6", "silu" or "hardswish", applied to the result. Defaults to None.

    Shape:
        (N, C, L) -> (N, K, Q), or (C, L) -> (K, Q)

    Raises:
        TypeError: a number is not an integer.
        ValueError: ``groups`` doesn't divide the channels, ``activation`` is unknown, or ``padding_mode`` is
            not "zeros".
        RuntimeError: ``kernel_size``, ``stride`` or ``dilation`` is less than 1, or a padding less than 0.
    """

    _gconv_kind = CONV_TRANSPOSE1D
    _gconv_function = staticmethod(group_conv_transpose1d)
    _gconv_original = nn.ConvTranspose1d


class GroupConvTranspose2d(_Transposed, nn.ConvTranspose2d):
    """An ``nn.ConvTranspose2d`` computed by ``gconv.group_conv_transpose2d``, on the fastest backend.

    Its constructor accepts the arguments of ``nn.ConvTranspose2d``, and an activation. State dicts are
    interchangeable. ``forward`` accepts ``output_size`` too.

    Args:
        in_channels: number of input channels, C.
        out_channels: number of output channels, K.
        kernel_size: size of the kernel, one number or (R, S).
        stride: distance between the outputs of neighboring inputs, one number or (vertical, horizontal).
            Defaults to 1.
        padding: rows and columns to cut off on each side of the output, one number or (vertical, horizontal).
            Defaults to 0.
        output_padding: rows and columns to add at the end of the output, one number or (vertical,
            horizontal), less than stride or dilation. Defaults to 0.
        groups: number of groups, which divides C and K. Defaults to 1.
        bias: whether to learn a bias. Defaults to True.
        dilation: distance between the taps of the kernel, one number or (vertical, horizontal). Defaults to
            1.
        padding_mode: only "zeros". Defaults to "zeros".
        device: device of the parameters. Defaults to None, PyTorch's default device.
        dtype: dtype of the parameters. Defaults to None, PyTorch's default dtype.
        activation: None, "relu", "relu6", "silu" or "hardswish", applied to the result. Defaults to None.

    Shape:
        (N, C, H, W) -> (N, K, P, Q), or (C, H, W) -> (K, P, Q)

    Raises:
        TypeError: a number is not an integer.
        ValueError: ``groups`` doesn't divide the channels, ``activation`` is unknown, or ``padding_mode`` is
            not "zeros".
        RuntimeError: ``kernel_size``, ``stride`` or ``dilation`` is less than 1, or a padding less than 0.

    Examples:
        >>> layer = gconv.GroupConvTranspose2d(64, 64, 4, stride=2, padding=1, groups=64)
        >>> layer(torch.randn(2, 64, 14, 14), output_size=(28, 28)).shape
        torch.Size([2, 64, 28, 28])
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
    """Check the channels and groups of a layer, and return them as ints."""
    groups = integer("groups", groups)
    in_channels, out_channels = integer("in_channels", in_channels), integer("out_channels", out_channels)
    for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
        if channels < 1:
            raise ValueError(f"{name} must be at least 1, got {channels}")
        if groups > 0 and channels % groups:
            raise ValueError(f"{name}={channels} is not divisible by groups={groups}")
    return in_channels, out_channels, groups


def pad_input(layer: Any, input: Tensor) -> tuple[Tensor, Any]:
    """Pad the input with the layer's ``padding_mode``; return it and the padding left to do."""
    if layer.padding_mode == "zeros":
        return input, layer.padding
    return F.pad(input, zeros_around(layer), mode=layer.padding_mode), 0


def is_watched(module: nn.Module) -> bool:
    """Return whether a module has hooks or a replaced forward, so that it must be called as a unit."""
    replaced = {"forward", "_conv_forward"} & module.__dict__.keys()
    return bool(replaced) or has_hooks(module)
