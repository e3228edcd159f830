"""The prologue of the kernels: batch norm and ReLU on x, before the convolution.

``norm`` has three numbers for each channel: scale, shift and mean.

    a = max(scale x + shift, 0),  and zero outside the image
"""

from __future__ import annotations

import triton
import triton.language as tl

from gconv.kernels.packing import INTERPRETED, dot, identity


@triton.jit
def load_norm(p_norm, channels, channel, m_channel, USED: tl.constexpr):
    """Load (scale, shift, mean) of a tile's channels, each  # [B]. Return an empty tuple if not USED."""
    norm = ()
    if USED:
        scale = tl.load(p_norm + channel, m_channel, 0.0)
        shift = tl.load(p_norm + channels + channel, m_channel, 0.0)
        norm = (scale, shift, tl.load(p_norm + 2 * channels + channel, m_channel, 0.0))
    return norm


@triton.jit
def normalise(x, norm, m_pixel, PROLOGUE: tl.constexpr):
    """Apply the prologue to a tile, with zeros outside the image. NaN stays NaN, as in PyTorch's ReLU."""
    if PROLOGUE:
        a = x.to(tl.float32) * norm[0][None, :] + norm[1][None, :]
        a = tl.maximum(a, 0.0, propagate_nan=tl.PropagateNan.ALL)
        x = tl.where(m_pixel[:, None], a, 0.0).to(x.dtype)
    return x


@triton.jit
def normalise_row(x, norm, m_columns, inside, PROLOGUE: tl.constexpr):
    """Apply the prologue to what the three taps of a kernel row meet."""
    return (
        normalise(x[0], norm, m_columns[0] & inside, PROLOGUE),
        normalise(x[1], norm, m_columns[1] & inside, PROLOGUE),
        normalise(x[2], norm, m_columns[2] & inside, PROLOGUE),
    )


@triton.jit
def as_sums(x):
    """Return an operand in float32, in the registers where a product's sums are  # [BM, BI], or [B, BM, BI]

    It is the product of x with the identity. That changes no finite number, and puts each one where the next
    product can use it. Without it, Triton would compute where x was loaded, and bring the result through
    shared memory once more. Two products also take fewer instructions than unpacking x. Infinities and NaN
    reach the other lanes of their pack, as they would in the convolution.
    """
    return dot(x, identity(x, x.shape[-1]), tl.zeros(x.shape, tl.float32), "ieee")


@triton.jit
def scale_and_rectify(x, scale, shift, mask, DTYPE: tl.constexpr):
    """Return relu(scale x + shift) in DTYPE, zero where ``mask`` is off. x is in float32."""
    a = tl.maximum(x * scale + shift, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if INTERPRETED:
        return tl.where(mask, a, 0.0).to(DTYPE)
    # A minimum or a product masks two numbers in one instruction. In float16, relu(shift) can overflow, and
    # infinity times zero is NaN. In bfloat16 it can't, and there Triton takes minima in float32.
    a = a.to(DTYPE)
    if a.dtype == tl.float16:
        limit = tl.where(mask, float("inf"), 0.0).to(DTYPE)
        return tl.minimum(a, limit, propagate_nan=tl.PropagateNan.ALL)
    return a * tl.where(mask, 1.0, 0.0).to(DTYPE)


@triton.jit
def normalise_operand(x, norm, m_pixel):
    """Apply the prologue to an operand of a product  # [BM, BI], or [B, BM, BI]"""
    if len(x.shape) == 3:
        scale = norm[0].reshape(x.shape[0], 1, x.shape[2])
        shift = norm[1].reshape(x.shape[0], 1, x.shape[2])
        m = m_pixel[None, :, None]
    else:
        scale, shift, m = norm[0][None, :], norm[1][None, :], m_pixel[:, None]
    return scale_and_rectify(as_sums(x), scale, shift, m, x.dtype)
