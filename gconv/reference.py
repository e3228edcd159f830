"""The three passes in plain PyTorch, each written as its equation: slow, but easy to check.

With taps (r, s), strides (u, v), dilations (d, e) and x padded with zeros, output pixel (p, q) meets input
pixel (u p + d r, v q + e s) through weight w[r, s], inside each group g:

    forward      y[n,g,k,p,q]  = b[g,k] + sum over c,r,s of x[n,g,c,up+dr,vq+es] w[g,k,c,r,s]
    input_grad   dx[n,g,c,i,j] = sum over k,r,s of dy[n,g,k,p,q] w*[g,k,c,r,s]  with i = up+dr, j = vq+es
    weight_grad  dw[g,k,c,r,s] = sum over n,p,q of dy[n,g,k,p,q] x*[n,g,c,up+dr,vq+es]

* conjugates complex numbers. 16-bit tensors are multiplied and summed in float32 and rounded once. The batch
norms that kernels can compute before and after a convolution are in ``gconv.batch_norm``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gconv import batch_norm
from gconv.activation import finish
from gconv.batch_norm import wide
from gconv.geometry import ConvGeometry


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return y = activation(conv(input) + bias + residual).

    Shapes: y and residual (N, K, P, Q), input (N, C, H, W), weight (K, C / groups, R, S), bias (K,).
    """
    n, k, p, q = geometry.output_size
    padded, weight = _pad(wide(input), geometry), wide(weight)
    output = padded.new_zeros(n, geometry.groups, k // geometry.groups, p, q)
    for r, s, pixels in _taps(geometry):
        tap = _by_group(weight[:, :, r, s], 0, geometry)
        output += torch.einsum("ngcpq,gkc->ngkpq", _by_group(padded[pixels], 1, geometry), tap)
    output = output.reshape(n, k, p, q)
    if bias is not None:
        output += wide(bias).view(k, 1, 1)
    return finish(output, None if residual is None else wide(residual), activation).to(input.dtype)


def input_grad(
    grad_output: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return activation(dx + bias + residual), (N, C, H, W), from grad_output (N, K, P, Q) and weight."""
    n, c, h, w = geometry.input_size
    top, bottom, left, right = geometry.padding
    grads, weight = _by_group(wide(grad_output), 1, geometry), wide(weight)
    padded = grads.new_zeros(n, c, top + h + bottom, left + w + right)
    for r, s, pixels in _taps(geometry):
        tap = _by_group(weight[:, :, r, s].conj(), 0, geometry)
        padded[pixels] += torch.einsum("ngkpq,gkc->ngcpq", grads, tap).flatten(1, 2)
    output = padded[:, :, top : top + h, left : left + w]
    if bias is not None:
        output += wide(bias).view(c, 1, 1)
    return finish(output, None if residual is None else wide(residual), activation).to(grad_output.dtype)


def weight_grad(
    grad_output: Tensor, input: Tensor, geometry: ConvGeometry, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Return dw (K, C / groups, R, S), and dbias (K,) or None, from grad_output (N, K, P, Q) and input."""
    padded, grads = _pad(wide(input), geometry), wide(grad_output)
    weight = grads.new_empty(geometry.weight_size)
    for r, s, pixels in _taps(geometry):
        met = _by_group(padded[pixels].conj(), 1, geometry)
        tap = torch.einsum("ngkpq,ngcpq->gkc", _by_group(grads, 1, geometry), met)
        weight[:, :, r, s] = tap.flatten(0, 1)
    bias = grads.sum((0, 2, 3)).to(input.dtype) if with_bias else None
    return weight.to(input.dtype), bias


norm_forward = partial(batch_norm.norm_forward, forward)
norm_input_grad = partial(batch_norm.norm_input_grad, input_grad)
norm_weight_grad = partial(batch_norm.norm_weight_grad, weight_grad)


def _taps(geometry: ConvGeometry) -> Iterator[tuple[int, int, tuple[slice, ...]]]:
    """Yield each tap r, s with an index of its pixels in the padded image, one pixel for each output."""
    _, _, p, q = geometry.output_size
    _, _, kernel_h, kernel_w = geometry.weight_size
    for r in range(kernel_h):
        for s in range(kernel_w):
            rows = _every(geometry.stride[0], r * geometry.dilation[0], p)
            columns = _every(geometry.stride[1], s * geometry.dilation[1], q)
            yield r, s, (slice(None), slice(None), rows, columns)


def _every(step: int, start: int, count: int) -> slice:
    return slice(start, start + step * (count - 1) + 1, step)


def _by_group(tensor: Tensor, channel_dim: int, geometry: ConvGeometry) -> Tensor:
    """Split the channels at ``channel_dim`` into (groups, channels of one group)."""
    return tensor.unflatten(channel_dim, (geometry.groups, -1))


def _pad(input: Tensor, geometry: ConvGeometry) -> Tensor:
    top, bottom, left, right = geometry.padding
    return F.pad(input, (left, right, top, bottom))
