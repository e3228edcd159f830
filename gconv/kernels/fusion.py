"""What the kernels do to tiles on their way in and out, so that no other pass over memory has to.

The prologue is the batch norm and ReLU before a convolution, applied to x as it is loaded. ``norm`` holds its
three numbers for each channel:

    a = max(scale x + shift, 0),  and zero outside the image

An epilogue is applied to the sums before they are stored:

    residual   y = activation(y + bias + residual)
    moments    y as it is, and mean and sum of squared deviations of each channel, for the next batch norm
    gradient   dx = dy where scale x + shift > 0, with the sums of dx and dx (x - mean): the way back through
               ReLU, and what batch norm's gradient needs of it
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gconv.geometry import ConvGeometry
from gconv.kernels.choice import tile_of
from gconv.kernels.launch import PLANS_KEPT, Launch, Operands
from gconv.kernels.packing import INTERPRETED, as_mask, dot
from gconv.kernels.rules import norm_tile
from gconv.kernels.tiles import SLIDE_LANES, Tile

PARTIALS = {"moments": 3, "gradient": 2}  # numbers that a program leaves of each channel


class Fusion(NamedTuple):
    """What runs inside a kernel beside the convolution.

    Args:
        bias: added to the sums.
        activation: None, "relu", "relu6", "silu" or "hardswish", after bias and residual.
        prologue: batch norm and ReLU on x.
        epilogue: "plain", "residual", "moments" or "gradient".
    """

    bias: bool = False
    activation: str | None = None
    prologue: bool = False
    epilogue: str = "plain"

    @property
    def values(self) -> dict[str, bool | str]:
        """The kernels' arguments."""
        names = ("BIAS", "ACTIVATION", "PROLOGUE", "EPILOGUE")
        return dict(zip(names, (self.bias, self.activation or "", self.prologue, self.epilogue), strict=True))

    def tile(self, pass_: str, geometry: ConvGeometry, operands: Operands) -> Tile:
        """The tile that a pass runs in unless its caller gives one."""
        choose = norm_tile if self.prologue or self.epilogue in PARTIALS else tile_of
        tile = choose(pass_, geometry, *operands.kind)
        if self.epilogue == "residual" and tile.kernel == "slide" and tile.warps == 1:
            return replace(tile, warps=2, registers=None)  # one warp lacks the registers for a residual
        if self.epilogue == "residual" and tile.kernel == "strips":
            most = 2 if tile.inputs <= SLIDE_LANES else 1  # wider strips lack them, too
            return replace(tile, columns=min(tile.columns, most))
        if self.bias and pass_ == "weight_grad" and tile.kernel == "strips":
            most = max(1, 6 // (tile.packs * operands.dtype.itemsize))  # the sums of dy take some
            return replace(tile, columns=min(tile.columns, most))
        return tile


PLAIN = Fusion()


@triton.jit
def load_norm(p_norm, channels, channel, m_channel, USED: tl.constexpr):
    """(scale, shift, mean) of a tile's channels, each  # [B]. Zeros, which cost nothing, if not USED."""
    p, m = p_norm + channel, m_channel & USED
    return tl.load(p, m, 0.0), tl.load(p + channels, m, 0.0), tl.load(p + 2 * channels, m, 0.0)


@triton.jit
def normalise(x, norm, m_pixel, PROLOGUE: tl.constexpr):
    """The prologue on a tile, where a pixel is in the image. NaN stays NaN, as in PyTorch's ReLU."""
    if not PROLOGUE:
        return x
    a = x.to(tl.float32) * norm[0][None, :] + norm[1][None, :]
    a = tl.maximum(a, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(m_pixel[:, None], a, 0.0).to(x.dtype)


@triton.jit
def normalise_row(x, norm, m_columns, inside, PROLOGUE: tl.constexpr):
    """The prologue on what the three taps of a kernel row meet."""
    return (
        normalise(x[0], norm, m_columns[0] & inside, PROLOGUE),
        normalise(x[1], norm, m_columns[1] & inside, PROLOGUE),
        normalise(x[2], norm, m_columns[2] & inside, PROLOGUE),
    )


@triton.jit
def as_sums(x):
    """An operand in float32, in the registers where a product's sums are  # [BM, BI], or [B, BM, BI]

    It is the product of x with ones on the diagonal. That leaves each number as it is, and puts it where the
    next product can take it from. Without it, Triton computes where x was loaded, and takes what comes of it
    through shared memory once more. Two products take fewer instructions than to unpack x, too. What is not
    finite reaches the other lanes of its pack, as it would in the convolution.
    """
    side: tl.constexpr = x.shape[-1]
    lane = tl.arange(0, side)
    ones = tl.where(lane[:, None] == lane[None, :], 1.0, 0.0).to(x.dtype)
    if len(x.shape) == 3:
        ones = tl.broadcast_to(ones[None, :, :], x.shape[0], side, side)
    return dot(x, ones, tl.zeros(x.shape, tl.float32), "ieee")


@triton.jit
def normalise_operand(x, norm, m_pixel):
    """The prologue on an operand of a product  # [BM, BI], or [B, BM, BI]"""
    if len(x.shape) == 3:
        scale = norm[0].reshape(x.shape[0], 1, x.shape[2])
        shift = norm[1].reshape(x.shape[0], 1, x.shape[2])
        m = m_pixel[None, :, None]
    else:
        scale, shift, m = norm[0][None, :], norm[1][None, :], m_pixel[:, None]
    a = tl.maximum(as_sums(x) * scale + shift, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if INTERPRETED:
        return tl.where(m, a, 0.0).to(x.dtype)
    # A product is of two numbers at once, a selection of one.
    return a.to(x.dtype) * tl.where(m, 1.0, 0.0).to(x.dtype)


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """The activation, on float32. NaN stays NaN, as in PyTorch's."""
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
    """Where a row of outputs goes, and what goes into them beside the sums.

    Args:
        p_y: the outputs, ``at`` a row's distance from there.
        p_side: the residual, or x of a gradient, which lies as y does.
        bias: a tuple of the tile's channels' numbers  # [BO]; empty if there are none.
        offset: of a tile in its row  # [BM, BO]
        step: from one column of a strip to the next.
        masks: of pixels, one for each column of a strip.
        m_channel: a tuple of which channels exist  # [BO]; empty if all do.
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
def load_bias(p_bias, channel, m_channel, BIAS: tl.constexpr):
    """``Sink.bias``, in float32."""
    return (tl.load(p_bias + channel, m_channel, 0.0).to(tl.float32),) if BIAS else ()


@triton.jit
def mask_sink(sink, m_pixel):
    """The mask of a tile of outputs  # [BM, BO], or [BM, 1] where all channels exist"""
    mask = as_mask(m_pixel)[:, None]
    if len(sink.m_channel) > 0:
        mask = mask & sink.m_channel[0][None, :]
    return mask


@triton.jit
def finish(acc, sink, at, offset, m_pixel, ACTIVATION: tl.constexpr, EPILOGUE: tl.constexpr):
    """The float32 sums of a tile with bias and residual, through the activation, in y's type."""
    if len(sink.bias) > 0:
        acc += sink.bias[0][None, :]
    if EPILOGUE == "residual":
        acc += tl.load(sink.p_side + at + offset, mask_sink(sink, m_pixel), 0.0).to(tl.float32)
    return activate(acc, ACTIVATION).to(sink.p_y.dtype.element_ty)


@triton.jit
def emit(acc, sums, rows, sink, at, m_pixel, ACTIVATION: tl.constexpr, EPILOGUE: tl.constexpr):
    """The epilogue on the float32 sums of a tile, then its store; ``sums`` with the tile in them.

    ``rows``: this one is the so many-th.
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
    """``grad`` where the prologue let x through; zero elsewhere, and outside the image."""
    stopped = x * norm[0][None, :] + norm[1][None, :] <= 0
    return tl.where(stopped | ~m_pixel[:, None], 0.0, grad)


@triton.jit
def add_gradient(sums, grad, x, norm):
    """The sums of a gradient and of its product with x less its mean, of both halves."""
    grad = grad.to(tl.float32)
    g0, g1 = halves(grad)
    p0, p1 = halves(grad * (x - norm[2][None, :]))
    return sums[0] + g0 + g1, sums[1] + p0 + p1


@triton.jit
def add_moments(sums, y, rows):
    """Welford's running mean and squared deviations of each lane, whose ``rows``-th number is y.

    Stable, however far the mean is from zero: differences from the mean are all that is ever squared. Before
    the first row, nothing is added.
    """
    mean, squares = sums
    apart = tl.where(rows > 0, y - mean, 0.0)
    part = 1.0 / tl.maximum(rows, 1)
    return mean + apart * part, squares + apart * (1.0 - part) * apart


@triton.jit
def halves(tile):
    """The upper and the lower half of a tile's rows: in tensor cores' sums, two registers of a thread."""
    return tile.reshape(2, tile.shape[0] // 2, tile.shape[1]).permute(1, 2, 0).split()


@triton.jit
def add_apart(sums, y, m_pixel, begins):
    """Sums of y less the first number of its lane, and of the squares of that, both halves in one lane.

    Stable, as Welford's way is, in fewer instructions. For n numbers y of mean m, the first of them f:

        sum of (y - f)^2 = sum of (y - m)^2 + n (f - m)^2 <= (n + 1) sum of (y - m)^2

    since f is one of them. So n + 1 epsilons are the most that the subtraction loses, wherever the mean is.
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
    """What :func:`store_sums` takes, from what :func:`add_apart` made of ``counts`` numbers of each lane."""
    start, total, squares = sums
    step = total / tl.maximum(counts, 1)[:, None]
    return start + step, squares - step * total


@triton.jit
def store_sums(p_sums, i_part, sums, counts, channels, channel, m_channel, EPILOGUE: tl.constexpr):
    """A program's part of the sums, of all its lanes, which took ``counts`` numbers each  # [BM]

    Laid out (parts, 3 or 2, channels): mean, squared deviations and how many; or the two sums.
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
    """The parts that programs left, merged in fixed order.

    Of moments: mean and variance of all pixels, from parts i of n_i pixels, mean m_i and squares s_i:

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
    """(2, channels) from (parts, 3 or 2, channels): mean and variance, or the two sums."""
    result = torch.empty((2, parts.shape[2]), dtype=torch.float32, device=parts.device)
    plan_merge(len(parts), parts.shape[2], epilogue)(parts, result)
    return result


@lru_cache(PLANS_KEPT)
def plan_merge(parts: int, channels: int, epilogue: str) -> Launch:
    """How ``parts`` parts are merged."""
    values = {"parts": parts, "channels": channels, "EPILOGUE": epilogue}
    values |= {"BS": MERGER.pixels, "BE": MERGER.outputs}
    return Launch.of(merge_kernel, -(-channels // MERGER.outputs), values, MERGER)
