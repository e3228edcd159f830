"""The interface of a backend: a module with the functions of ``Backend``.

Arguments have the order of ``gconv.group_conv2d``, with a geometry instead of stride, padding, dilation
and groups. ``gconv.functional`` has checked them already.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from gconv.geometry import ConvGeometry


class Backend(Protocol):
    """The three passes, alone and with batch norm and ReLU around the convolution.

    x is (N, C, H, W), y (N, K, P, Q), w (K, C / groups, R, S); dx, dy and dw are their gradients. ``norm``
    (3, C) is explained in ``gconv.batch_norm``: a = relu(scale x + shift). Results may have any layout.
    """

    def forward(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: ConvGeometry,
        activation: str | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Return y = activation(conv(x) + bias + residual)."""

    def input_grad(
        self,
        grad_output: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: ConvGeometry,
        activation: str | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Return activation(dx + bias + residual), with dx from dy and w.

        The bias (C,) is that of a transposed convolution; as a gradient, the pass has none.
        """

    def weight_grad(
        self, grad_output: Tensor, input: Tensor, geometry: ConvGeometry, with_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return dw, and dbias (K,) if ``with_bias``, from dy and x."""

    def norm_forward(
        self, input: Tensor, norm: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry
    ) -> tuple[Tensor, Tensor]:
        """Return y = conv(a) + bias, and the mean and variance of its channels, (2, K)."""

    def norm_input_grad(
        self, grad_output: Tensor, weight: Tensor, input: Tensor, norm: Tensor, geometry: ConvGeometry
    ) -> tuple[Tensor, Tensor]:
        """Return the gradient of scale x + shift from dy, and its sums for batch norm, (2, C)."""

    def norm_weight_grad(
        self, grad_output: Tensor, input: Tensor, norm: Tensor, geometry: ConvGeometry, with_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return dw, and dbias (K,) if ``with_bias``, from dy and a."""
