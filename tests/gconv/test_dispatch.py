"""Which backend runs a call: as asked for, or as ``auto`` chooses by rule."""

from __future__ import annotations

import math
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import gconv
from gconv import dispatch, reference
from gconv.geometry import ConvGeometry


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


def on_gpu(channels_last: bool = True, **changes: object) -> SimpleNamespace:
    """What :mod:`gconv.dispatch` asks of a tensor."""
    stride = (1, 1, 1) if channels_last else (25, 5, 1)
    return SimpleNamespace(
        is_cuda=True, device=torch.device("cuda"), stride=lambda axis: stride[axis], **changes
    )


ALL, NONE = dispatch.PASSES, ()


@pytest.mark.parametrize(
    ("weight", "groups", "stride", "dilation", "dtype", "channels_last", "kernels_take"),
    [
        ((128, 4, 3, 3), 32, (1, 1), 1, torch.bfloat16, True, ALL),
        ((128, 4, 3, 3), 32, (1, 1), 1, torch.float16, True, ALL),
        ((128, 16, 3, 3), 8, (1, 1), 1, torch.bfloat16, True, ALL),
        ((128, 32, 3, 3), 4, (1, 1), 1, torch.bfloat16, True, ALL),
        ((96, 32, 3, 3), 4, (1, 1), 1, torch.bfloat16, True, ALL),
        ((128, 8, 3, 3), 16, (2, 2), 1, torch.bfloat16, True, ("forward", "input_grad")),
        ((128, 16, 3, 3), 8, (2, 2), 1, torch.bfloat16, True, ("input_grad", "weight_grad")),
        ((128, 32, 3, 3), 4, (2, 2), 1, torch.bfloat16, True, ("input_grad", "weight_grad")),
        ((128, 64, 3, 3), 2, (1, 1), 1, torch.bfloat16, True, NONE),
        ((128, 4, 3, 3), 32, (2, 1), 1, torch.bfloat16, True, NONE),
        ((128, 4, 3, 3), 32, (3, 3), 1, torch.bfloat16, True, NONE),
        ((128, 4, 3, 3), 32, (1, 1), 2, torch.bfloat16, True, NONE),
        ((128, 4, 3, 3), 32, (1, 1), 1, torch.float32, True, NONE),
        ((128, 4, 3, 3), 32, (1, 1), 1, torch.bfloat16, False, NONE),
        ((128, 4, 3, 3), 32, (1, 1), 1, torch.float64, True, NONE),
        ((128, 4, 5, 5), 32, (1, 1), 1, torch.bfloat16, True, NONE),
        ((128, 1, 3, 3), 128, (1, 1), 1, torch.bfloat16, True, NONE),
        ((128, 1, 3, 3), 128, (2, 2), 1, torch.bfloat16, True, NONE),
        ((16, 128, 3, 3), 1, (1, 1), 1, torch.bfloat16, True, NONE),
    ],
)
def test_auto_takes_by_rule_what_was_faster_where_it_was_measured(
    weight: tuple[int, int, int, int],
    groups: int,
    stride: tuple[int, int],
    dilation: int,
    dtype: torch.dtype,
    channels_last: bool,
    kernels_take: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_device(monkeypatch, "cuda", bandwidth=4e12)
    geometry = ConvGeometry.of((256, 128, 56, 56), weight, stride, (1, 1, 1, 1), (dilation,) * 2, groups)
    tensor = on_gpu(channels_last)
    layout = dispatch.layout_of(tensor)
    decided = {
        pass_: dispatch.decide_by_auto(pass_, tensor.device, layout, dtype, geometry).backend for pass_ in ALL
    }
    assert decided == {pass_: "triton" if pass_ in kernels_take else "aten" for pass_ in ALL}
    assert dispatch.aten_alone("auto", tensor, dtype, geometry) == (not kernels_take)
    with torch.no_grad():
        assert dispatch.aten_alone("auto", tensor, dtype, geometry) == ("forward" not in kernels_take)


def set_device(monkeypatch: pytest.MonkeyPatch, kind: str, bandwidth: float) -> None:
    """Make every tensor's device a GPU that nothing was measured on."""
    from gconv import kernels
    from gconv.kernels.device import Device

    monkeypatch.setattr(dispatch, "_device_problem", lambda device: None)
    device = Device(kind, "no table for it", 132, 90, bandwidth)
    monkeypatch.setattr(kernels, "device_of", lambda _: device)


def geometry_of_batch(batch: int) -> ConvGeometry:
    return ConvGeometry.of((batch, 128, 56, 56), (128, 4, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 32)


@pytest.mark.parametrize(("batch", "taken"), [(1, False), (62, False), (63, True), (256, True)])
def test_auto_leaves_small_eager_calls_to_pytorch(
    batch: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass of 1.6 MB an image has a floor of 25 us at 62.3 images."""
    set_device(monkeypatch, "cuda", bandwidth=4e12)
    tensor, geometry, dtype = on_gpu(), geometry_of_batch(batch), torch.bfloat16
    assert dispatch.aten_alone("auto", tensor, dtype, geometry) != taken
    found = dispatch.explain_call("auto", tensor.device, "channels_last", dtype, geometry)
    assert {decision.backend for decision in found.values()} == {"triton" if taken else "aten"}
    assert taken or all("too small to gain in an eager call" in d.reason for d in found.values())
    in_a_graph = [
        dispatch.decide_by_auto(pass_, tensor.device, "channels_last", dtype, geometry).backend
        for pass_ in ALL
    ]
    assert in_a_graph == ["triton"] * 3, "a compiled graph holds the call already"
    asked_for = dispatch.explain_call("triton", tensor.device, "channels_last", dtype, geometry)
    assert {decision.backend for decision in asked_for.values()} == {"triton"}


@pytest.mark.parametrize(("kind", "bandwidth"), [("hip", 4e12), ("cuda", math.inf)])
def test_auto_takes_no_kernel_by_rule_on_a_gpu_unlike_the_measured_one(
    kind: str, bandwidth: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AMD's, where nothing was measured; one whose driver does not tell how fast its memory is."""
    set_device(monkeypatch, kind, bandwidth)
    assert dispatch.aten_alone("auto", on_gpu(), torch.bfloat16, geometry_of_batch(256))
