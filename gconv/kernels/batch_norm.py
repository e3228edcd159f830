"""Batch norm and ReLU alone, each as one pass over memory, after the equations of ``gconv.batch_norm``.

The convolution kernels compute the norms next to a convolution. These kernels compute the rest: the
statistics of its input, norm and ReLU of its output, and their gradients. Tensors are pixels x channels,
channels_last.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gconv.kernels.device import Device, device_of
from gconv.kernels.epilogue import add_moments, merge, store_sums, through_relu
from gconv.kernels.launch import PARTIALS, PLANS_KEPT, Launch
from gconv.kernels.packing import load_tile, store_tile
from gconv.kernels.prologue import load_norm
from gconv.kernels.prologue import normalise as normalise_tile
from gconv.kernels.tiles import Tile, power_of_two

WAVES = 4  # waves of programs that share the pixels of a channel


@triton.jit
def locate(i_tile, i_block, pixels, channels, BM: tl.constexpr, BC: tl.constexpr):
    """Return a tile's first offset; offsets from there  # [BM, BC]; its channels; and which pixels exist."""
    channel = i_block * BC + tl.arange(0, BC)
    lane = tl.arange(0, BM)
    first = tl.cast(i_tile, tl.int64) * BM
    return first * channels, lane[:, None] * channels + channel[None, :], channel, first + lane < pixels


@triton.jit(do_not_specialize=["pixels"])
def normalise_kernel(p_x, p_norm, p_y, pixels, channels, blocks, BM: tl.constexpr, BC: tl.constexpr):
    """y = max(scale x + shift, 0). Grid: blocks of BC channels, fastest; tiles of BM pixels."""
    i_block, i_tile = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    at, o, c, m = locate(i_tile, i_block, pixels, channels, BM, BC)
    norm = load_norm(p_norm, channels, c, c < channels, True)
    x = load_tile(p_x + at, o, m, c < channels, False)
    store_tile(p_y + at, o, normalise_tile(x, norm, m, True), m, c < channels, False)


@triton.jit(do_not_specialize=["pixels"])
def through_norm_kernel(
    p_dy, p_x, p_norm, p_slope, p_dx, pixels, channels, blocks, BM: tl.constexpr, BC: tl.constexpr
):
    """dx = scale dz + slope[0] (x - mean) + slope[1]; dz is dy where the ReLU let x through, else zero.

    Grid: blocks of BC channels, fastest; tiles of BM pixels.
    """
    i_block, i_tile = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    at, o, c, m = locate(i_tile, i_block, pixels, channels, BM, BC)
    norm = load_norm(p_norm, channels, c, c < channels, True)
    by_distance = tl.load(p_slope + c, c < channels, 0.0)
    constant = tl.load(p_slope + channels + c, c < channels, 0.0)
    x = load_tile(p_x + at, o, m, c < channels, False).to(tl.float32)
    dz = through_relu(load_tile(p_dy + at, o, m, c < channels, False), x, norm, m).to(tl.float32)
    dx = dz * norm[0][None, :] + (x - norm[2][None, :]) * by_distance[None, :] + constant[None, :]
    store_tile(p_dx + at, o, dx, m, c < channels, False)


@triton.jit(do_not_specialize=["pixels", "tiles", "splits"])
def gather_kernel(
    p_x, p_dy, p_norm, p_sums, pixels, channels, blocks, tiles, splits,
    EPILOGUE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The moments of x, or the two sums of dz, in parts.

    Grid: blocks of BC channels, fastest; splits, each of every ``splits``-th tile of BM pixels.
    """
    i_block, i_split = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    c = i_block * BC + tl.arange(0, BC)
    norm = load_norm(p_norm, channels, c, c < channels, EPILOGUE == "gradient")
    zero = tl.zeros([BM, BC], tl.float32)
    sums = (zero, zero)
    counts = tl.zeros([BM], tl.int32)
    for i_tile in range(i_split, tiles, splits):
        at, o, c, m = locate(i_tile, i_block, pixels, channels, BM, BC)
        x = load_tile(p_x + at, o, m, c < channels, False).to(tl.float32)
        counts += m.to(tl.int32)
        if EPILOGUE == "gradient":
            dz = through_relu(load_tile(p_dy + at, o, m, c < channels, False), x, norm, m).to(tl.float32)
            sums = (sums[0] + dz, sums[1] + dz * (x - norm[2][None, :]))
        else:
            # Lanes past the last pixel get their mean again, which changes nothing.
            sums = add_moments(sums, tl.where(m[:, None], x, sums[0]), (i_tile - i_split) // splits + 1)
    store_sums(p_sums, i_split, sums, counts, channels, c, c < channels, EPILOGUE)


def normalise(x: Tensor, norm: Tensor) -> Tensor:
    """Return max(scale x + shift, 0), (N, C, H, W) in channels_last."""
    x = _dense(x)
    y = torch.empty_like(x)
    plan_norm(normalise_kernel, x.numel() // x.shape[1], x.shape[1])(x, norm, y)
    return y


def moments(x: Tensor) -> Tensor:
    """Return (2, C): mean and biased variance of each channel of x (N, C, H, W)."""
    x = _dense(x)
    return _gather(x, None, None, "moments")


def grad_sums(grad: Tensor, x: Tensor, norm: Tensor) -> Tensor:
    """Return (2, C): the two sums, from the output's gradient ``grad``."""
    return _gather(_dense(x), _dense(grad), norm, "gradient")


def through_norm(grad: Tensor, x: Tensor, norm: Tensor, slope: Tensor) -> Tensor:
    """Return dx (N, C, H, W) from the output's gradient ``grad`` and slope (2, C)."""
    grad, x = _dense(grad), _dense(x)
    dx = torch.empty_like(x)
    plan_norm(through_norm_kernel, x.numel() // x.shape[1], x.shape[1])(grad, x, norm, slope, dx)
    return dx


def _gather(x: Tensor, grad: Tensor | None, norm: Tensor | None, epilogue: str) -> Tensor:
    channels = x.shape[1]
    plan = plan_gather(x.numel() // channels, channels, epilogue, device_of(x.device))
    size = (plan.arguments["splits"], PARTIALS[epilogue], channels)
    parts = torch.empty(size, dtype=torch.float32, device=x.device)
    plan(x, grad, norm, parts)
    return merge(parts, epilogue)


def _dense(tensor: Tensor) -> Tensor:
    """Return ``tensor`` as pixels x channels without gaps, copied only if necessary."""
    return tensor.contiguous(memory_format=torch.channels_last)


def _tile(channels: int) -> Tile:
    """Return a tile in which a thread has eight adjacent numbers: a 16-byte load."""
    lanes = min(64, max(16, power_of_two(channels)))
    return Tile("batch_norm", 1, 2048 // lanes, lanes, lanes, warps=4)


@lru_cache(PLANS_KEPT)
def plan_norm(kernel: object, pixels: int, channels: int) -> Launch:
    """Plan a kernel that visits each tile of pixels and channels once."""
    tile = _tile(channels)
    blocks = -(-channels // tile.outputs)
    values = {"pixels": pixels, "channels": channels, "blocks": blocks}
    values |= {"BM": tile.pixels, "BC": tile.outputs}
    return Launch.of(kernel, blocks * -(-pixels // tile.pixels), values, tile)


@lru_cache(PLANS_KEPT)
def plan_gather(pixels: int, channels: int, epilogue: str, device: Device) -> Launch:
    """Plan how sums over the pixels are gathered."""
    tile = _tile(channels)
    blocks, tiles = -(-channels // tile.outputs), -(-pixels // tile.pixels)
    splits = min(tiles, max(1, WAVES * tile.resident * device.processors // blocks))
    values: dict[str, Any] = {"pixels": pixels, "channels": channels, "blocks": blocks}
    values |= {"tiles": tiles, "splits": splits, "EPILOGUE": epilogue, "BM": tile.pixels, "BC": tile.outputs}
    absent = () if epilogue == "gradient" else ("p_dy", "p_norm")
    return Launch.of(gather_kernel, blocks * splits, values, tile, absent)
