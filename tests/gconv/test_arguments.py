"""Invalid arguments raise the same error on every backend, before anything runs, with the numbers in it."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from calls import BACKENDS, B, W, X, right
from oracle import FUNCTIONS
from torch import nn

import gconv
from gconv import arguments
from gconv.kinds import CONV1D, CONV2D, CONV3D, CONV_TRANSPOSE1D, CONV_TRANSPOSE2D, KINDS, Kind
from gconv.module import LAYERS

TRANSPOSED = [CONV_TRANSPOSE1D, CONV_TRANSPOSE2D]

# Changes of a valid call of group_conv2d, and the errors that they raise.
REFUSED = [
    ({"input": [1, 2]}, TypeError, "input must be a Tensor, got list"),
    (
        {"residual": torch.ones(2, 8, 10, 10)},
        RuntimeError,
        "residual must broadcast with the output (1, 6, 3, 3), got (2, 8, 10, 10)",
    ),
    ({"weight": None}, TypeError, "weight must be a Tensor, got NoneType"),
    ({"bias": 1.0}, TypeError, "bias must be a Tensor, got float"),
    ({"groups": 2.0}, TypeError, "groups must be an int, got 2.0 of type float"),
    ({"stride": 1.5}, TypeError, "stride must be an int or a pair of ints, got 1.5 of type float"),
    ({"padding": (1, 0.5)}, TypeError, "padding must be an int or a pair of ints, got (1, 0.5)"),
    ({"dilation": True}, TypeError, "dilation must be an int or a pair of ints, got True"),
    ({"stride": (1, 1, 1)}, RuntimeError, "stride must be one or two numbers, got 3: (1, 1, 1)"),
    ({"stride": 0}, RuntimeError, "stride must be at least 1, got 0"),
    ({"stride": (1, -2)}, RuntimeError, "stride must be at least 1, got (1, -2)"),
    ({"padding": -1}, RuntimeError, "padding must be at least 0, got -1"),
    ({"dilation": 0}, RuntimeError, "dilation must be at least 1, got 0"),
    ({"groups": 0}, RuntimeError, "groups must be at least 1, got 0"),
    ({"groups": -2}, RuntimeError, "groups must be at least 1, got -2"),
    (
        {"groups": 3},
        RuntimeError,
        "in_channels=4 is not divisible by groups=3; weight (6, 2, 3, 3) expects 6",
    ),
    (
        {"stride": np.array([2, 1])},
        TypeError,
        "stride must be an int or a pair of ints, got array([2, 1]) of type",
    ),
    ({"weight": W[:5]}, RuntimeError, "out_channels=5 is not divisible by groups=2"),
    (
        {"groups": 1},
        RuntimeError,
        "2 input channels (2 per group) with groups=1, but input (1, 4, 5, 5) has 4",
    ),
    ({"bias": torch.ones(7)}, RuntimeError, "(6,), one number per output channel, got (7,)"),
    ({"bias": torch.ones(1, 6)}, RuntimeError, "(6,), one number per output channel, got (1, 6)"),
    ({"bias": torch.ones(6, 1)}, RuntimeError, "(6,), one number per output channel, got (6, 1)"),
    ({"input": X[0, 0]}, RuntimeError, "input must have shape (N, C, H, W) or (C, H, W), got (5, 5)"),
    (
        {"weight": W[0]},
        RuntimeError,
        "weight must have shape (out_channels, in_channels / groups, R, S), got (2, 3, 3)",
    ),
    ({"dilation": 3}, RuntimeError, "got kernel 3 x 3 with dilation (3, 3) and input 5 x 5"),
    ({"input": X[:, :, :0]}, RuntimeError, "only the batch size may be 0, got input (1, 4, 0, 5)"),
    (
        {"weight": W[:0]},
        RuntimeError,
        "only the batch size may be 0, got input (1, 4, 5, 5) and weight (0, 2",
    ),
    ({"weight": W[..., :0]}, RuntimeError, "and weight (6, 2, 3, 0)"),
    ({"weight": W.double()}, RuntimeError, "the same dtype, got torch.float32, torch.float64, torch.float32"),
    ({"bias": B.half()}, RuntimeError, "the same dtype, got torch.float32, torch.float32, torch.float16"),
    (
        dict.fromkeys(("input", "weight", "bias"), X.bool()),
        RuntimeError,
        "dense tensor of numbers, got torch.bool",
    ),
    ({"input": X.to_sparse()}, RuntimeError, "in layout torch.sparse_coo"),
    ({"weight": W.to("meta")}, RuntimeError, "on the same device, got cpu, meta, cpu"),
    ({"bias": B.to("meta")}, RuntimeError, "on the same device, got cpu, cpu, meta"),
    ({"padding": "full"}, ValueError, "padding must be integers, 'same' or 'valid', got 'full'"),
    ({"padding": "same", "stride": 2}, RuntimeError, "padding='same' requires stride 1, got stride=(2, 2)"),
    (
        {"activation": "relu", "input": X.cfloat(), "weight": W.cfloat(), "bias": B.cfloat()},
        RuntimeError,
        "activation='relu' is not defined for complex numbers, got torch.complex64",
    ),
    (
        {"activation": "gelu"},
        ValueError,
        "activation must be None or one of 'relu', 'relu6', 'silu', 'hardswish', got 'gelu'",
    ),
    ({"activation": ["relu"]}, ValueError, "got ['relu']"),
]


# Errors that depend on the kind, in calls of the other functions. Only the shapes of the tensors matter.
V, WV = torch.randn(1, 4, 5, 5, 5), torch.randn(6, 2, 3, 3, 3)
REFUSED_ELSEWHERE = [
    (CONV1D, {"input": V[0, 0, 0, 0]}, RuntimeError, "input must have shape (N, C, L) or (C, L), got (5,)"),
    (
        CONV1D,
        {"weight": W},
        RuntimeError,
        "weight must have shape (out_channels, in_channels / groups, S), got (6, 2",
    ),
    (
        CONV1D,
        {"stride": 1.5},
        TypeError,
        "stride must be an int or a tuple of one int, got 1.5 of type float",
    ),
    (CONV1D, {"padding": (1, 1)}, RuntimeError, "padding must be one number, got 2: (1, 1)"),
    (CONV1D, {"dilation": 0}, RuntimeError, "dilation must be at least 1, got 0"),
    (CONV1D, {"dilation": 3}, RuntimeError, "got kernel 3 with dilation 3 and input 5 with padding (0, 0)"),
    (
        CONV1D,
        {"padding": "same", "stride": 2},
        RuntimeError,
        "padding='same' requires stride 1, got stride=2",
    ),
    (CONV1D, {"padding": "full"}, ValueError, "padding must be integers, 'same' or 'valid', got 'full'"),
    (
        CONV1D,
        {"groups": 1},
        RuntimeError,
        "2 input channels (2 per group) with groups=1, but input (1, 4, 5) has",
    ),
    (CONV1D, {"bias": torch.ones(7)}, RuntimeError, "(6,), one number per output channel, got (7,)"),
    (CONV3D, {"input": V[0, 0]}, RuntimeError, "(N, C, D, H, W) or (C, D, H, W), got (5, 5, 5)"),
    (
        CONV3D,
        {"weight": W},
        RuntimeError,
        "weight must have shape (out_channels, in_channels / groups, T, R, S), got",
    ),
    (CONV3D, {"stride": 1.5}, TypeError, "stride must be an int or three ints, got 1.5 of type float"),
    (CONV3D, {"padding": (1, 1)}, RuntimeError, "padding must be one or three numbers, got 2: (1, 1)"),
    (CONV3D, {"stride": (1, 1, 0)}, RuntimeError, "stride must be at least 1, got (1, 1, 0)"),
    (CONV3D, {"dilation": (3, 1, 1)}, RuntimeError, "3 x 3 x 3 with dilation (3, 1, 1) and input 5 x 5 x 5"),
    (CONV3D, {"padding": "same", "stride": (2, 1, 1)}, RuntimeError, "stride 1, got stride=(2, 1, 1)"),
    (CONV3D, {"input": V[:, :, :0]}, RuntimeError, "only the batch size may be 0, got input (1, 4, 0, 5, 5)"),
    (CONV3D, {"weight": WV[:5]}, RuntimeError, "out_channels=5 is not divisible by groups=2"),
    (CONV_TRANSPOSE1D, {"input": X}, RuntimeError, "must have shape (N, C, L) or (C, L), got (1, 4, 5, 5)"),
    (
        CONV_TRANSPOSE1D,
        {"weight": W},
        RuntimeError,
        "(in_channels, out_channels / groups, S), got (6, 2, 3, 3)",
    ),
    (
        CONV_TRANSPOSE1D,
        {"output_padding": 0.5},
        TypeError,
        "output_padding must be an int or a tuple of one int",
    ),
    (
        CONV_TRANSPOSE1D,
        {"output_padding": 1},
        RuntimeError,
        "smaller than stride or dilation, got 1 with stride 1",
    ),
    (
        CONV_TRANSPOSE1D,
        {"padding": 4},
        RuntimeError,
        "the output would be empty: -1 from input 5 with padding 4 and",
    ),
    (
        CONV_TRANSPOSE2D,
        {"input": X[0, 0]},
        RuntimeError,
        "input must have shape (N, C, H, W) or (C, H, W), got (5, 5)",
    ),
    (
        CONV_TRANSPOSE2D,
        {"weight": W[0]},
        RuntimeError,
        "(in_channels, out_channels / groups, R, S), got (2, 3, 3)",
    ),
    (
        CONV_TRANSPOSE2D,
        {"weight": W},
        RuntimeError,
        "weight (6, 2, 3, 3) expects 6 input channels with groups=2, but input (1, 4, 5",
    ),
    (
        CONV_TRANSPOSE2D,
        {"groups": 3},
        RuntimeError,
        "in_channels=4 is not divisible by groups=3; weight (4, 3, 3",
    ),
    (CONV_TRANSPOSE2D, {"groups": 0}, RuntimeError, "groups must be at least 1, got 0"),
    (CONV_TRANSPOSE2D, {"groups": 1}, RuntimeError, "(3,), one number per output channel, got (6,)"),
    (
        CONV_TRANSPOSE2D,
        {"padding": "same"},
        TypeError,
        "padding must be an int or a pair of ints, got 'same'",
    ),
    (CONV_TRANSPOSE2D, {"padding": -1}, RuntimeError, "padding must be at least 0, got -1"),
    (CONV_TRANSPOSE2D, {"output_padding": -1}, RuntimeError, "output_padding must be at least 0, got -1"),
    (
        CONV_TRANSPOSE2D,
        {"output_padding": (1, 1, 1)},
        RuntimeError,
        "output_padding must be one or two numbers, got 3",
    ),
    (
        CONV_TRANSPOSE2D,
        {"output_padding": (2, 1), "stride": (2, 1), "dilation": (1, 2)},
        RuntimeError,
        "smaller than stride or dilation, got (2, 1) with stride (2, 1) and dilation (1, 2)",
    ),
    (
        CONV_TRANSPOSE2D,
        {"padding": (4, 0)},
        RuntimeError,
        "empty: -1 x 7 from input 5 x 5 with padding (4, 0) and output",
    ),
    (
        CONV_TRANSPOSE2D,
        {"input": X[..., :0]},
        RuntimeError,
        "only the batch size may be 0, got input (1, 4, 5, 0)",
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kind", "change", "error", "message"),
    [
        pytest.param(*case, id=f"{case[0]}: {case[-1]}")
        for case in [*((CONV2D, *case) for case in REFUSED), *REFUSED_ELSEWHERE]
    ],
)
def test_bad_arguments_raise_with_the_numbers(
    kind: Kind, change: dict, error: type[Exception], message: str, backend: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        FUNCTIONS[kind](**(right(kind) | change), backend=backend)


EQUAL = [(1, True), (1, 1.0), ((1, 1), (1, True)), ((1, 1), (1.0, 1))]


@pytest.mark.parametrize(
    ("name", "fits", "wrong"),
    [*((name, *pair) for name in ("stride", "padding", "dilation") for pair in EQUAL), ("groups", 2, 2.0)],
)
def test_what_equals_a_checked_number_is_checked_itself(name: str, fits: Any, wrong: Any) -> None:
    """``True == 1.0 == 1``, so the cached answer for one must not be used for the others."""
    gconv.group_conv2d(**(right(CONV2D) | {name: fits}))
    with pytest.raises(TypeError, match=f"{name} must be"):
        gconv.group_conv2d(**(right(CONV2D) | {name: wrong}))


def test_checked_sizes_are_kept_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "_checked", {})
    monkeypatch.setattr(arguments, "CHECKED", 2)
    for batch in (1, 2, 3, 1):
        gconv.group_conv2d(X.expand(batch, -1, -1, -1), W, groups=2)
    assert [call.input_size[0] for call in arguments._checked.values()] == [1, 2]


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.functionalize], ids=["vmap", "functionalize"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_symbolic_sizes_beneath_a_transform_are_traced(kind: Kind, transform: Callable) -> None:
    """Such tensors look like others, but their sizes can't be hashed."""
    convolve = transform(lambda x, w: FUNCTIONS[kind](x, w, groups=2))
    x, w = (right(kind)[name] for name in ("input", "weight"))
    operands = (x[None], w[None]) if transform is torch.vmap else (x, w)
    traced = torch.fx.experimental.proxy_tensor.make_fx(convolve, tracing_mode="symbolic")(*operands)
    torch.testing.assert_close(traced(*operands), convolve(*operands))


def test_unknown_backend_is_refused() -> None:
    for use in (
        partial(gconv.group_conv2d, X, W, groups=2, backend="cudnn"),
        partial(gconv.backend, "cudnn"),
    ):
        with pytest.raises(
            ValueError, match="backend must be one of 'auto', 'triton', 'aten', 'reference', got 'cudnn'"
        ):
            use()


WRONG_TRANSPOSED = {
    "output_padding as large as the stride": {"stride": 2, "output_padding": 2},
    "output_padding below 0": {"stride": 2, "output_padding": -1},
    "an empty output": {"padding": 4},
    "padding below 0": {"padding": -1},
    "padding as a string": {"padding": "same"},
    "stride of 0": {"stride": 0},
    "stride below 0": {"stride": -1},
    "dilation of 0": {"dilation": 0},
    "groups that do not divide": {"groups": 3},
    "groups of 0": {"groups": 0},
    "wrong channels": {"input": torch.randn(1, 6, 5)},
    "a bias for other channels": {"bias": torch.randn(5)},
    "no dimension of the kernel": {"weight": torch.randn(4, 3)},
    "one number": {"input": torch.randn(5)},
    "another dtype": {"input": torch.randn(1, 4, 5, dtype=torch.float64)},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", WRONG_TRANSPOSED.values(), ids=WRONG_TRANSPOSED)
@pytest.mark.parametrize("kind", TRANSPOSED, ids=str)
def test_transposed_convolutions_raise_what_pytorchs_raise(kind: Kind, change: dict, backend: str) -> None:
    if "input" in change and change["input"].ndim == 3 and kind.dims == 2:
        change = {"input": change["input"][..., None].expand(-1, -1, -1, 5)}
    call = right(kind) | change
    with pytest.raises((RuntimeError, TypeError)) as theirs:
        kind.pytorch(**call)
    with pytest.raises(theirs.type):
        FUNCTIONS[kind](**call, backend=backend)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"groups": 3}, ValueError, "in_channels=4 is not divisible by groups=3"),
        ({"out_channels": 5, "groups": 2}, ValueError, "out_channels=5 is not divisible by groups=2"),
        ({"in_channels": 0}, ValueError, "in_channels must be at least 1, got 0"),
        ({"groups": 0}, ValueError, "groups must be"),
        ({"kernel_size": 0}, RuntimeError, "kernel_size must be at least 1, got 0"),
        ({"stride": (1, 0)}, RuntimeError, "stride must be at least 1, got (1, 0)"),
        ({"padding": -1}, RuntimeError, "padding must be at least 0, got -1"),
        ({"dilation": "2"}, TypeError, "dilation must be an int or a pair of ints, got '2'"),
        ({"activation": "gelu"}, ValueError, "activation must be None or one of 'relu', "),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("layer", [gconv.GroupConv2d, gconv.GroupConvTranspose2d])
def test_bad_layer_arguments_raise_when_it_is_made(
    layer: type[nn.Module], change: dict, error: type[Exception], message: str
) -> None:
    arguments = {"in_channels": 4, "out_channels": 4, "kernel_size": 3, **change}
    with pytest.raises(error, match=re.escape(message)):
        layer(**arguments)


@pytest.mark.parametrize(
    ("layer", "change", "error", "message"),
    [
        (
            gconv.GroupConv1d,
            {"stride": "2"},
            TypeError,
            "stride must be an int or a tuple of one int, got '2'",
        ),
        (
            gconv.GroupConv3d,
            {"kernel_size": (3, 3)},
            RuntimeError,
            "kernel_size must be one or three numbers",
        ),
        (gconv.GroupConv3d, {"stride": (1, 1, 0)}, RuntimeError, "stride must be at least 1, got (1, 1, 0)"),
        (
            gconv.GroupConvTranspose1d,
            {"output_padding": -1},
            RuntimeError,
            "output_padding must be at least 0",
        ),
        (
            gconv.GroupConvTranspose2d,
            {"padding": "same"},
            TypeError,
            "a pair of ints, got 'same' of type str",
        ),
        (gconv.GroupConvTranspose2d, {"padding_mode": "reflect"}, ValueError, 'Only "zeros" padding mode'),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_of_one_layer_raise_when_it_is_made(
    layer: type[nn.Module], change: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        layer(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, **change})


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_refuse_an_input_of_other_channels(layer: type[nn.Module]) -> None:
    size = (1, 6, *[5] * layer._gconv_kind.dims)
    with pytest.raises(RuntimeError, match=re.escape(f"input {size} has 6")):
        layer(4, 4, 3, groups=2)(torch.randn(size))
    assert isinstance(layer(4, 4, 3, groups=2), layer._gconv_kind.layer)
