"""``explain``: backend, kernel and tile of a layer, its FLOPs and bytes, and what it warns of."""

from __future__ import annotations

import pytest
import torch
from marks import interpreted
from torch import Tensor, nn

import gconv
from gconv.geometry import PASSES


def test_explain_counts_flops_bytes_and_the_floor() -> None:
    layer = gconv.GroupConv2d(128, 128, 3, padding=1, groups=32, bias=False)
    explanation = gconv.explain(layer, torch.randn(8, 128, 56, 56))
    assert explanation.flops == 2 * (8 * 128 * 56 * 56) * (4 * 3 * 3)
    assert explanation.bytes == 4 * (2 * 8 * 128 * 56 * 56 + 128 * 4 * 3 * 3)
    assert explanation.floor == explanation.bytes / explanation.copy_speed > 0
    assert (explanation.backend, explanation.geometry.channels_per_group) == ("aten", (4, 4))
    assert (
        gconv.explain(layer.bfloat16(), torch.randn(8, 128, 56, 56).bfloat16()).bytes == explanation.bytes / 2
    )
    text = str(explanation)
    assert "GroupConv2d(128, 128" in text and "aten: gconv has no kernels for cpu" in text
    assert "0.2312 GFLOP a pass, 8.99 FLOP a byte" in text and "25.71 MB" in text


def test_explain_follows_backend_padding_mode_and_plain_layers() -> None:
    layer = nn.Conv2d(8, 8, 3, padding=1, groups=2, padding_mode="circular", dtype=torch.float64)
    with gconv.backend("reference"):
        explanation = gconv.explain(layer, torch.randn(8, 6, 5, dtype=torch.float64))
    assert (explanation.backend, explanation.reason) == ("reference", "asked for")
    assert explanation.geometry.input_size == (1, 8, 8, 7) and explanation.geometry.output_size == (
        1,
        8,
        6,
        5,
    )
    assert gconv.explain(layer, torch.randn(8, 6, 5, dtype=torch.float64), backend="aten").backend == "aten"
    with pytest.raises(RuntimeError, match="one dtype"):
        gconv.explain(layer, torch.randn(8, 6, 5))
    with pytest.raises(TypeError, match=r"layer must be one of nn\.Conv1d, nn\.Conv2d, .* got Linear"):
        gconv.explain(nn.Linear(2, 2), torch.randn(2, 2))
    explanation = gconv.explain(layer.to("meta"), torch.empty(8, 6, 5, device="meta", dtype=torch.float64))
    assert explanation.backend == "aten" and explanation.flops
    with pytest.raises(RuntimeError, match="on the meta device, which has no data"):
        str(explanation)


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize(
    ("channels", "groups", "stride", "pack"), [(24, 12, 1, 8), (8, 4, 2, 4), (18, 2, 1, 1), (4, 4, 1, 1)]
)
def test_explain_says_which_groups_share_what_is_not_finite(
    channels: int, groups: int, stride: int, pack: int
) -> None:
    """As many as the kernels make NaN of, where x or dy holds an infinity in the first group."""
    layer = gconv.GroupConv2d(channels, channels, 3, stride, padding=1, groups=groups)
    x = torch.randn(1, channels, 2, 2).contiguous(memory_format=torch.channels_last)
    explanation = gconv.explain(layer, x, backend="triton")
    if pack == 1:
        assert explanation.packs is None
    else:
        assert f"groups share a tile, {pack} in forward, {pack} in input_grad: an inf" in explanation.packs
        assert explanation.packs in str(explanation)
    assert gconv.explain(layer, x, backend="aten").packs is None

    def affected(result: Tensor) -> list[int]:
        return [i for i, group in enumerate(result.chunk(groups, 1)) if not group.isfinite().all()]

    dirty = x.clone()
    dirty[0, 0, 0, 0] = torch.inf
    with gconv.backend("triton"), torch.no_grad():
        assert affected(layer(dirty)) == list(range(pack))
    with gconv.backend("triton"):
        y = layer(x.requires_grad_())
        dy = torch.zeros_like(y)
        dy[0, 0, 0, 0] = torch.inf
        dx, dw = torch.autograd.grad(y, [x, layer.weight], dy)
    assert affected(dx) == list(range(pack)) and affected(dw.transpose(0, 1)) == [0]


@interpreted
def test_explain_names_kernel_tile_and_copies() -> None:
    layer, x = gconv.GroupConv2d(128, 128, 3, stride=2, padding=1, groups=32), torch.randn(2, 128, 8, 8)
    explanation = gconv.explain(layer, x, backend="triton")
    strips = "triton: strips, 16 x 2 pixels x 16 -> 16 channels, 4 groups a tile, 4 packs, 4 warps, 2 stages"
    assert explanation.passes["forward"] == strips
    assert explanation.passes["input_grad"].startswith("triton: residue")
    assert "copies it to channels_last" in explanation.copies and explanation.copies in str(explanation)
    assert (
        gconv.explain(layer, x.contiguous(memory_format=torch.channels_last), backend="triton").copies is None
    )
    assert gconv.explain(layer, x).passes == dict.fromkeys(PASSES, "aten")
    explanation = gconv.explain(layer.half(), x.half(), backend="triton")
    strips = "triton: strips, 16 pixels x 16 -> 16 channels, 4 groups a tile, 8 packs, 4 warps, 2 stages"
    assert explanation.passes["forward"] == strips
    pairs = "triton: pairs, 16 x 2 pixels x 16 -> 16 channels, 4 groups a tile, 8 packs, 4 warps, 3 stages"
    assert explanation.passes["input_grad"] == pairs
