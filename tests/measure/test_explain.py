"""``gconv.explain``: backend, kernel, tile, FLOPs and bytes of a layer, its warnings, and its roofline."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from marks import interpreted
from torch import Tensor, nn

import gconv
from gconv.geometry import PASSES
from gconv.measure import plots


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
    assert "231.2 MFLOP per pass, 8.99 FLOP per byte" in text
    assert "at least 25.71 MB per pass: input, weight and output once each" in text
    assert "32, each with 4 input and 4 output channels" in text


def test_explain_follows_backend_padding_mode_and_plain_layers() -> None:
    layer = nn.Conv2d(8, 8, 3, padding=1, groups=2, padding_mode="circular", dtype=torch.float64)
    with gconv.backend("reference"):
        explanation = gconv.explain(layer, torch.randn(8, 6, 5, dtype=torch.float64))
    assert (explanation.backend, explanation.reason) == ("reference", "requested")
    assert explanation.geometry.input_size == (1, 8, 8, 7) and explanation.geometry.output_size == (
        1,
        8,
        6,
        5,
    )
    assert gconv.explain(layer, torch.randn(8, 6, 5, dtype=torch.float64), backend="aten").backend == "aten"
    with pytest.raises(RuntimeError, match="the same dtype"):
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
def test_explain_reports_which_groups_share_inf_and_nan(
    channels: int, groups: int, stride: int, pack: int
) -> None:
    """As many groups as the kernels turn into NaN if x or dy has an infinity in the first group.

    At stride 1 the weight gradient runs in strips, which lay out all channels of a tile by one product.
    """
    layer = gconv.GroupConv2d(channels, channels, 3, stride, padding=1, groups=groups)
    x = torch.randn(1, channels, 2, 2).contiguous(memory_format=torch.channels_last)
    explanation = gconv.explain(layer, x, backend="triton")
    if pack == 1:
        assert explanation.packs is None
    else:
        passes = ("forward", "input_grad", *(("weight_grad",) if stride == 1 else ()))
        shared = ", ".join(f"{pack} in {pass_}" for pass_ in passes)
        assert f"groups share a tile ({shared}): an inf" in explanation.packs
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
    assert affected(dx) == list(range(pack))
    assert affected(dw.transpose(0, 1)) == list(range(pack if stride == 1 else 1))


@interpreted
def test_explain_reports_kernel_tile_and_copies() -> None:
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


@pytest.mark.parametrize(("compute", "bound"), [(1e12, "memory"), (1e8, "compute")])
def test_plot_draws_the_bound_of_a_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compute: float, bound: str
) -> None:
    monkeypatch.setattr(plots, "roofs_of", lambda device, dtype: plots.Roofs(bandwidth=10e9, compute=compute))
    layer = gconv.GroupConv2d(128, 128, 3, padding=1, groups=32, bias=False)
    explanation = gconv.explain(layer, torch.randn(8, 128, 56, 56))
    assert explanation.plot(tmp_path / "roofline.svg", dark=True) == tmp_path / "roofline.svg"
    written = "\n".join(re.findall("<!-- (.*?) -->", (tmp_path / "roofline.svg").read_text(), re.DOTALL))
    assert "GroupConv2d: 8 x 128/32 x 56 x 56 -&gt; 128, 3x3" in written
    assert f"8.99 FLOP/byte: {bound} bound" in written
    assert ("at most 89.94 GFLOP/s" in written and "at least 2.57 ms per pass" in written) == (
        bound == "memory"
    )
    assert f"dense convolution at {'1 TFLOP/s' if bound == 'memory' else '100 MFLOP/s'}" in written
    with pytest.raises(ValueError, match=r"must end in \.png, \.svg or \.pdf, got .*roofline"):
        explanation.plot(tmp_path / "roofline")


def test_plot_measures_the_device(tmp_path: Path) -> None:
    layer = nn.Conv2d(4, 4, 3, groups=2)
    gconv.explain(layer, torch.randn(1, 4, 8, 8)).plot(tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 1000
    with pytest.raises(RuntimeError, match="can't measure the speed of a copy on the meta device"):
        gconv.explain(layer.to("meta"), torch.empty(1, 4, 8, 8, device="meta")).plot(tmp_path / "meta.png")
    with pytest.raises(ValueError, match="there is nothing to plot: the output is empty"):
        gconv.explain(nn.Conv2d(4, 4, 3, groups=2), torch.empty(0, 4, 8, 8)).plot(tmp_path / "empty.png")
