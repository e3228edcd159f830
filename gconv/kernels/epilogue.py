"""The epilogues of the kernels: what they do to outputs before storing them, to save passes over memory.

residual   y = activation(y + bias + residual)
moments    y unchanged, and the mean and sum of squared deviations of each channel, for the next batch norm
gradient   dx = dy where scale x + shift > 0, with the sums of dx and dx (x - mean): the gradient of ReLU, and
           what the gradient of batch norm needs
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gconv.kernels.launch import PLANS_KEPT, Launch
from gconv.kernels.packing import as_mask
from gconv.kernels.tiles import Tile


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """Apply the activation, on float32. NaN stays NaN, as in PyTorch."""
    if ACTIVATION == "relu":
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "relu6":
        y = tl.where(y < 0, 0.0, tl.where(y > 6, 6.0, y))
    elif ACTIVATION == "silu":
        y = y / (1 + tl.exp(-y))
    elif ACTIVATION == "hardswish":
        y = y * tl.where(y < -3, 0.0, tl.where(y > 3, 1.0, (y + 3) / 6))
    return y


class Sink(NamedTuple):
    """Where a row of outputs goes, and what is added to its sums.

    Args:
        p_y: the outputs. ``at`` is the distance of a row from there.
        p_side: the residual, or x for a gradient, laid out like y.
        bias: a tuple of the bias of the tile's channels  # [BO]; empty without a bias.
        offset: offsets of a tile in its row  # [BM, BO]
        step: distance from one column of a strip to the next.
        masks: masks of pixels, one for each column of a strip.
        m_channel: a tuple of the mask of existing channels  # [BO]; empty if all exist.
        norm: batch norm of the outputs' channels, for a gradient.
    """

    p_y: Any
    p_side: Any
    bias: Any
    offset: Any
    step: Any
    masks: Any
    m_channel: Any
    norm: Any


@triton.jit
def load_bias(p_bias, channel, m_channel):
    """Load ``Sink.bias``, in float32."""
    bias = ()
    if p_bias is not None:
        bias = (tl.load(p_bias + channel, m_channel, 0.0).to(tl.float32),)
    return bias


@triton.jit
def mask_sink(sink, m_pixel):
    """Return the mask of a tile of outputs  # [BM, BO], or [BM, 1] if all channels exist"""
    mask = as_mask(m_pixel)[:, None]
    if len(sink.m_channel) > 0:
        mask = mask & sink.m_channel[0][None, :]
    return mask


@triton.jit
def finish(acc, sink, at, offset, m_pixel, ACTIVATION: tl.constexpr, EPILOGUE: tl.constexpr):
    """Return the float32 sums of a tile with bias, residual and activation, in the type of y."""
    if len(sink.bias) > 0:
        acc += sink.bias[0][None, :]
    if EPILOGUE == "residual":
        acc += tl.load(sink.p_side + at + offset, mask_sink(sink, m_pixel), 0.0).to(tl.float32)
    return activate(acc, ACTIVATION).to(sink.p_y.dtype.element_ty)


@triton.jit
def emit(acc, sums, rows, sink, at, m_pixel, ACTIVATION: tl.constexpr, EPILOGUE: tl.constexpr):
    """Apply the epilogue to the float32 sums of a tile and store it; return ``sums`` with the tile added.

    ``rows``: number of this row, counted from 1.
    """
    y = finish(acc, sink, at, sink.offset, m_pixel, ACTIVATION, EPILOGUE)
    mask = mask_sink(sink, m_pixel)
    if EPILOGUE == "gradient":
        x = tl.load(sink.p_side + at + sink.offset, mask, 0.0).to(tl.float32)
        y = through_relu(y, x, sink.norm, m_pixel).to(y.dtype)
        sums = (sums[0] + y, sums[1] + y.to(tl.float32) * (x - sink.norm[2][None, :]))
    if EPILOGUE == "moments":
        sums = add_moments(sums, y.to(tl.float32), rows)
    tl.store(sink.p_y + at + sink.offset, y, mask)
    return sums


@triton.jit
def through_relu(grad, x, norm, m_pixel):
    """Return ``grad`` where the prologue let x through, and zero elsewhere and outside the image."""
    stopped = x * norm[0][None, :] + norm[1][None, :] <= 0
    return tl.where(stopped | ~m_pixel[:, None], 0.0, grad)


@triton.jit
def add_gradient(sums, grad, x, norm):
    """Add the two halves of a gradient, and of its product with x - mean, to their sums."""
    grad = grad.to(tl.float32)
    g0, g1 = halves(grad)
    p0, p1 = halves(grad * (x - norm[2][None, :]))
    return sums[0] + g0 + g1, sums[1] + p0 + p1


@triton.jit
def add_moments(sums, y, rows):
    """Update Welford's running mean and squared deviations of each lane; y is its number ``rows``.

    This is stable, however far the mean is from zero, because only differences from the mean are squared.
    Before the first row, nothing is added.
    """
    mean, squares = sums
    apart = tl.where(rows > 0, y - mean, 0.0)
    part = 1.0 / tl.maximum(rows, 1)
    return mean + apart * part, squares + apart * (1.0 - part) * apart


@triton.jit
def halves(tile):
    """Return the upper and lower half of a tile's rows; in the layout of sums, two registers of a thread."""
    return tile.reshape(2, tile.shape[0] // 2, tile.shape[1]).permute(1, 2, 0).split()


@triton.jit
def add_apart(sums, y, m_pixel, begins):
    """Add y minus the first number of its lane, and the square of that, with both halves in one lane.

    This is as stable as Welford's algorithm, in fewer instructions. For n numbers y of mean m, the first of
    them f:

        sum of (y - f)^2 = sum of (y - m)^2 + n (f - m)^2 <= (n + 1) sum of (y - m)^2

    because f is one of them. So the subtraction loses at most n + 1 epsilons, wherever the mean is.
    """
    start, total, squares = sums
    y0, y1 = halves(y)
    start = tl.where(begins, y0, start)
    m0, m1 = m_pixel.reshape(2, start.shape[0]).permute(1, 0).split()
    apart = tl.where(m0[:, None], y0 - start, 0.0)
    total, squares = total + apart, squares + apart * apart
    apart = tl.where(m1[:, None], y1 - start, 0.0)
    return start, total + apart, squares + apart * apart


@triton.jit
def mean_and_squares(sums, counts):
    """Convert the sums of ``add_apart``, of ``counts`` numbers per lane, for ``store_sums``."""
    start, total, squares = sums
    step = total / tl.maximum(counts, 1)[:, None]
    return start + step, squares - step * total


@triton.jit
def store_sums(p_sums, i_part, sums, counts, channels, channel, m_channel, EPILOGUE: tl.constexpr):
    """Store a program's part of the sums: all of its lanes, of ``counts`` numbers each  # [BM]

    The parts are laid out (parts, 3 or 2, channels): mean, squared deviations and count; or the two sums.
    """
    if EPILOGUE == "moments":
        counts = counts.to(tl.float32)
        count = tl.sum(counts, 0)
        used = (counts > 0)[:, None]
        mean = tl.sum(tl.where(used, sums[0] * counts[:, None], 0.0), 0) / tl.maximum(count, 1.0)
        apart = tl.where(used, sums[0] - mean[None, :], 0.0)
        squares = tl.sum(tl.where(used, sums[1], 0.0) + counts[:, None] * apart * apart, 0)
        p_sums += i_part.to(tl.int64) * 3 * channels + channel
        tl.store(p_sums, mean, m_channel)
        tl.store(p_sums + channels, squares, m_channel)
        tl.store(p_sums + 2 * channels, tl.zeros_like(mean) + count, m_channel)
    if EPILOGUE == "gradient":
        p_sums += i_part.to(tl.int64) * 2 * channels + channel
        tl.store(p_sums, tl.sum(sums[0], 0), m_channel)
        tl.store(p_sums + channels, tl.sum(sums[1], 0), m_channel)


@triton.jit(do_not_specialize=["parts", "channels"])
def merge_kernel(
    p_parts, p_result, parts, channels,
    EPILOGUE: tl.constexpr, BS: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Merge the parts that programs stored, in fixed order.

    For moments: mean and variance of all pixels, from parts i of n_i pixels, mean m_i and squares s_i:

        mean = sum n_i m_i / sum n_i,    variance = (sum s_i + n_i (m_i - mean)^2) / sum n_i

    Grid: blocks of BE channels. In registers: BS running totals of each, [BS, BE], added up at the end.
    """
    c = tl.program_id(0) * BE + tl.arange(0, BE)
    part = tl.arange(0, BS)
    zero = tl.zeros([BS, BE], tl.float32)
    if EPILOGUE == "gradient":
        first, second = zero, zero
        for start in range(0, parts, BS):
            o = (start + part).to(tl.int64)[:, None] * (2 * channels) + c[None, :]
            m = (start + part < parts)[:, None] & (c < channels)[None, :]
            first += tl.load(p_parts + o, m, 0.0)
            second += tl.load(p_parts + channels + o, m, 0.0)
        tl.store(p_result + c, tl.sum(first, 0), c < channels)
        tl.store(p_result + channels + c, tl.sum(second, 0), c < channels)
    else:
        count, total = zero, zero
        for start in range(0, parts, BS):
            o = (start + part).to(tl.int64)[:, None] * (3 * channels) + c[None, :]
            m = (start + part < parts)[:, None] & (c < channels)[None, :]
            pixels = tl.load(p_parts + 2 * channels + o, m, 0.0)
            count += pixels
            total += pixels * tl.load(p_parts + o, m, 0.0)
        pixels_in_all = tl.maximum(tl.sum(count, 0), 1.0)
        mean = tl.sum(total, 0) / pixels_in_all
        squares = zero
        for start in range(0, parts, BS):
            o = (start + part).to(tl.int64)[:, None] * (3 * channels) + c[None, :]
            m = (start + part < parts)[:, None] & (c < channels)[None, :]
            apart = tl.load(p_parts + o, m, 0.0) - mean[None, :]
            pixels = tl.load(p_parts + 2 * channels + o, m, 0.0)
            squares += tl.load(p_parts + channels + o, m, 0.0) + pixels * apart * apart
        tl.store(p_result + c, mean, c < channels)
        tl.store(p_result + channels + c, tl.sum(squares, 0) / pixels_in_all, c < channels)


MERGER = Tile("merge", groups=1, pixels=32, inputs=32, outputs=32, warps=4)


def merge(parts: Tensor, epilogue: str) -> Tensor:
    """Return (2, channels) from (parts, 3 or 2, channels): mean and variance, or the two sums."""
    result = torch.empty((2, parts.shape[2]), dtype=torch.float32, device=parts.device)
    plan_merge(len(parts), parts.shape[2], epilogue)(parts, result)
    return result


@lru_cache(PLANS_KEPT)
def plan_merge(parts: int, channels: int, epilogue: str) -> Launch:
    """Plan how ``parts`` parts are merged."""
    values = {"parts": parts, "channels": channels, "EPILOGUE": epilogue}
    values |= {"BS": MERGER.pixels, "BE": MERGER.outputs}
    return Launch.of(merge_kernel, -(-channels // MERGER.outputs), values, MERGER)
