"""Layers for ``kernelize`` of Hugging Face's `kernels`: only a ``forward``, without constructor or state.

``kernelize`` makes these the ``forward`` of PyTorch's own modules, whose parameters and settings they use.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gconv.functional import (
    group_conv1d,
    group_conv2d,
    group_conv3d,
    group_conv_transpose1d,
    group_conv_transpose2d,
)
from gconv.module import pad_input
from gconv.torch_internals import output_padding_of


class Conv1d(nn.Module):
    """The forward of an ``nn.Conv1d``: (N, C, L) -> (N, K, Q)."""

    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return group_conv1d(*_arguments(self, input))


class Conv2d(nn.Module):
    """The forward of an ``nn.Conv2d``: (N, C, H, W) -> (N, K, P, Q)."""

    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return group_conv2d(*_arguments(self, input))


class Conv3d(nn.Module):
    """The forward of an ``nn.Conv3d``: (N, C, D, H, W) -> (N, K, D', P, Q)."""

    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return group_conv3d(*_arguments(self, input))


class ConvTranspose1d(nn.Module):
    """The forward of an ``nn.ConvTranspose1d``: (N, C, L) -> (N, K, Q)."""

    can_torch_compile = True

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return group_conv_transpose1d(*_transposed_arguments(self, input, output_size))


class ConvTranspose2d(nn.Module):
    """The forward of an ``nn.ConvTranspose2d``: (N, C, H, W) -> (N, K, P, Q)."""

    can_torch_compile = True

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return group_conv_transpose2d(*_transposed_arguments(self, input, output_size))


def _arguments(layer: Any, input: Tensor) -> tuple[Any, ...]:
    input, padding = pad_input(layer, input)
    return input, layer.weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups


def _transposed_arguments(layer: Any, input: Tensor, output_size: list[int] | None) -> tuple[Any, ...]:
    extra = output_padding_of(layer, input, output_size)
    return (
        *(input, layer.weight, layer.bias, layer.stride, layer.padding, extra),
        *(layer.groups, layer.dilation),
    )
