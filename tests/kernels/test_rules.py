"""Tiles by rule, for geometries without measurements."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gconv.geometry import PASSES
from gconv.kernels import rules
from gconv.kernels.device import Device
from gconv.measure.problem import TYPES
from gconv.measure.suites import Layer

GPU = Device("cuda", "NVIDIA Test-1", 132, 90)
LAYER = Layer(128, 32, 56)
HALF = (torch.float16, "ieee", GPU)


@pytest.mark.parametrize(
    ("kind", "type_", "flow"),
    [("cuda", "float16", (8, 4, 16)), ("cuda", "tf32", (4, 3, 16)), ("hip", "float16", (2, 1, 16))],
)
def test_rows_are_loaded_ahead_where_a_gpu_can(kind: str, type_: str, flow: tuple[int, int, int]) -> None:
    dtype, precision = TYPES[type_]
    device = replace(GPU, kind=kind)
    tile = rules.tile_by_rule("forward", LAYER.geometry(32), dtype, precision, device)
    assert (tile.warps, tile.stages, tile.load) == flow


@pytest.mark.parametrize("pass_", PASSES)
def test_the_guide_prints_the_rules_tiles(pass_: str) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guide" / "backends.md").read_text()
    line = f"{pass_:<12} triton: {rules.tile_by_rule(pass_, LAYER.geometry(32), *HALF)}"
    assert f"\n{line}\n" in guide


@pytest.mark.parametrize(("channels", "lanes"), [(144, 16), (96, 32), (384, 64), (70, 64), (8, 8)])
def test_depthwise_tiles_divide_the_channels_where_they_can(channels: int, lanes: int) -> None:
    geometry = Layer(channels, channels, 14).geometry(32)
    for pass_ in PASSES:
        assert rules.tile_by_rule(pass_, geometry, *HALF).outputs == lanes
