"""``explain``: what one convolution costs, the least that it could cost, and which backend runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gconv import dispatch
from gconv.arguments import prepare
from gconv.autograd import gradient_possible
from gconv.batch_norm import wide_dtype
from gconv.geometry import ConvGeometry
from gconv.kinds import KINDS, Call, kind_of, layout_of
from gconv.measure.timing import copy_speed
from gconv.module import pad_input


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; ``print`` it as a few lines.

    Attributes:
        layer: the layer's repr.
        call: its kind, sizes and settings.
        dtype, device: type and device of the call.
        backend: the backend of the forward pass: "triton", "aten" or "reference".
        reason: why that one.
        passes: the backend of each pass: "aten", "reference", or "triton" with kernel and tile. The forward
            pass of a transposed convolution runs on the kernels of an input gradient, and the reverse.
        copies: what is copied to another layout around the kernels, None if nothing is.
        packs: how many groups share a tile of the kernels, and what that does to inf and NaN; None if each
            group has its own tile.
        flops: floating-point operations of one pass, counting a multiply and an add as two.
        bytes: bytes that a pass cannot avoid moving: x, w and y once each.
    """

    layer: str
    call: Call
    dtype: torch.dtype
    device: torch.device
    backend: str
    reason: str
    passes: dict[str, str]
    copies: str | None
    packs: str | None
    flops: int
    bytes: int

    @property
    def geometry(self) -> ConvGeometry:
        """The sizes of the 2-d convolution whose passes compute the call."""
        return self.call.geometry

    @property
    def copy_speed(self) -> float:
        """Bytes per second, read plus written, of a large copy on the device, measured at the first use."""
        return copy_speed(self.device)

    @property
    def floor(self) -> float:
        """The memory floor in seconds: the compulsory bytes at the speed of a copy."""
        return self.bytes / self.copy_speed

    def __str__(self) -> str:
        sizes = [" x ".join(map(str, s)) for s in (self.call.input_size, self.call.output_size)]
        cg, kg = self.call.channels_per_group
        rows = {
            "call": f"{sizes[0]} -> {sizes[1]}, {self.dtype}, on {self.device}",
            "groups": f"{self.call.groups}, of {cg} channels in and {kg} out",
            "backend": f"{self.backend}: {self.reason}",
            **(self.passes if len({*self.passes.values()}) > 1 else {}),
            **({} if self.copies is None else {"copies": self.copies}),
            **({} if self.packs is None else {"packs": self.packs}),
            "work": f"{self.flops / 1e9:.4g} GFLOP a pass, {self.flops / self.bytes:.3g} FLOP a byte",
            "traffic": f"{self.bytes / 1e6:.4g} MB a pass at the least: x, w and y once each",
            "floor": f"{self.floor * 1e6:.4g} us a pass, at the {self.copy_speed / 1e9:.4g} GB/s of a copy",
        }
        width = max(map(len, rows))
        return "\n".join([self.layer, *(f"  {name:<{width}}  {text}" for name, text in rows.items())])


def explain(layer: nn.Module, input: Tensor, *, backend: str | None = None) -> Explanation:
    """Explain what calling ``layer`` on ``input`` costs, the memory floor, and which backend runs each pass.

    Under ``torch.no_grad`` there is only the forward pass. The layer is not run. To measure the speed of a
    copy, some hundred megabytes are copied, once per device, when the floor is first used or printed.

    Args:
        layer: one of gconv's layers, or a convolution of PyTorch's, explained as if it were converted.
        input: what the layer takes, such as (N, C, H, W) or (C, H, W).
        backend: as in :func:`gconv.group_conv2d`.

    Returns:
        The explanation; ``print`` it.

    Raises:
        TypeError, ValueError, RuntimeError: as calling the layer on the input would raise.
    """
    kind = kind_of(layer)
    if kind is None:
        names = ", ".join(f"nn.{kind.layer.__name__}" for kind in KINDS)
        raise TypeError(f"layer must be one of {names}, got {type(layer).__name__}")
    checked: Any = layer
    if is_lazy(checked.weight):
        raise ValueError("the layer is lazy and has seen no input: call it once before")
    padded, padding = pad_input(checked, input)
    settings = (checked.stride, padding, *kind.settings_of(checked)[2:])
    activation = getattr(layer, "activation", None)
    dtype, call = prepare(kind, padded, checked.weight, checked.bias, settings, activation)
    name, layout = dispatch.requested(backend), layout_of(padded, kind.dims)
    found = dispatch.explain_call(name, padded.device, layout, dtype, call)
    by_kernels = [pass_ for pass_, decision in found.items() if decision.backend == "triton"]
    summed = call.adds_gradients and gradient_possible(padded, checked.weight, checked.bias)
    kernels_dtype = wide_dtype(dtype) if summed else dtype
    tiles = {pass_: _tile(pass_, kernels_dtype, padded.device, call.geometry) for pass_ in by_kernels}
    passes = {p: f"{d.backend}: {tiles[p]}" if p in tiles else d.backend for p, d in found.items()}
    forward = found[kind.pass_of_geometry("forward")]
    return Explanation(
        layer=repr(layer),
        call=call,
        dtype=dtype,
        device=padded.device,
        backend=forward.backend,
        reason=forward.reason,
        passes={kind.pass_of_geometry(pass_): text for pass_, text in passes.items()},
        copies=_copies(call, layout, summed) if tiles else None,
        packs=_packs(call, tiles),
        flops=call.geometry.flops,
        bytes=call.compulsory_bytes(dtype.itemsize),
    )


def _tile(pass_: str, dtype: torch.dtype, device: torch.device, geometry: ConvGeometry) -> Any:
    """Return the kernel and tile of a pass that the kernels run."""
    from gconv.kernels import tile_of  # imports Triton

    return tile_of(pass_, geometry, dtype, device)


def _copies(call: Call, layout: str, summed: bool) -> str | None:
    """Return what is copied so that the kernels, which work in channels_last, can run; None if nothing is."""
    if call.depth is not None and not call.depth.folds:
        if call.depth.taps == 1:
            return "the slices of the input that the kernel meets are copied, with zeros for padding in depth"
        precision = ", in float32" if summed else ""
        return f"the input is copied once for each of the {call.depth.taps} taps in depth{precision}"
    if layout == "channels_last":
        return None
    return "the input is contiguous: each pass copies it to channels_last and its result back"


def _packs(call: Call, tiles: dict[str, Any]) -> str | None:
    """Return what groups that share a tile do to each other: each is multiplied by zeros of the others.

    The weight gradient computes such products too, but drops them.
    """
    named = {call.kind.pass_of_geometry(pass_): tile for pass_, tile in tiles.items()}
    packs = {pass_: min(tile.groups, call.groups) for pass_, tile in named.items() if pass_ != "weight_grad"}
    shared = [f"{pack} in {pass_}" for pass_, pack in packs.items() if pack > 1]
    if not shared:
        return None
    return f"groups share a tile, {', '.join(shared)}: an inf or NaN in one makes NaN of the others there"
