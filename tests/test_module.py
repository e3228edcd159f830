"""``GroupConv2d``, ``convert``, ``explain`` and ``backend``: gconv in other people's networks."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
import torch.nn.functional as F
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


def network() -> nn.Module:
    shared = nn.Conv2d(16, 16, 3, padding=1, groups=4)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        shared,
        nn.Conv2d(16, 16, 3, stride=2, padding=1, dilation=(2, 1), groups=16, padding_mode="reflect"),
        shared,
        nn.Conv2d(16, 8, 1),
    )


def test_convert_swaps_grouped_convolutions_and_keeps_all_else() -> None:
    model = network().train()
    original = copy.deepcopy(model)
    seen: list[str] = []
    model[2].register_forward_hook(lambda *_: seen.append("hook"))
    before = {key: id(p) for key, p in model.named_parameters(remove_duplicate=False)}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    report = gconv.convert(model)

    assert [layer.name for layer in report.swapped] == ["1.0", "2", "3"]
    assert [layer.name for layer in report.left] == ["0", "5"]
    assert {key: id(p) for key, p in model.named_parameters(remove_duplicate=False)} == before
    assert list(model.state_dict()) == list(original.state_dict())
    assert all(type(model[i]) is gconv.GroupConv2d for i in (2, 3, 4)) and model[2] is model[4]
    x = torch.randn(2, 3, 9, 9)
    for name in ("aten", "reference"):
        with gconv.backend(name):
            torch.testing.assert_close(model(x), original(x))
    assert seen
    model(x).sum().backward()
    optimizer.step()
    assert not torch.equal(model[2].weight, original[2].weight)


def test_state_dicts_go_both_ways_strictly() -> None:
    plain, converted = network(), network()
    gconv.convert(converted)
    saved = io.BytesIO()
    torch.save(plain.state_dict(), saved)
    saved.seek(0)
    converted.load_state_dict(torch.load(saved, weights_only=True), strict=True)
    x = torch.randn(2, 3, 9, 9)
    plain.eval(), converted.eval()
    assert torch.equal(plain(x), converted(x))
    other = network().eval()
    other.load_state_dict(converted.state_dict(), strict=True)
    assert torch.equal(other(x), converted(x))


def test_convert_says_what_it_left_and_why() -> None:
    class Scaled(nn.Conv2d):
        pass

    model = nn.ModuleDict(
        {
            "dense": nn.Conv2d(8, 8, 3),
            "mine": Scaled(8, 8, 3, groups=2),
            "kept": nn.Conv2d(8, 8, (3, 5), stride=(2, 1), groups=4),
            "done": gconv.GroupConv2d(8, 8, 3, groups=4),
            "patched": nn.Conv2d(8, 8, 3, groups=2),
            "fast": nn.Conv2d(8, 16, 3, stride=2, dilation=3, groups=4),
        }
    )
    model["patched"].forward = lambda x: x
    report = gconv.convert(model, filter=lambda module, name: name != "kept")
    assert {layer.name: layer.reason for layer in report.layers} == {
        "dense": "dense: groups=1",
        "mine": "its class Scaled may do more than nn.Conv2d",
        "kept": "the filter left it",
        "done": "is a GroupConv2d already",
        "patched": "its forward was replaced",
        "fast": "groups=4",
    }
    assert str(report).splitlines() == [
        "layer    geometry                            result   why",
        "dense    8 -> 8, 3x3                         left     dense: groups=1",
        "mine     8 -> 8, 3x3                         left     its class Scaled may do more than nn.Conv2d",
        "kept     8 -> 8, 3x5, stride (2, 1)          left     the filter left it",
        "done     8 -> 8, 3x3                         left     is a GroupConv2d already",
        "patched  8 -> 8, 3x3                         left     its forward was replaced",
        "fast     8 -> 16, 3x3, stride 2, dilation 3  swapped  groups=4",
        "1 of 6 convolutions swapped",
    ]
    assert not gconv.convert(model, filter=lambda module, name: name != "kept").swapped


def test_convert_of_a_single_layer_and_of_no_module() -> None:
    layer = nn.Conv2d(8, 8, 3, groups=2)
    assert "(the model)" in str(gconv.convert(layer)) and isinstance(layer, gconv.GroupConv2d)
    assert "0 of 0" in str(gconv.convert(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got function"):
        gconv.convert(lambda x: x)


def test_converted_modules_copy_and_pickle() -> None:
    layer = nn.Conv2d(8, 8, 3, groups=2)
    gconv.convert(layer)
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    x = torch.randn(1, 8, 5, 5)
    for twin in (copy.deepcopy(layer), torch.load(saved, weights_only=False)):
        assert type(twin) is gconv.GroupConv2d
        assert torch.equal(twin(x), layer(x))


def test_explain_counts_flops_bytes_and_the_floor() -> None:
    layer = gconv.GroupConv2d(128, 128, 3, padding=1, groups=32, bias=False)
    told = gconv.explain(layer, torch.randn(8, 128, 56, 56))
    assert told.flops == 2 * (8 * 128 * 56 * 56) * (4 * 3 * 3)
    assert told.bytes == 4 * (2 * 8 * 128 * 56 * 56 + 128 * 4 * 3 * 3)
    assert told.floor == told.bytes / told.copy_speed > 0
    assert (told.backend, told.geometry.channels_per_group) == ("aten", (4, 4))
    assert gconv.explain(layer.bfloat16(), torch.randn(8, 128, 56, 56).bfloat16()).bytes == told.bytes / 2
    text = str(told)
    assert "GroupConv2d(128, 128" in text and "aten: gconv has no kernel for cpu" in text
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
    with pytest.raises(RuntimeError, match="meta holds no data"):
        gconv.explain(layer.to("meta"), torch.empty(8, 6, 5, device="meta", dtype=torch.float64))


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
