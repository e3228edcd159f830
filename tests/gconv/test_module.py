"""``GroupConv2d``, ``explain`` and ``backend``."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from marks import interpreted
from torch import Tensor, nn

import gconv
from gconv import dispatch, reference

LAYERS = {
    "plain": {"padding": 1, "groups": 4},
    "stride 2": {"stride": 2, "padding": (1, 0), "groups": 2},
    "same": {"padding": "same", "groups": 4},
    "dilated, no bias": {"dilation": 2, "groups": 4, "bias": False},
    "depthwise": {"padding": 1, "groups": 8},
    "dense": {"padding": 1},
}
PADDING_MODES = ["zeros", "reflect", "replicate", "circular"]


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("size", [(2, 8, 9, 7), (8, 9, 7)], ids=["batch", "one image"])
def test_module_is_nn_conv2d(options: dict, padding_mode: str, backend: str, size: tuple[int, ...]) -> None:
    theirs = nn.Conv2d(8, 8, 3, **options, padding_mode=padding_mode, dtype=torch.float64)
    ours = gconv.GroupConv2d(8, 8, 3, **options, padding_mode=padding_mode, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    results = []
    for layer in (ours, theirs):
        x = torch.arange(1.0, 1 + torch.Size(size).numel(), dtype=torch.float64).sin().view(size)
        with gconv.backend(backend):
            y = layer(x.requires_grad_())
            y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(*results)


def test_module_with_relu() -> None:
    layer = gconv.GroupConv2d(8, 8, 3, groups=4, activation="relu")
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(layer(x), F.conv2d(x, layer.weight, layer.bias, groups=4).relu())
    assert "groups=4, activation='relu'" in repr(layer)
    assert "activation" not in repr(gconv.GroupConv2d(8, 8, 3, groups=4))


def test_module_initialises_as_nn_conv2d() -> None:
    torch.manual_seed(3)
    theirs = nn.Conv2d(8, 12, 3, groups=4)
    torch.manual_seed(3)
    ours = gconv.GroupConv2d(8, 12, 3, groups=4)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_module_on_the_meta_device_and_in_other_dtypes() -> None:
    layer = gconv.GroupConv2d(8, 12, 3, groups=4, device="meta", dtype=torch.bfloat16)
    for name in ("aten", "reference"):
        with gconv.backend(name):
            y = layer(torch.empty(2, 8, 6, 6, device="meta", dtype=torch.bfloat16))
        assert (y.shape, y.dtype, y.device.type) == ((2, 12, 4, 4), torch.bfloat16, "meta")


def test_explain_counts_flops_bytes_and_the_floor() -> None:
    layer = gconv.GroupConv2d(128, 128, 3, padding=1, groups=32, bias=False)
    told = gconv.explain(layer, torch.randn(8, 128, 56, 56))
    assert told.flops == 2 * (8 * 128 * 56 * 56) * (4 * 3 * 3)
    assert told.bytes == 4 * (2 * 8 * 128 * 56 * 56 + 128 * 4 * 3 * 3)
    assert told.floor == told.bytes / told.copy_speed > 0
    assert (told.backend, told.geometry.channels_per_group) == ("aten", (4, 4))
    assert gconv.explain(layer.bfloat16(), torch.randn(8, 128, 56, 56).bfloat16()).bytes == told.bytes / 2
    text = str(told)
    assert "GroupConv2d(128, 128" in text and "aten: gconv has no kernels for cpu" in text
    assert "0.2312 GFLOP a pass, 8.99 FLOP a byte" in text and "25.71 MB" in text


def test_explain_follows_backend_padding_mode_and_plain_layers() -> None:
    layer = nn.Conv2d(8, 8, 3, padding=1, groups=2, padding_mode="circular", dtype=torch.float64)
    with gconv.backend("reference"):
        told = gconv.explain(layer, torch.randn(8, 6, 5, dtype=torch.float64))
    assert (told.backend, told.reason) == ("reference", "asked for")
    assert told.geometry.input_size == (1, 8, 8, 7) and told.geometry.output_size == (1, 8, 6, 5)
    assert gconv.explain(layer, torch.randn(8, 6, 5, dtype=torch.float64), backend="aten").backend == "aten"
    with pytest.raises(RuntimeError, match="one dtype"):
        gconv.explain(layer, torch.randn(8, 6, 5))
    with pytest.raises(TypeError, match=r"layer must be an nn\.Conv2d, got Linear"):
        gconv.explain(nn.Linear(2, 2), torch.randn(2, 2))
    told = gconv.explain(layer.to("meta"), torch.empty(8, 6, 5, device="meta", dtype=torch.float64))
    assert told.backend == "aten" and told.flops
    with pytest.raises(RuntimeError, match="meta holds no data"):
        str(told)


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
    told = gconv.explain(layer, x, backend="triton")
    if pack == 1:
        assert told.packs is None
    else:
        assert f"groups share a tile, {pack} in forward, {pack} in input_grad: an inf" in told.packs
        assert told.packs in str(told)
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


def test_backend_nests_and_comes_back_after_an_error() -> None:
    with gconv.backend("reference"):
        with gconv.backend("aten"):
            assert dispatch.requested(None) == "aten"
        with pytest.raises(KeyError), gconv.backend("aten"):
            raise KeyError
        assert dispatch.requested(None) == "reference" and dispatch.requested("aten") == "aten"
    assert dispatch.requested(None) == "auto"


def test_backward_runs_where_forward_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside the ``with`` block too, and in another thread."""
    ran: list[str] = []
    original = reference.input_grad

    def spy(*args: Tensor) -> Tensor:
        ran.append("reference")
        return original(*args)

    monkeypatch.setattr(reference, "input_grad", spy)
    x = torch.randn(1, 4, 5, 5, requires_grad=True)
    with gconv.backend("reference"):
        y = gconv.group_conv2d(x, torch.randn(4, 2, 3, 3), groups=2)
    thread = threading.Thread(target=y.sum().backward)
    thread.start()
    thread.join()
    assert ran == ["reference"]
