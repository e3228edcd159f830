"""``gconv.explain``: which backend runs a convolution, its work and traffic, and its memory floor."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
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
from gconv.measure import plots
from gconv.measure.figures import check_path
from gconv.measure.timing import copy_speed
from gconv.module import pad_input
from gconv.text import prefixed


@dataclass(frozen=True)
class Explanation:
    """How a layer runs on an input: ``print`` it as a few lines, or ``plot`` its roofline.

    Attributes:
        layer: the layer's repr.
        call: the convolution's kind, sizes and settings.
        dtype, device: type and device that the convolution runs in.
        backend: the backend of the forward pass: "triton", "aten" or "reference".
        reason: why that backend runs.
        passes: the backend of each pass: "aten", "reference", or "triton" with kernel and tile. The forward
            pass of a transposed convolution runs on the kernels of an input gradient, and vice versa.
        copies: which tensors are copied to another layout around the kernels; None if none is.
        packs: how many groups share a tile of the kernels, and how inf and NaN spread between them; None if
            each group has its own tile.
        flops: floating-point operations of one pass; a multiply-add counts as two.
        bytes: bytes that a pass has to move at least: input, weight and output once each.
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
        """The sizes of the 2-d convolution that computes the call."""
        return self.call.geometry

    @property
    def copy_speed(self) -> float:
        """Bytes per second, read plus written, of a large copy on the device; measured at the first use."""
        return copy_speed(self.device)

    @property
    def floor(self) -> float:
        """The memory floor of a pass in seconds: the time to move ``bytes`` at the speed of a copy."""
        return self.bytes / self.copy_speed

    def __str__(self) -> str:
        sizes = [" x ".join(map(str, s)) for s in (self.call.input_size, self.call.output_size)]
        cg, kg = self.call.channels_per_group
        rows = {
            "call": f"{sizes[0]} -> {sizes[1]}, {self.dtype}, on {self.device}",
            "groups": f"{self.call.groups}, each with {cg} input and {kg} output channels",
            "backend": f"{self.backend}: {self.reason}",
            **(self.passes if len({*self.passes.values()}) > 1 else {}),
            **({} if self.copies is None else {"copies": self.copies}),
            **({} if self.packs is None else {"packs": self.packs}),
            "work": f"{prefixed(self.flops, 'FLOP')} per pass, {self.flops / self.bytes:.3g} FLOP per byte",
            "traffic": f"at least {prefixed(self.bytes, 'B')} per pass: input, weight and output once each",
            "floor": f"{prefixed(self.floor, 's')} per pass, copying at {prefixed(self.copy_speed, 'B')}/s",
        }
        width = max(map(len, rows))
        return "\n".join([self.layer, *(f"  {name:<{width}}  {text}" for name, text in rows.items())])

    def __repr__(self) -> str:
        return f"<Explanation: {self.layer.partition('(')[0]} on {self.backend}; print it for the details>"

    def plot(self, path: str | PathLike[str], *, dark: bool = False) -> Path:
        """Draw a roofline: whether memory or arithmetic limits the layer, and what it can reach at best.

        The plot shows the layer's FLOP per byte, and the most FLOP/s that the device allows there, if bytes
        move at the speed of a copy and arithmetic runs at the speed of a large dense convolution. Both speeds
        are measured, once per device. The layer isn't run; ``Profile.plot`` draws measured speeds. Needs
        matplotlib.

        Args:
            path: the file to write. Its suffix decides the format: .png, .svg or .pdf.
            dark: whether to draw for a dark page. Defaults to False.

        Returns:
            The path.

        Raises:
            ValueError: ``path`` has another suffix, or the call moves no data.
            FileNotFoundError: the folder of ``path`` doesn't exist.
            ModuleNotFoundError: matplotlib isn't installed.
            RuntimeError: the layer is on meta, where no speed can be measured.

        Examples:
            >>> layer = gconv.GroupConv2d(128, 128, 3, padding=1, groups=32)
            >>> gconv.explain(layer, torch.randn(8, 128, 56, 56)).plot("roofline.svg")
        """
        if not self.flops:
            raise ValueError("there is nothing to plot: the output is empty")
        check_path(path)  # before speeds are measured
        name, call = self.layer.partition("(")[0], str(self.call)
        lines = f"{name}: {call}", f"{self.dtype} on {plots.device_name(self.device)}, {self.backend}"
        layer = plots.LayerTimes(name, 1, call, True, self.flops / self.bytes, self.flops, self.floor, {})
        return plots.draw_roofline(path, [layer], plots.roofs_of(self.device, self.dtype), *lines, dark)


def explain(layer: nn.Module, input: Tensor, *, backend: str | None = None) -> Explanation:
    """Explain how a layer runs on an input: backend, kernels, work, traffic and memory floor.

    The layer isn't run. With ``torch.no_grad`` only the forward pass is explained. The memory floor needs the
    speed of a copy: a few hundred megabytes are copied, once per device, when the floor is first used or
    printed.

    Args:
        layer: one of gconv's layers, or one of PyTorch's, which is explained as if it were converted.
        input: an input of the layer, such as (N, C, H, W) or (C, H, W).
        backend: as in ``gconv.group_conv2d``. Defaults to None: the one set by ``gconv.backend``.

    Returns:
        The explanation. ``print`` it for a few lines of text; ``Explanation.plot`` draws it.

    Raises:
        TypeError, ValueError, RuntimeError: the same errors that calling the layer on the input raises.

    Examples:
        >>> layer = gconv.GroupConv2d(128, 128, 3, padding=1, groups=32)
        >>> print(gconv.explain(layer, torch.randn(8, 128, 56, 56)))
    """
    kind = kind_of(layer)
    if kind is None:
        names = ", ".join(f"nn.{kind.layer.__name__}" for kind in KINDS)
        raise TypeError(
            f"layer must be one of {names}, got {type(layer).__name__}; gconv.profile reports on networks"
        )
    checked: Any = layer
    if is_lazy(checked.weight):
        raise ValueError("the layer is lazy and hasn't seen an input yet: call it once before explaining it")
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
    """Return what is copied so that the kernels can run, which need channels_last; None if nothing is."""
    if call.depth is not None and not call.depth.folds:
        if call.depth.taps == 1:
            return "the input slices that the kernel reads are copied, with zeros for padding in depth"
        precision = ", in float32" if summed else ""
        return f"the input is copied once for each of the {call.depth.taps} taps in depth{precision}"
    if layout == "channels_last":
        return None
    return "the input is contiguous: each pass copies it to channels_last and copies the result back"


def _packs(call: Call, tiles: dict[str, Any]) -> str | None:
    """Return which groups share a tile, and how inf and NaN spread between them; None if none does.

    In a shared tile the kernels multiply each group by zeros of the others, and 0 * inf is NaN. Of the weight
    gradients (and bias gradients) only that in strips does: others discard such products.
    """
    named = {call.kind.pass_of_geometry(pass_): tile for pass_, tile in tiles.items()}
    packs = {
        pass_: min(tile.groups, call.groups)
        for pass_, tile in named.items()
        if pass_ != "weight_grad" or tile.kernel == "strips"
    }
    shared = [f"{pack} in {pass_}" for pass_, pack in packs.items() if pack > 1]
    if not shared:
        return None
    return f"groups share a tile ({', '.join(shared)}): an inf or NaN in one makes the others of its tile NaN"
