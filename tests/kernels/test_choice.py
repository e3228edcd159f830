"""Tile and backend from measurements: the nearest entry counts, and ``auto`` never chooses the slower one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tables
import torch

from gconv.geometry import ConvGeometry
from gconv.kernels import choice, rules, tiles
from gconv.kernels.device import Device
from gconv.measure.suites import Layer
from gconv.measure.tuner import write_entries

GPU = Device("cuda", "NVIDIA Test-1", 132, 90)
LAYER = Layer(128, 32, 56)
HALF = (torch.float16, "ieee", GPU)


@pytest.fixture(autouse=True)
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, Path]:
    """Return empty folders for the shipped tables and for the user's tables."""
    shipped, own = tmp_path / "shipped", tmp_path / "own"
    monkeypatch.setattr(choice, "SHIPPED", shipped)
    monkeypatch.setenv("GCONV_CACHE", str(own))
    tables.forget()
    yield shipped, own
    tables.forget()


def entry(geometry: ConvGeometry, pixels: int, triton: float = 1.0, aten: float = 2.0) -> choice.Entry:
    """Return an entry for a forward pass in float16, with a tile that no rule makes."""
    rule = rules.tile_by_rule("forward", geometry, *HALF)
    return choice.Entry(
        choice.kind_of("forward", geometry, "float16"),
        choice.size_of(geometry),
        replace(rule, pixels=pixels, warps=8),
        {"channels_last": triton, "contiguous": 3 * triton},
        {"channels_last": aten, "contiguous": aten},
    )


def by_rule(pass_: str, geometry: ConvGeometry, dtype: torch.dtype, precision: str) -> tiles.Tile:
    return rules.tile_by_rule(pass_, geometry, dtype, precision, GPU)


def pays(pass_: str, geometry: ConvGeometry, dtype: torch.dtype, precision: str, layout: str) -> bool:
    return choice.verdict(pass_, geometry, dtype, precision, layout, GPU)[0]


def write(folder: Path, *entries: choice.Entry) -> None:
    write_entries(folder / "nvidia-test-1.json", entries, {"gpu": GPU.name})


def test_what_was_written_is_read(folders: tuple[Path, Path]) -> None:
    entries = [entry(LAYER.geometry(batch), 128) for batch in (1, 32)]
    write(folders[0], *entries)
    assert choice.read_entries(folders[0] / "nvidia-test-1.json") == entries


def test_measured_tiles_go_before_rules_and_the_users_before_those_that_ship(folders: tuple) -> None:
    geometry = LAYER.geometry(32)
    write(folders[0], entry(geometry, 256))
    assert choice.tile_of("forward", geometry, *HALF).pixels == 256
    for kind in (("forward", geometry, torch.float32, "tf32"), ("input_grad", geometry, *HALF[:2])):
        assert choice.tile_of(*kind, GPU) == by_rule(*kind), "not measured"
    choice.table.cache_clear()
    choice.nearest.cache_clear()
    write(folders[1], entry(geometry, 512))
    assert choice.tile_of("forward", geometry, *HALF).pixels == 512


def test_the_nearest_layer_of_the_kind_counts(folders: tuple) -> None:
    write(folders[0], *(entry(LAYER.geometry(batch), pixels) for batch, pixels in ((1, 32), (256, 128))))
    for batch, pixels in ((1, 32), (8, 32), (32, 128), (1000, 128)):
        assert choice.tile_of("forward", LAYER.geometry(batch), *HALF).pixels == pixels
    assert choice.tile_of("forward", replace(LAYER, size=64).geometry(250), *HALF).pixels == 128
    other = ("forward", replace(LAYER, channels=256).geometry(256), *HALF[:2])
    assert choice.tile_of(*other, GPU) == by_rule(*other), "groups of twice the width are another kind"


def test_auto_takes_the_kernel_where_it_is_faster(folders: tuple) -> None:
    fast, even, slow = (replace(LAYER, channels=32 * width).geometry(32) for width in (4, 8, 16))
    write(folders[0], entry(fast, 64, 1.95, 2.0), entry(even, 64, 1.97, 2.0), entry(slow, 64, 2.1, 2.0))
    assert pays("forward", fast, torch.float16, "ieee", "channels_last")
    assert not pays("forward", even, torch.float16, "ieee", "channels_last"), (
        "by less than measurements differ"
    )
    assert not pays("forward", slow, torch.float16, "ieee", "channels_last")
    assert not pays("forward", fast, torch.float16, "ieee", "contiguous"), "3 to 2"


@pytest.mark.parametrize(
    ("gain", "batches"), [(0.03, [32]), (0.06, [16, 32, 64]), (0.11, [1, 16, 32, 64, 512])]
)
def test_the_further_away_it_was_measured_the_faster_it_has_to_be(
    gain: float, batches: list[int], folders: tuple
) -> None:
    write(folders[0], entry(LAYER.geometry(32), 64, 2 * (1 - gain), 2.0))
    found = (1, 16, 32, 64, 512)
    taken = [n for n in found if pays("forward", LAYER.geometry(n), *HALF[:2], "channels_last")]
    assert taken == batches


def test_what_pytorch_takes_at_least_is_measured_or_the_floor(folders: tuple) -> None:
    write(folders[0], entry(LAYER.geometry(32), 64, 96.0, 410.0))
    gpu = replace(GPU, bandwidth=1e12)
    least = {
        (batch, device): choice.verdict(
            "forward", LAYER.geometry(batch), *HALF[:2], "channels_last", device
        ).least
        for batch in (1, 16, 32, 64, 512)
        for device in (gpu, GPU)
    }
    assert [least[n, gpu] for n in (16, 32, 64)] == [205.0, 410.0, 410.0]
    assert least[512, gpu] == pytest.approx(LAYER.geometry(512).compulsory_bytes(2) / 1e6)
    assert [least[n, GPU] for n in (1, 512)] == [410 / 32, 410.0], "its memory's speed is not known"


def test_contiguous_tensors_go_to_the_kernels_where_copies_pay(folders: tuple) -> None:
    write(folders[0], entry(LAYER.geometry(32), 64, 1.0, 4.0))
    assert pays("forward", LAYER.geometry(32), *HALF[:2], "contiguous")
    assert not pays("weight_grad", LAYER.geometry(32), *HALF[:2], "contiguous"), "by rule"


def test_a_dense_convolution_is_pytorchs_whatever_was_measured_for_groups_of_its_widths(
    folders: tuple,
) -> None:
    """``group_conv2d`` does the same, so ``explain`` shows the right backend."""
    dense = replace(LAYER, channels=4, groups=1).geometry(32)
    write(folders[0], entry(LAYER.geometry(32), 64, 1.0, 4.0))
    for layout in ("channels_last", "contiguous"):
        assert not pays("forward", dense, *HALF[:2], layout)
    assert "dense" in choice.verdict("forward", dense, *HALF[:2], "channels_last", GPU)[1]


def test_reasons_tell_what_was_measured(folders: tuple) -> None:
    write(folders[0], entry(LAYER.geometry(32), 64, 96.25, 410.0))
    reasons = [
        choice.verdict("forward", LAYER.geometry(batch), *HALF[:2], "channels_last", GPU)[1]
        for batch in (32, 40)
    ]
    assert reasons[0] == "measured: the kernel takes 96.25 us, PyTorch 410 us"
    assert reasons[1] == f"{reasons[0]} (nearest measurement: 32 images of 56 x 56, 32 groups)"


@pytest.mark.parametrize("text", ["", "{}", '{"kernels": {}, "entries": [{"kind": ["forward"]}]}'])
def test_what_is_no_table_is_left_aside_with_a_warning(text: str, folders: tuple) -> None:
    folders[1].mkdir()
    (folders[1] / "nvidia-test-1.json").write_text(text)
    message = "nvidia-test-1.json is not a table written by `python -m gconv tune`: .*; ignoring it"
    with pytest.warns(UserWarning, match=message):
        tile = choice.tile_of("forward", LAYER.geometry(32), *HALF)
    assert tile == by_rule("forward", LAYER.geometry(32), *HALF[:2])


def test_a_table_for_other_kernels_counts_for_nothing(folders: tuple) -> None:
    layer = ("forward", LAYER.geometry(32), *HALF[:2])
    write(folders[0], entry(LAYER.geometry(32), 256))
    path = folders[0] / "nvidia-test-1.json"
    saved, versions = json.loads(path.read_text()), choice.KERNELS
    path.write_text(json.dumps({**saved, "kernels": versions | {"weight_grad": 0}}))
    assert choice.tile_of(*layer, GPU) != by_rule(*layer)
    for other in (versions | {"forward": versions["forward"] + 1}, 3):
        choice.table.cache_clear(), choice.nearest.cache_clear()
        path.write_text(json.dumps({**saved, "kernels": other}))
        assert choice.tile_of(*layer, GPU) == by_rule(*layer)
