"""Which backend runs a call: the requested one, or the one that ``auto`` chooses by rule."""

from __future__ import annotations

import itertools
import math
import threading
from types import SimpleNamespace

import pytest
import torch
from oracle import FUNCTIONS, call_of
from torch import Tensor

import gconv
from gconv import dispatch, kernels, reference
from gconv.geometry import PASSES, ConvGeometry
from gconv.kinds import (
    CONV1D,
    CONV2D,
    CONV3D,
    CONV_TRANSPOSE1D,
    CONV_TRANSPOSE2D,
    KINDS,
    Call,
    Kind,
    conv2d_call,
    layout_of,
)


def test_backend_nests_and_comes_back_after_an_error() -> None:
    with gconv.backend("reference"):
        with gconv.backend("aten"):
            assert dispatch.requested(None) == "aten"
        with pytest.raises(KeyError), gconv.backend("aten"):
            raise KeyError
        assert dispatch.requested(None) == "reference" and dispatch.requested("aten") == "aten"
    assert dispatch.requested(None) == "auto"


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_backward_runs_where_forward_ran(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also outside of the ``with`` block and in another thread."""
    ran: list[str] = []

    def spy_on(name: str) -> None:
        original = getattr(reference, name)

        def spy(*args: Tensor) -> Tensor:
            ran.append(name)
            return original(*args)

        monkeypatch.setattr(reference, name, spy)

    for name in PASSES:
        spy_on(name)
    x = torch.randn(1, 4, *[5] * kind.dims, requires_grad=True)
    with gconv.backend("reference"):
        y = FUNCTIONS[kind](x, torch.randn(4, 2, *[3] * kind.dims), groups=2)
    thread = threading.Thread(target=y.sum().backward)
    thread.start()
    thread.join()
    assert ran == [kind.pass_of_geometry("forward"), kind.pass_of_geometry("input_grad")]


def on_gpu(channels_last: bool = True) -> SimpleNamespace:
    """Return a stand-in with the attributes of a tensor that ``gconv.dispatch`` reads."""
    stride = 1 if channels_last else 25
    return SimpleNamespace(is_cuda=True, device=torch.device("cuda"), stride=lambda axis: stride)


ALL, NONE = PASSES, ()


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
    layout, call = layout_of(tensor), conv2d_call(geometry)
    decided = {
        pass_: dispatch.decide_by_auto(pass_, tensor.device, layout, dtype, geometry).backend for pass_ in ALL
    }
    assert decided == {pass_: "triton" if pass_ in kernels_take else "aten" for pass_ in ALL}
    assert dispatch.aten_alone("auto", tensor, dtype, call) == (not kernels_take)
    with torch.no_grad():
        assert dispatch.aten_alone("auto", tensor, dtype, call) == ("forward" not in kernels_take)


def set_device(monkeypatch: pytest.MonkeyPatch, kind: str, bandwidth: float) -> None:
    """Make every tensor's device a GPU without measurements."""
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
    """A pass that moves 1.6 MB per image has a memory floor of 25 us at 62.3 images."""
    set_device(monkeypatch, "cuda", bandwidth=4e12)
    tensor, geometry, dtype = on_gpu(), geometry_of_batch(batch), torch.bfloat16
    call = conv2d_call(geometry)
    assert dispatch.aten_alone("auto", tensor, dtype, call) != taken
    found = dispatch.explain_call("auto", tensor.device, "channels_last", dtype, call)
    assert {decision.backend for decision in found.values()} == {"triton" if taken else "aten"}
    assert taken or all("too small to gain in an eager call" in d.reason for d in found.values())
    in_a_graph = [
        dispatch.decide_by_auto(pass_, tensor.device, "channels_last", dtype, geometry).backend
        for pass_ in ALL
    ]
    assert in_a_graph == ["triton"] * 3, "a compiled graph holds the call already"
    asked_for = dispatch.explain_call("triton", tensor.device, "channels_last", dtype, call)
    assert {decision.backend for decision in asked_for.values()} == {"triton"}


@pytest.mark.parametrize(("kind", "bandwidth"), [("hip", 4e12), ("cuda", math.inf)])
def test_auto_takes_no_kernel_by_rule_on_a_gpu_unlike_the_measured_one(
    kind: str, bandwidth: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An AMD GPU, for which nothing was measured, and a GPU whose driver doesn't report its memory speed."""
    set_device(monkeypatch, kind, bandwidth)
    assert dispatch.aten_alone("auto", on_gpu(), torch.bfloat16, conv2d_call(geometry_of_batch(256)))


# A layer of each kind, in groups of 4. By rule the kernels run those with images or slices in channels_last.
LAYERS = {
    CONV1D: ((4096, 128, 56), (128, 4, 3), {"padding": 1}),
    CONV2D: ((256, 128, 56, 56), (128, 4, 3, 3), {"padding": 1}),
    CONV3D: ((32, 128, 8, 56, 56), (128, 4, 1, 3, 3), {"padding": (0, 1, 1)}),
    CONV_TRANSPOSE1D: ((4096, 128, 56), (128, 4, 3), {"padding": 1}),
    CONV_TRANSPOSE2D: ((256, 128, 56, 56), (128, 4, 3, 3), {"padding": 1}),
}


def call_on_meta(kind: Kind, **changes: object) -> Call:
    """Return a call of the layer, with changed settings or another ``input`` or ``weight`` size."""
    input_size, weight_size, settings = LAYERS[kind]
    sizes = (changes.pop("input", input_size), changes.pop("weight", weight_size))
    tensors = [torch.empty(size, device="meta") for size in sizes]
    return call_of(kind, *tensors, **{"groups": 32, **settings, **changes})[1]


def test_a_transposed_call_needs_the_passes_of_its_geometry_the_other_way_round() -> None:
    for kind in KINDS:
        call = call_on_meta(kind)
        swapped = ("input_grad", "forward", "weight_grad")
        assert call.passes == (swapped if kind.transposed else PASSES)
        with torch.no_grad():
            assert call.passes == (call.passes[0],) == (swapped[:1] if kind.transposed else PASSES[:1])


def test_auto_asks_for_the_pass_that_a_transposed_call_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In inference only the input gradient of the kernels decides, not their forward pass."""
    set_device(monkeypatch, "cuda", bandwidth=4e12)
    dtype = torch.bfloat16
    for takes, of in itertools.product(PASSES, (CONV2D, CONV_TRANSPOSE2D)):
        call = call_on_meta(of)
        monkeypatch.setattr(kernels, "pays_for_a_call", lambda passes, *rest, takes=takes: takes in passes)
        assert not dispatch.aten_alone("auto", on_gpu(), dtype, call)
        with torch.no_grad():
            alone = dispatch.aten_alone("auto", on_gpu(), dtype, call)
        assert alone == (takes != ("input_grad" if of.transposed else "forward"))


DEEP = {
    "folds": ({}, True),
    "taps in depth": ({"weight": (128, 4, 3, 3, 3)}, False),
    "padding in depth": ({"padding": 1}, False),
    "stride in depth": ({"stride": (2, 1, 1)}, False),
    "stride in the slices": ({"stride": (1, 2, 2), "weight": (128, 16, 1, 3, 3), "groups": 8}, True),
}


@pytest.mark.parametrize(("changes", "folds"), DEEP.values(), ids=DEEP)
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last_3d", "contiguous"])
def test_auto_takes_kernels_for_volumes_only_if_nothing_is_copied(
    changes: dict, folds: bool, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_device(monkeypatch, "cuda", bandwidth=4e12)
    call, dtype = call_on_meta(CONV3D, **changes), torch.bfloat16
    tensor = on_gpu(channels_last)
    assert dispatch.aten_alone("auto", tensor, dtype, call) == (not (folds and channels_last))
    found = dispatch.explain_call("auto", tensor.device, layout_of(tensor, 3), dtype, call)
    assert ("triton" in {decision.backend for decision in found.values()}) == (folds and channels_last)
    if not folds:
        assert all(
            "in depth would require a copy of the input" in decision.reason for decision in found.values()
        )
    elif not channels_last:
        assert all("need 3-d inputs in channels_last_3d" in decision.reason for decision in found.values())


@pytest.mark.parametrize("kind", [CONV1D, CONV_TRANSPOSE1D], ids=str)
@pytest.mark.parametrize("channels_last", [True, False])
def test_auto_leaves_sequences_that_nobody_measured_to_pytorch(
    kind: Kind, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_device(monkeypatch, "cuda", bandwidth=4e12)
    assert dispatch.aten_alone("auto", on_gpu(channels_last), torch.bfloat16, call_on_meta(kind))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("small", [False, True], ids=["large", "small"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_explained_is_what_runs(
    kind: Kind, small: bool, channels_last: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch runs the entire call if, and only if, the explanation has no pass on the kernels."""
    set_device(monkeypatch, "cuda", bandwidth=4e12)
    tensor = on_gpu(channels_last)
    batch = {"input": (1, *LAYERS[kind][0][1:])} if small else {}
    wider = {"groups": 8, "weight": (128, 16, *LAYERS[kind][1][2:])}
    for changes in ({}, {"stride": 2}, {"dilation": 2}, wider):
        call = call_on_meta(kind, **batch, **changes)
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                layout = layout_of(tensor, kind.dims)
                found = dispatch.explain_call("auto", tensor.device, layout, dtype, call)
                alone = dispatch.aten_alone("auto", tensor, dtype, call)
            assert set(found) == set(PASSES if gradients else [kind.pass_of_geometry("forward")])
            assert alone == ({decision.backend for decision in found.values()} == {"aten"})


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_passes_run_where_they_are_explained_to(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """``backend_for``, which decides when a pass runs, agrees with the explanation of the call."""
    set_device(monkeypatch, "cuda", bandwidth=4e12)
    monkeypatch.setattr(dispatch, "_load", lambda name: name)
    call = call_on_meta(kind)
    found = dispatch.explain_call("auto", torch.device("cuda"), "channels_last", torch.bfloat16, call)
    operand = on_gpu()
    operand.dtype = torch.bfloat16
    for pass_, decision in found.items():
        assert dispatch.backend_for(pass_, "auto", operand, call.geometry) == decision.backend
