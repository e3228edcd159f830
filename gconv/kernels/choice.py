"""Choose the tile of a pass, and decide whether its kernel beats PyTorch.

Both use measurements made on the GPU if there are any, and rules otherwise. A table of measurements is one
JSON file for each GPU, written by ``python -m gconv tune``. Tables that come with gconv are in ``measured/``;
the user's tables are in ``user_folder`` and take precedence.

For a geometry, the nearest entry of the same kind counts. Entries of one kind have the same group widths,
kernel size, stride and so on; they differ in the number of images, pixels or groups.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gconv.geometry import ConvGeometry
from gconv.kernels.device import Device
from gconv.kernels.launch import PARTIALS, Fusion, OperandLayout
from gconv.kernels.rules import norm_tile, residual_tile, tile_by_rule
from gconv.kernels.strip_rules import bias_pair_tile
from gconv.kernels.tiles import LANES, SLIDE_LANES, Tile

SHIPPED = Path(__file__).parent / "measured"
# Version of each pass. Increase it when a change of the kernels invalidates measured tiles and times, or when
# tiles are added that may be faster.
KERNELS = {"forward": 6, "input_grad": 7, "weight_grad": 7}
KEPT = 4096  # cached answers; bounds the memory if every image has a new size
# How much faster than PyTorch an entry must be for the kernel to be used, by the entry's distance in octaves.
# 0: the amount by which repeated measurements differ. Up to 1: a layer of up to twice or half the size.
MARGINS = ((0.0, 0.02), (1.0, 0.05), (math.inf, 0.1))


@dataclass(frozen=True, slots=True)
class Entry:
    """A measurement of one pass of one geometry.

    Args:
        kind: what the entry and a geometry must have in common: pass, type, input and output channels of a
            group, kernel size, stride, dilation.
        size: number of images, height, width and number of groups.
        tile: the fastest of the tiles that gave the right result.
        triton, aten: microseconds that the kernel and PyTorch take, by layout.
    """

    kind: tuple
    size: tuple[int, int, int, int]
    tile: Tile
    triton: dict[str, float]
    aten: dict[str, float]

    @classmethod
    def read(cls, fields: dict[str, Any]) -> Entry:
        """Return an entry from its fields as JSON has them, with lists in place of tuples."""
        pass_, type_, inputs, outputs, *pairs = fields["kind"]
        kind = (pass_, type_, inputs, outputs, *map(tuple, pairs))
        return cls(kind, tuple(fields["size"]), Tile(**fields["tile"]), fields["triton"], fields["aten"])

    def distance(self, size: tuple[int, int, int, int]) -> float:
        """Return how often images, pixels or groups must be doubled or halved to get to ``size``: octaves."""
        return sum(abs(math.log2(max(a, 1) / b)) for a, b in zip(size, self.size, strict=True))

    def pays(self, size: tuple[int, int, int, int], layout: str) -> bool:
        """Return whether the kernel is faster for tensors of ``layout``, by the margin for this distance."""
        distance = self.distance(size)
        margin = next(margin for far, margin in MARGINS if distance <= far)
        return self.triton[layout] <= (1 - margin) * self.aten[layout]

    def told(self, size: tuple[int, int, int, int], layout: str) -> str:
        """Return what was measured, in words."""
        n, h, w, groups = self.size
        times = f"measured: the kernel takes {self.triton[layout]:.4g} us, PyTorch {self.aten[layout]:.4g} us"
        nearest = f" (nearest measurement: {n} images of {h} x {w}, {groups} groups)"
        return f"{times}{nearest if self.distance(size) else ''}"


def tile_of(pass_: str, geometry: ConvGeometry, dtype: torch.dtype, precision: str, device: Device) -> Tile:
    """Return the tile of a pass: that of the nearest measured layer if there is one, otherwise by rule."""
    entry = nearest(pass_, geometry, dtype, precision, device)
    return tile_by_rule(pass_, geometry, dtype, precision, device) if entry is None else entry.tile


def fused_tile_of(pass_: str, geometry: ConvGeometry, operands: OperandLayout, fusion: Fusion) -> Tile:
    """Return the tile of a pass with ``fusion`` inside its kernel.

    With batch norm, the tile always comes from the rules, because only plain passes are measured.
    """
    with_norm = fusion.prologue or fusion.epilogue in PARTIALS
    tile = (norm_tile if with_norm else tile_of)(pass_, geometry, *operands.kind)
    if fusion.epilogue == "residual":
        return residual_tile(tile)
    if fusion.bias and tile.kernel == "pairs":
        return bias_pair_tile(tile)
    if fusion.bias and pass_ == "weight_grad" and tile.kernel == "strips" and operands.dtype.itemsize == 4:
        return replace(tile, columns=1)  # the sums of dy take registers
    return tile


class Verdict(NamedTuple):
    """Whether a pass should run on the kernels.

    Args:
        pays: whether the kernel is faster than PyTorch, by the time on the device.
        reason: why, in words.
        least: lower bound on PyTorch's time in microseconds: the measured time, or the memory floor; 0 if
            neither is known.
    """

    pays: bool
    reason: str
    least: float


@lru_cache(KEPT)
def verdict(
    pass_: str, geometry: ConvGeometry, dtype: torch.dtype, precision: str, layout: str, device: Device
) -> Verdict:
    """Return whether the kernel is faster than PyTorch for tensors of ``layout``.

    Measurements decide. Without any for this kind, ``pays_by_rule`` decides for channels_last. Dense
    convolutions always go to PyTorch, even if there are measurements for groups of the same widths.
    """
    floor = geometry.compulsory_bytes(dtype.itemsize) / device.bandwidth * 1e6
    if geometry.groups == 1:
        return Verdict(False, "dense convolutions (groups=1) run on PyTorch", floor)
    entry, size = nearest(pass_, geometry, dtype, precision, device), size_of(geometry)
    if entry is not None:
        times_as_large = math.prod(size) / math.prod(entry.size)
        least = max(floor, min(times_as_large, 1) * entry.aten[layout])
        return Verdict(entry.pays(size, layout), entry.told(size, layout), least)
    if layout == "channels_last" and device.kind == "cuda" and pays_by_rule(pass_, geometry, dtype):
        return Verdict(True, "kernels of this kind were faster than cuDNN on an H200", floor)
    reason = f"gconv's kernels are not known to be faster for this geometry in {layout} layout"
    return Verdict(False, reason, floor)


@lru_cache(KEPT)
def pays_for_a_call(
    passes: tuple[str, ...],
    geometry: ConvGeometry,
    dtype: torch.dtype,
    precision: str,
    layout: str,
    device: Device,
    host: float,
) -> bool:
    """Return whether the kernel is faster in any pass that takes PyTorch at least ``host`` microseconds."""
    verdicts = (verdict(pass_, geometry, dtype, precision, layout, device) for pass_ in passes)
    return any(found.pays and found.least >= host for found in verdicts)


def pays_by_rule(pass_: str, geometry: ConvGeometry, dtype: torch.dtype) -> bool:
    """Return whether gconv beat cuDNN by 5% or more in this pass, for such layers of ResNeXt on an H200.

    That was measured in bfloat16. Kinds that weren't measured or gained less go to PyTorch: at stride 2 the
    forward pass of groups of 16 and 32 channels, and the weight gradient of groups of 8.
    """
    same = geometry.stride[0] == geometry.stride[1] and geometry.dilation == (1, 1)
    if geometry.weight_size[2:] != (3, 3) or dtype.itemsize != 2 or not same or geometry.stride[0] > 2:
        return False
    widest = max(geometry.channels_per_group)
    if not 1 < widest <= SLIDE_LANES:
        return False
    if geometry.stride[0] == 1 or pass_ == "input_grad":
        return True
    return widest <= LANES // 2 if pass_ == "forward" else widest > LANES // 2


@lru_cache(KEPT)
def nearest(
    pass_: str, geometry: ConvGeometry, dtype: torch.dtype, precision: str, device: Device
) -> Entry | None:
    """Return the nearest entry of a geometry's kind, or None if nothing of that kind was measured."""
    entries = table(device.name).get(kind_of(pass_, geometry, type_name(dtype, precision)), ())
    size = size_of(geometry)
    return min(entries, key=lambda entry: entry.distance(size), default=None)


def kind_of(pass_: str, geometry: ConvGeometry, type_: str) -> tuple:
    """Return what an entry must have in common with ``geometry`` to count for it."""
    cg, kg = geometry.channels_per_group
    return pass_, type_, cg, kg, geometry.weight_size[2:], geometry.stride, geometry.dilation


def size_of(geometry: ConvGeometry) -> tuple[int, int, int, int]:
    """Return images, height, width and groups, by which the nearest entry is found."""
    n, _, h, w = geometry.input_size
    return n, h, w, geometry.groups


def type_name(dtype: torch.dtype, precision: str) -> str:
    """Return "float16", "bfloat16" or "float32", or "tf32" for float32 that is multiplied in TF32."""
    return "tf32" if dtype == torch.float32 and precision == "tf32" else str(dtype).removeprefix("torch.")


@cache
def table(device_name: str) -> dict[tuple, list[Entry]]:
    """Return all entries for a GPU by kind. The user's entries of a kind replace the shipped ones."""
    tables = [_entries_or_none(folder / file_name(device_name)) for folder in (SHIPPED, user_folder())]
    found: dict[tuple, list[Entry]] = {}
    for entries in tables:
        kinds = defaultdict(list)
        for entry in entries:
            kinds[entry.kind].append(entry)
        found |= kinds
    return found


def read_entries(path: Path) -> list[Entry]:
    """Return the entries of a table that are still valid for the current kernels; none if there is no file.

    Raises:
        ValueError: if the file isn't a table.
    """
    if not path.exists():
        return []
    try:
        saved = json.loads(path.read_text())
        old = outdated(
            saved["kernels"] if isinstance(saved["kernels"], dict) else {}
        )  # or one number for all
        return [e for e in map(Entry.read, saved["entries"]) if e.kind[0] not in old]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a table written by `python -m gconv tune`: {error!r}") from None


def outdated(kernels: dict[str, int]) -> list[str]:
    """Return the passes whose kernels have changed since a table for ``kernels`` was measured."""
    return [pass_ for pass_, version in KERNELS.items() if kernels.get(pass_) != version]


def _entries_or_none(path: Path) -> list[Entry]:
    """Return the entries of a table; if it isn't a table, warn and return none: convolutions still run."""
    try:
        return read_entries(path)
    except ValueError as error:
        warnings.warn(f"{error}; ignoring it", stacklevel=2)
        return []


def file_name(device_name: str) -> str:
    """Return a file name such as nvidia-h200.json."""
    return f"{slug(device_name)}.json"


def slug(name: str) -> str:
    """Return a device's name in the form that files and folders use, such as nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def user_folder() -> Path:
    """Return the folder of the user's tables: GCONV_CACHE if set, otherwise gconv in the user's cache."""
    if folder := os.environ.get("GCONV_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gconv"
