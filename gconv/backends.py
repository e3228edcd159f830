"""What a backend is: a module with the functions of :class:`Backend`.

Arguments keep the order of :func:`gconv.group_conv2d`, with a geometry in place of stride, padding, dilation
and groups. :mod:`gconv.functional` has checked them all.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from gconv.geometry import ConvGeometry


class Backend(Protocol):
    """The three passes, and the same with batch norm and ReLU around the convolution.

    x is (N, C, H, W), y (N, K, P, Q), w (K, C / groups, R, S); dx, dy and dw are their gradients. ``norm``
    (3, C) is that of :mod:`gconv.batch_norm`: a = relu(scale x + shift). Results may have any layout.
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

        A transposed convolution is this pass with a bias (C,); as a gradient it has none.
        """

    def weight_grad(
        self, grad_output: Tensor, input: Tensor, geometry: ConvGeometry, with_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return dw and, if asked, dbias (K,) from dy and x."""

    def norm_forward(
        self, input: Tensor, norm: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry
    ) -> tuple[Tensor, Tensor]:
        """Return y = conv(a) + bias, and mean and variance (2, K) of its channels."""

    def norm_input_grad(
        self, grad_output: Tensor, weight: Tensor, input: Tensor, norm: Tensor, geometry: ConvGeometry
    ) -> tuple[Tensor, Tensor]:
        """Return the gradient of scale x + shift from dy, and the sums (2, C) that batch norm needs of it."""

    def norm_weight_grad(
        self, grad_output: Tensor, input: Tensor, norm: Tensor, geometry: ConvGeometry, with_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return dw and, if asked, dbias (K,) from dy and a."""
