"""``explain``: what one convolution costs, the least that it could cost, and which backend runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gconv import dispatch
from gconv.functional import prepare
from gconv.geometry import ConvGeometry
from gconv.measure.timing import copy_speed
from gconv.module import pad_input


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; ``print`` it as a few lines.

    Attributes:
        layer: the layer's repr.
        geometry: the sizes of the call.
        dtype, device: type and device of the call.
        backend: the backend of the forward pass: "triton", "aten" or "reference".
        reason: why that one.
        passes: the backend of each pass: "aten", "reference", or "triton" with kernel and tile.
        copies: what is copied to another layout around the kernels, None if nothing is.
        packs: how many groups share a tile of the kernels, and what that does to inf and NaN; None if each
            group has its own tile.
        flops: floating-point operations of one pass, counting a multiply and an add as two.
        bytes: bytes that a pass cannot avoid moving: x, w and y once each.
    """

    layer: str
    geometry: ConvGeometry
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
    def copy_speed(self) -> float:
        """Bytes per second, read plus written, of a large copy on the device, measured at the first use."""
        return copy_speed(self.device)

    @property
    def floor(self) -> float:
        """The memory floor in seconds: the compulsory bytes at the speed of a copy."""
        return self.bytes / self.copy_speed

    def __str__(self) -> str:
        sizes = [" x ".join(map(str, s)) for s in (self.geometry.input_size, self.geometry.output_size)]
        cg, kg = self.geometry.channels_per_group
        rows = {
            "call": f"{sizes[0]} -> {sizes[1]}, {self.dtype}, on {self.device}",
            "groups": f"{self.geometry.groups}, of {cg} channels in and {kg} out",
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


def explain(layer: nn.Conv2d, input: Tensor, *, backend: str | None = None) -> Explanation:
    """Explain what calling ``layer`` on ``input`` costs, the memory floor, and which backend runs each pass.

    Under ``torch.no_grad`` there is only the forward pass. The layer is not run. To measure the speed of a
    copy, some hundred megabytes are copied, once per device, when the floor is first used or printed.

    Args:
        layer: a :class:`~gconv.GroupConv2d`, or any ``nn.Conv2d``, explained as if it were converted.
        input: (N, C, H, W) or (C, H, W).
        backend: as in :func:`gconv.group_conv2d`.

    Returns:
        The explanation; ``print`` it.

    Raises:
        TypeError, ValueError, RuntimeError: as calling the layer on the input would raise.
    """
    if not isinstance(layer, nn.Conv2d):
        raise TypeError(f"layer must be an nn.Conv2d, got {type(layer).__name__}")
    activation = getattr(layer, "activation", None)
    padded, padding = pad_input(layer, input)
    dtype, geometry = prepare(
        padded, layer.weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups, activation
    )
    name = dispatch.requested(backend)
    layout, passes = dispatch.layout_of(padded), dispatch.passes_needed()
    decisions = dispatch.explain_call(name, padded.device, layout, dtype, geometry, passes)
    by_kernels = [pass_ for pass_, decision in decisions.items() if decision.backend == "triton"]
    tiles = {pass_: _tile(pass_, dtype, padded.device, geometry) for pass_ in by_kernels}
    return Explanation(
        layer=repr(layer),
        geometry=geometry,
        dtype=dtype,
        device=padded.device,
        backend=decisions["forward"].backend,
        reason=decisions["forward"].reason,
        passes={p: f"{d.backend}: {tiles[p]}" if p in tiles else d.backend for p, d in decisions.items()},
        copies=_copies(padded) if tiles else None,
        packs=_packs(tiles, geometry.groups),
        flops=geometry.flops,
        bytes=geometry.compulsory_bytes(dtype.itemsize),
    )


def _tile(pass_: str, dtype: torch.dtype, device: torch.device, geometry: ConvGeometry) -> Any:
    """Return the kernel and tile of a pass that the kernels run."""
    from gconv.kernels import tile_of  # imports Triton

    return tile_of(pass_, geometry, dtype, device)


def _copies(input: Tensor) -> str | None:
    """Return what the kernels, which work in channels_last, must copy for contiguous tensors."""
    if input.stride(-3) == 1:
        return None
    return "the input is contiguous: each pass copies it to channels_last and its result back"


def _packs(tiles: dict[str, Any], groups: int) -> str | None:
    """Return what groups that share a tile do to each other: each is multiplied by zeros of the others.

    The weight gradient computes such products too, but drops them.
    """
    packs = {pass_: min(tile.groups, groups) for pass_, tile in tiles.items() if pass_ != "weight_grad"}
    shared = [f"{pack} in {pass_}" for pass_, pack in packs.items() if pack > 1]
    if not shared:
        return None
    return f"groups share a tile, {', '.join(shared)}: an inf or NaN in one makes NaN of the others there"
