"""Which tile a pass runs in, and whether it beats PyTorch's own: as measured on the GPU, else by rule.

A table of measurements is one JSON file for each GPU, which ``python -m gconv tune`` writes: those that come
with gconv are in ``measured/``, the user's own, which go before them, in :func:`user_folder`. The entry that
counts for a geometry is the nearest one of its kind, which has the same group widths, kernel, stride and so
on, and another number of images, pixels or groups.
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
# By pass; raised when a change of its kernels makes what was measured wrong: other tiles, other speeds.
KERNELS = {"forward": 5, "input_grad": 6, "weight_grad": 6}
KEPT = 4096  # answers; images of ever new sizes must not fill the memory
# How much faster than PyTorch's own an entry must be for the kernels to be taken, by its distance in octaves:
# what two measurements of one thing differ by; a layer of up to twice or half the size; any other.
MARGINS = ((0.0, 0.02), (1.0, 0.05), (math.inf, 0.1))


@dataclass(frozen=True, slots=True)
class Entry:
    """What was measured for one pass of one geometry.

    Args:
        kind: what an entry must share with a geometry to count for it: pass, type, channels of a group in and
            out, kernel, stride, dilation.
        size: images, height, width and groups.
        tile: the fastest of those that gave the right result.
        triton, aten: microseconds of the kernel and of PyTorch, by layout.
    """

    kind: tuple
    size: tuple[int, int, int, int]
    tile: Tile
    triton: dict[str, float]
    aten: dict[str, float]

    @classmethod
    def read(cls, fields: dict[str, Any]) -> Entry:
        """From its fields, of which JSON made lists."""
        pass_, type_, inputs, outputs, *pairs = fields["kind"]
        kind = (pass_, type_, inputs, outputs, *map(tuple, pairs))
        return cls(kind, tuple(fields["size"]), Tile(**fields["tile"]), fields["triton"], fields["aten"])

    def distance(self, size: tuple[int, int, int, int]) -> float:
        """In octaves: how many times images, pixels or groups have to be doubled or halved in all."""
        return sum(abs(math.log2(max(a, 1) / b)) for a, b in zip(size, self.size, strict=True))

    def pays(self, size: tuple[int, int, int, int], layout: str) -> bool:
        """Whether the kernel is faster for tensors of ``layout`` by the margin of its distance."""
        distance = self.distance(size)
        margin = next(margin for far, margin in MARGINS if distance <= far)
        return self.triton[layout] <= (1 - margin) * self.aten[layout]

    def told(self, size: tuple[int, int, int, int], layout: str) -> str:
        """What was measured, in words."""
        n, h, w, groups = self.size
        near = f" for {n} images of {h} x {w} in {groups} groups, the nearest" if self.distance(size) else ""
        return (
            f"{self.triton[layout]:.4g} us against {self.aten[layout]:.4g} of PyTorch's own, measured{near}"
        )


def tile_of(pass_: str, geometry: ConvGeometry, dtype: torch.dtype, precision: str, device: Device) -> Tile:
    """The tile of a pass: of the nearest layer that was measured, else by rule."""
    entry = nearest(pass_, geometry, dtype, precision, device)
    return tile_by_rule(pass_, geometry, dtype, precision, device) if entry is None else entry.tile


def fused_tile_of(pass_: str, geometry: ConvGeometry, operands: OperandLayout, fusion: Fusion) -> Tile:
    """The tile that a pass runs in with ``fusion`` inside its kernel.

    With a batch norm always by rule: only plain passes are measured.
    """
    with_norm = fusion.prologue or fusion.epilogue in PARTIALS
    tile = (norm_tile if with_norm else tile_of)(pass_, geometry, *operands.kind)
    if fusion.epilogue == "residual":
        return residual_tile(tile)
    if fusion.bias and tile.kernel == "pairs":
        return bias_pair_tile(tile)
    if fusion.bias and pass_ == "weight_grad" and tile.kernel == "strips":
        most = max(1, 6 // (tile.packs * operands.dtype.itemsize))  # the sums of dy take some
        return replace(tile, columns=min(tile.columns, most))
    return tile


class Verdict(NamedTuple):
    """Whether a pass should run on the kernels.

    Args:
        pays: whether they are faster than PyTorch's own, by the time on the device.
        reason: why, in words.
        least: microseconds that PyTorch's own takes: as measured, or the memory floor, which it cannot beat;
            0 if neither is known.
    """

    pays: bool
    reason: str
    least: float


@lru_cache(KEPT)
def verdict(
    pass_: str, geometry: ConvGeometry, dtype: torch.dtype, precision: str, layout: str, device: Device
) -> Verdict:
    """Whether the kernel is faster than PyTorch's own, for tensors of ``layout``.

    As it was measured; where nothing of the kind was, as :func:`pays_by_rule` says of channels_last. A dense
    convolution is PyTorch's, whatever was measured for groups of its widths.
    """
    floor = geometry.compulsory_bytes(dtype.itemsize) / device.bandwidth * 1e6
    if geometry.groups == 1:
        return Verdict(False, "one group is a dense convolution, which is left to PyTorch", floor)
    entry, size = nearest(pass_, geometry, dtype, precision, device), size_of(geometry)
    if entry is not None:
        times_as_large = math.prod(size) / math.prod(entry.size)
        least = max(floor, min(times_as_large, 1) * entry.aten[layout])
        return Verdict(entry.pays(size, layout), entry.told(size, layout), least)
    if layout == "channels_last" and device.kind == "cuda" and pays_by_rule(pass_, geometry, dtype):
        return Verdict(True, "kernels of this kind were measured to be faster than cuDNN on an H200", floor)
    reason = f"gconv's kernels are not known to be faster for this geometry, {layout}"
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
    """Whether the kernel pays in any pass that takes PyTorch's own at least ``host`` microseconds."""
    verdicts = (verdict(pass_, geometry, dtype, precision, layout, device) for pass_ in passes)
    return any(found.pays and found.least >= host for found in verdicts)


def pays_by_rule(pass_: str, geometry: ConvGeometry, dtype: torch.dtype) -> bool:
    """Whether gconv beat cuDNN on an H200 in a pass, by a twentieth, for ResNeXt's layers of this kind.

    That was measured in bfloat16. What was not is left to PyTorch, and so is what gained less: at stride 2
    the forward pass of groups of 16 and of 32 channels, and the weight gradient of groups of 8.
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
    """The entry that counts for a geometry, None where nothing of its kind was measured."""
    entries = table(device.name).get(kind_of(pass_, geometry, type_name(dtype, precision)), ())
    size = size_of(geometry)
    return min(entries, key=lambda entry: entry.distance(size), default=None)


def kind_of(pass_: str, geometry: ConvGeometry, type_: str) -> tuple:
    """What an entry must share with ``geometry`` to count for it."""
    cg, kg = geometry.channels_per_group
    return pass_, type_, cg, kg, geometry.weight_size[2:], geometry.stride, geometry.dilation


def size_of(geometry: ConvGeometry) -> tuple[int, int, int, int]:
    """Images, height, width, groups: what the nearest entry is looked for by."""
    n, _, h, w = geometry.input_size
    return n, h, w, geometry.groups


def type_name(dtype: torch.dtype, precision: str) -> str:
    """ "float16", "bfloat16", "float32", or "tf32" for float32 that is multiplied so."""
    return "tf32" if dtype == torch.float32 and precision == "tf32" else str(dtype).removeprefix("torch.")


@cache
def table(device_name: str) -> dict[tuple, list[Entry]]:
    """All entries for a GPU by kind; the user's alone for a kind of which there are any."""
    tables = [_entries_or_none(folder / file_name(device_name)) for folder in (SHIPPED, user_folder())]
    found: dict[tuple, list[Entry]] = {}
    for entries in tables:
        kinds = defaultdict(list)
        for entry in entries:
            kinds[entry.kind].append(entry)
        found |= kinds
    return found


def read_entries(path: Path) -> list[Entry]:
    """The entries of a table that hold for the present kernels; none if there is no file.

    Raises:
        ValueError: the file is no table.
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
        raise ValueError(f"{path} is no table of gconv's: {error!r}") from None


def outdated(kernels: dict[str, int]) -> list[str]:
    """The passes whose kernels have changed since a table of ``kernels`` was measured."""
    return [pass_ for pass_, version in KERNELS.items() if kernels.get(pass_) != version]


def _entries_or_none(path: Path) -> list[Entry]:
    """The entries of a table; with a warning none where it is no table: no convolution must fail for it."""
    try:
        return read_entries(path)
    except ValueError as error:
        warnings.warn(f"{error}; it is left aside", stacklevel=2)
        return []


def file_name(device_name: str) -> str:
    """Such as nvidia-h200.json."""
    return f"{slug(device_name)}.json"


def slug(name: str) -> str:
    """A device's name as files and folders bear it, such as nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def user_folder() -> Path:
    """Where the user's own tables are: GCONV_CACHE, else gconv in the cache folder of the user."""
    if folder := os.environ.get("GCONV_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gconv"
