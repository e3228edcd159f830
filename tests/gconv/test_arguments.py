"""What is refused: the same on every backend, before anything runs, with the numbers in the message."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from marks import interpreted
from oracle import FUNCTIONS, Case, check
from torch import nn

import gconv
from gconv import arguments
from gconv.kinds import CONV1D, CONV2D, CONV3D, CONV_TRANSPOSE1D, CONV_TRANSPOSE2D, KINDS, Kind
from gconv.module import LAYERS

BACKENDS = ("aten", "reference")
X, W, B = torch.randn(1, 4, 5, 5), torch.randn(6, 2, 3, 3), torch.randn(6)
TRANSPOSED = [CONV_TRANSPOSE1D, CONV_TRANSPOSE2D]


def right(kind: Kind) -> dict[str, Any]:
    """Return the arguments of a call that is right: 4 channels become 6 in 2 groups, by 3 taps on 5."""
    if kind is CONV2D:
        return {"input": X, "weight": W, "bias": B, "groups": 2}
    channels = (4, 3) if kind.transposed else (6, 2)
    weight = torch.randn(*channels, *[3] * kind.dims)
    return {"input": torch.randn(1, 4, *[5] * kind.dims), "weight": weight, "bias": B, "groups": 2}


# What is changed in the call of group_conv2d that is right.
REFUSED = [
    ({"input": [1, 2]}, TypeError, "input must be a Tensor, got list"),
    ({"weight": None}, TypeError, "weight must be a Tensor, got NoneType"),
    ({"bias": 1.0}, TypeError, "bias must be a Tensor, got float"),
    ({"groups": 2.0}, TypeError, "groups must be an int, got 2.0 of type float"),
    ({"stride": 1.5}, TypeError, "stride must be an int or a pair of ints, got 1.5 of type float"),
    ({"padding": (1, 0.5)}, TypeError, "padding must be an int or a pair of ints, got (1, 0.5)"),
    ({"dilation": True}, TypeError, "dilation must be an int or a pair of ints, got True"),
    ({"stride": (1, 1, 1)}, RuntimeError, "stride must be one number or two, got 3: (1, 1, 1)"),
    ({"stride": 0}, RuntimeError, "stride must be at least 1, got 0"),
    ({"stride": (1, -2)}, RuntimeError, "stride must be at least 1, got (1, -2)"),
    ({"padding": -1}, RuntimeError, "padding must be at least 0, got -1"),
    ({"dilation": 0}, RuntimeError, "dilation must be at least 1, got 0"),
    ({"groups": 0}, RuntimeError, "groups must be at least 1, got 0"),
    ({"groups": -2}, RuntimeError, "groups must be at least 1, got -2"),
    ({"groups": 3}, RuntimeError, "in_channels=4 is not divisible by groups=3; weight (6, 2, 3, 3) takes 6"),
    (
        {"stride": np.array([2, 1])},
        TypeError,
        "stride must be an int or a pair of ints, got array([2, 1]) of type",
    ),
    ({"weight": W[:5]}, RuntimeError, "out_channels=5 is not divisible by groups=2"),
    ({"groups": 1}, RuntimeError, "2 input channels a group, 2 with groups=1, but input (1, 4, 5, 5) has 4"),
    ({"bias": torch.ones(7)}, RuntimeError, "each of the 6 output channels, got (7,)"),
    ({"bias": torch.ones(1, 6)}, RuntimeError, "each of the 6 output channels, got (1, 6)"),
    ({"bias": torch.ones(6, 1)}, RuntimeError, "each of the 6 output channels, got (6, 1)"),
    ({"input": X[0, 0]}, RuntimeError, "input must be (N, C, H, W) or (C, H, W), got (5, 5)"),
    (
        {"weight": W[0]},
        RuntimeError,
        "weight must be (out_channels, in_channels / groups, R, S), got (2, 3, 3)",
    ),
    ({"dilation": 3}, RuntimeError, "larger than the input: 3 x 3 with dilation (3, 3) on 5 x 5"),
    ({"input": X[:, :, :0]}, RuntimeError, "only the batch may be empty, got input (1, 4, 0, 5)"),
    ({"weight": W[:0]}, RuntimeError, "only the batch may be empty, got input (1, 4, 5, 5) and weight (0, 2"),
    ({"weight": W[..., :0]}, RuntimeError, "and weight (6, 2, 3, 0)"),
    ({"weight": W.double()}, RuntimeError, "one dtype, got torch.float32, torch.float64, torch.float32"),
    ({"bias": B.half()}, RuntimeError, "one dtype, got torch.float32, torch.float32, torch.float16"),
    (
        dict.fromkeys(("input", "weight", "bias"), X.bool()),
        RuntimeError,
        "dense tensor of numbers, got torch.bool",
    ),
    ({"input": X.to_sparse()}, RuntimeError, "in layout torch.sparse_coo"),
    ({"weight": W.to("meta")}, RuntimeError, "on one device, got cpu, meta, cpu"),
    ({"bias": B.to("meta")}, RuntimeError, "on one device, got cpu, cpu, meta"),
    ({"padding": "full"}, ValueError, "padding must be numbers, 'same' or 'valid', got 'full'"),
    ({"padding": "same", "stride": 2}, RuntimeError, "padding='same' needs stride 1, got stride=(2, 2)"),
    (
        {"activation": "relu", "input": X.cfloat(), "weight": W.cfloat(), "bias": B.cfloat()},
        RuntimeError,
        "activation='relu' is not defined on complex numbers, got torch.complex64",
    ),
    (
        {"activation": "gelu"},
        ValueError,
        "activation must be None or one of 'relu', 'relu6', 'silu', 'hardswish', got 'gelu'",
    ),
]


# What depends on the kind, in calls of the others. Only the shapes of the tensors count.
V, WV = torch.randn(1, 4, 5, 5, 5), torch.randn(6, 2, 3, 3, 3)
REFUSED_ELSEWHERE = [
    (CONV1D, {"input": V[0, 0, 0, 0]}, RuntimeError, "input must be (N, C, L) or (C, L), got (5,)"),
    (
        CONV1D,
        {"weight": W},
        RuntimeError,
        "weight must be (out_channels, in_channels / groups, S), got (6, 2",
    ),
    (
        CONV1D,
        {"stride": 1.5},
        TypeError,
        "stride must be an int or a tuple of one int, got 1.5 of type float",
    ),
    (CONV1D, {"padding": (1, 1)}, RuntimeError, "padding must be one number, got 2: (1, 1)"),
    (CONV1D, {"dilation": 0}, RuntimeError, "dilation must be at least 1, got 0"),
    (CONV1D, {"dilation": 3}, RuntimeError, "larger than the input: 3 with dilation 3 on 5"),
    (CONV1D, {"padding": "same", "stride": 2}, RuntimeError, "padding='same' needs stride 1, got stride=2"),
    (CONV1D, {"padding": "full"}, ValueError, "padding must be numbers, 'same' or 'valid', got 'full'"),
    (
        CONV1D,
        {"groups": 1},
        RuntimeError,
        "2 input channels a group, 2 with groups=1, but input (1, 4, 5) has",
    ),
    (CONV1D, {"bias": torch.ones(7)}, RuntimeError, "each of the 6 output channels, got (7,)"),
    (CONV3D, {"input": V[0, 0]}, RuntimeError, "(N, C, D, H, W) or (C, D, H, W), got (5, 5, 5)"),
    (
        CONV3D,
        {"weight": W},
        RuntimeError,
        "weight must be (out_channels, in_channels / groups, T, R, S), got",
    ),
    (CONV3D, {"stride": 1.5}, TypeError, "stride must be an int or three ints, got 1.5 of type float"),
    (CONV3D, {"padding": (1, 1)}, RuntimeError, "padding must be one number or three, got 2: (1, 1)"),
    (CONV3D, {"stride": (1, 1, 0)}, RuntimeError, "stride must be at least 1, got (1, 1, 0)"),
    (CONV3D, {"dilation": (3, 1, 1)}, RuntimeError, "3 x 3 x 3 with dilation (3, 1, 1) on 5 x 5 x 5 with"),
    (CONV3D, {"padding": "same", "stride": (2, 1, 1)}, RuntimeError, "stride 1, got stride=(2, 1, 1)"),
    (CONV3D, {"input": V[:, :, :0]}, RuntimeError, "only the batch may be empty, got input (1, 4, 0, 5, 5)"),
    (CONV3D, {"weight": WV[:5]}, RuntimeError, "out_channels=5 is not divisible by groups=2"),
    (CONV_TRANSPOSE1D, {"input": X}, RuntimeError, "input must be (N, C, L) or (C, L), got (1, 4, 5, 5)"),
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
        "the output would be empty: -1 from 5 with padding 4 and",
    ),
    (
        CONV_TRANSPOSE2D,
        {"input": X[0, 0]},
        RuntimeError,
        "input must be (N, C, H, W) or (C, H, W), got (5, 5)",
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
        "weight (6, 2, 3, 3) takes 6 with groups=2, but input (1, 4, 5",
    ),
    (
        CONV_TRANSPOSE2D,
        {"groups": 3},
        RuntimeError,
        "in_channels=4 is not divisible by groups=3; weight (4, 3, 3",
    ),
    (CONV_TRANSPOSE2D, {"groups": 0}, RuntimeError, "groups must be at least 1, got 0"),
    (CONV_TRANSPOSE2D, {"groups": 1}, RuntimeError, "each of the 3 output channels, got (6,)"),
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
        "output_padding must be one number or two, got 3",
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
        "empty: -1 x 7 from 5 x 5 with padding (4, 0) and output",
    ),
    (
        CONV_TRANSPOSE2D,
        {"input": X[..., :0]},
        RuntimeError,
        "only the batch may be empty, got input (1, 4, 5, 0)",
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
    """``True == 1.0 == 1``, so an answer that is kept for one must not count for the others."""
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
    """Such tensors look like others, but their sizes cannot be looked up."""
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [np.int64(2), torch.tensor(2)], ids=repr)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_groups_are_taken_in_every_form_that_pytorch_takes(kind: Kind, groups: object, backend: str) -> None:
    call = right(kind) | {"groups": groups}
    torch.testing.assert_close(FUNCTIONS[kind](**call, backend=backend), kind.pytorch(**call))


class Listed(Sequence):
    """A list that is none, as OmegaConf's ListConfig is."""

    def __init__(self, *items: object) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> object:
        return self.items[index]

    def __repr__(self) -> str:
        return repr(list(self.items))


# Makers from the number of dimensions, since an iterator can be taken apart once only. 2 in every place is a
# call that fits.
Maker = Callable[[int], Any]
NUMBERS: dict[str, Maker] = {
    "an int": lambda dims: 2,
    "NumPy's int": lambda dims: np.int32(2),
    "NumPy's number of no dimension": lambda dims: np.array(2),
    "a tensor of no dimension": lambda dims: torch.tensor(2),
    "a tuple": lambda dims: (2,) * dims,
    "a list": lambda dims: [2] * dims,
    "a list of one": lambda dims: [2],
    "torch.Size": lambda dims: torch.Size((2,) * dims),
    "NumPy's ints in a tuple": lambda dims: (np.int64(2), np.int8(2), np.int16(2))[:dims],
    "a tensor of one number": lambda dims: torch.tensor([2]),
    "tensors in a tuple": lambda dims: (torch.tensor(2),) * dims,
}
ITERABLES: dict[str, Maker] = {
    "a list-like": lambda dims: Listed(*[2] * dims),
    "a NumPy array": lambda dims: np.array([2] * dims),
    "a NumPy array of one": lambda dims: np.array([2]),
    "a tensor": lambda dims: torch.tensor([2] * dims),
    "a generator": lambda dims: (2 for _ in range(dims)),
    "a range": lambda dims: range(2, 3),
    "a map": lambda dims: map(int, "2" * dims),
    "keys": lambda dims: {2: "vertical"}.keys(),
}
SETTINGS = [
    pytest.param(kind, name, id=f"{kind}, {name}")
    for kind in KINDS
    for name in ("stride", "padding", "dilation", *["output_padding"] * kind.transposed)
]


def with_setting(kind: Kind, name: str, value: Any) -> dict[str, Any]:
    """Return the call that is right with one setting; an output padding of 2 needs a stride beyond it."""
    return right(kind) | ({"stride": 3} if name == "output_padding" else {}) | {name: value}


@pytest.mark.parametrize("make", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize(("kind", "name"), SETTINGS)
def test_numbers_are_taken_in_every_form_that_pytorch_takes(kind: Kind, name: str, make: Maker) -> None:
    call = with_setting(kind, name, 2)
    ours = FUNCTIONS[kind](**call | {name: make(kind.dims)})
    torch.testing.assert_close(ours, kind.pytorch(**call))


@pytest.mark.parametrize(("kind", "name"), SETTINGS)
@pytest.mark.parametrize("make", ITERABLES.values(), ids=ITERABLES)
def test_what_pytorch_does_not_take_apart_is_refused(kind: Kind, name: str, make: Maker) -> None:
    for convolve in (kind.pytorch, FUNCTIONS[kind]):
        value = make(kind.dims)
        if isinstance(value, torch.Tensor) and len(value) == 1:
            return  # a number
        with pytest.raises(TypeError):
            convolve(**with_setting(kind, name, value))


@pytest.mark.parametrize("make", (NUMBERS | ITERABLES).values(), ids=NUMBERS | ITERABLES)
@pytest.mark.parametrize("name", ["kernel_size", "stride", "padding", "dilation", "output_padding"])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_layers_take_numbers_in_every_form_that_pytorchs_take(
    layer: type[nn.Module], name: str, make: Maker
) -> None:
    """As plain ints, whatever they came in."""
    kind = layer._gconv_kind
    if name == "output_padding" and not kind.transposed:
        return
    options = {"kernel_size": 3, "groups": 2, "stride": 3 if name == "output_padding" else 1}
    ours = layer(4, 4, **options | {name: make(kind.dims)})
    theirs = kind.layer(4, 4, **options | {name: 2})
    theirs.load_state_dict(ours.state_dict())
    assert repr(ours) == f"Group{theirs!r}"
    assert {type(number) for number in getattr(ours, name)} == {int}
    x = right(kind)["input"]
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["in_channels", "out_channels", "groups"])
@pytest.mark.parametrize("make", [np.int16, np.array, torch.tensor])
def test_the_module_takes_channels_and_groups_in_every_form(name: str, make: Callable[[int], Any]) -> None:
    numbers = {"in_channels": 4, "out_channels": 4, "groups": 2}
    layer = gconv.GroupConv2d(**numbers | {name: make(numbers[name])}, kernel_size=3)
    assert repr(layer) == repr(gconv.GroupConv2d(4, 4, 3, groups=2)) and type(getattr(layer, name)) is int


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"kernel_size": Listed(3, "a")},
            "kernel_size must be an int or a pair of ints, got [3, 'a'] of type L",
        ),
        ({"kernel_size": (n / 2 for n in (6, 6))}, "got (3.0, 3.0) of type tuple"),
        ({"kernel_size": None}, "kernel_size must be an int or a pair of ints, got None of type NoneType"),
        ({"stride": np.array([1.0, 2.0])}, "got array([1., 2.]) of type ndarray"),
        (
            {"stride": np.float32(1)},
            "stride must be an int or a pair of ints, got np.float32(1.0) of type flo",
        ),
        ({"dilation": "2"}, "dilation must be an int or a pair of ints, got '2' of type str"),
        ({"groups": 2.0}, "groups must be an int, got 2.0 of type float"),
        ({"groups": "2"}, "groups must be an int, got '2' of type str"),
        ({"in_channels": (4,)}, "in_channels must be an int, got (4,) of type tuple"),
        ({"out_channels": None}, "out_channels must be an int, got None of type NoneType"),
        ({"out_channels": True}, "out_channels must be an int, got True of type bool"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_numbers_that_are_none_are_refused_by_type_and_value(change: dict, message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        gconv.GroupConv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, **change})


@pytest.mark.parametrize("layer", LAYERS)
def test_too_many_numbers_are_refused_in_every_form(layer: type[nn.Module]) -> None:
    rule = {1: "one number", 2: "one number or two", 3: "one number or three"}[layer._gconv_kind.dims]
    wrong = [2] * (layer._gconv_kind.dims + 1)
    names = (
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        *["output_padding"] * layer._gconv_kind.transposed,
    )
    for make in (tuple, list, iter, np.array, torch.tensor, lambda numbers: Listed(*numbers)):
        for name in names:
            message = f"{name} must be {rule}, got {len(wrong)}: .*2{'.*2' * layer._gconv_kind.dims}"
            with pytest.raises(RuntimeError, match=message):
                layer(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, name: make(wrong)})


@pytest.fixture(scope="module")
def pytorchs() -> dict[str, Any]:
    """What PyTorch tests its convolutions with; its catalogue of all operators takes seconds to import."""
    from torch.testing._internal.common_methods_invocations import op_db

    return {op.name.removeprefix("nn.functional."): op for op in op_db if "functional.conv" in op.name}


Convolve = Callable[..., torch.Tensor]


def call_sample(convolve: Convolve, sample: Any, **options: str) -> torch.Tensor:
    """Call a convolution with the arguments of a sample."""
    return convolve(sample.input, *sample.args, **sample.kwargs, **options)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_pytorchs_own_samples(pytorchs: dict, kind: Kind, backend: str, dtype: torch.dtype) -> None:
    samples = list(pytorchs[kind.name].sample_inputs("cpu", dtype, requires_grad=True))
    assert len(samples) >= 10
    for sample in samples:
        ours = call_sample(FUNCTIONS[kind], sample, backend=backend)
        theirs = call_sample(kind.pytorch, sample)
        torch.testing.assert_close(ours, theirs)
        tensors = [t for t in (sample.input, *sample.args) if isinstance(t, torch.Tensor)]
        grad = torch.randn_like(theirs)
        grads = [torch.autograd.grad(y, tensors, grad) for y in (ours, theirs)]
        torch.testing.assert_close(*grads)


# The interpreter takes seconds for images, half a minute for volumes.
IN_FLOAT32 = [
    pytest.param(
        *(kind, backend),
        id=f"{kind}-{backend}",
        marks=[interpreted, *[pytest.mark.long] * (kind.dims > 1)] if backend == "triton" else [],
    )
    for kind in KINDS
    for backend in (*BACKENDS, "triton")
]


@pytest.mark.usefixtures("boolean_masks", "nothing_is_zero_by_chance")
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize(("kind", "backend"), IN_FLOAT32)
def test_pytorchs_own_samples_in_float32(pytorchs: dict, kind: Kind, backend: str) -> None:
    for sample in pytorchs[kind.name].sample_inputs("cpu", torch.float32):
        x, w, b = sample.input, *sample.args
        # They are evenly spread from -9 to 9, the bounds are for a deviation of 1.
        tensors = tuple(None if t is None else t / 5.2 for t in (x, w, b))
        case = Case("", tuple(x.shape), tuple(w.shape), sample.kwargs, b is not None, kind)
        check(case, backend, torch.float32, tensors=tensors)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_integers(pytorchs: dict, kind: Kind, backend: str) -> None:
    for sample in pytorchs[kind.name].sample_inputs("cpu", torch.int64):
        ours = call_sample(FUNCTIONS[kind], sample, backend=backend)
        assert torch.equal(ours, call_sample(kind.pytorch, sample))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [CONV1D, CONV2D, CONV3D], ids=str)
def test_pytorchs_own_error_samples_raise_the_same_type(pytorchs: dict, kind: Kind, backend: str) -> None:
    errors = list(pytorchs[kind.name].error_inputs("cpu"))
    assert len(errors) > 8
    for error in errors:
        with pytest.raises(error.error_type):
            call_sample(kind.pytorch, error.sample_input)
        with pytest.raises(error.error_type):
            call_sample(FUNCTIONS[kind], error.sample_input, backend=backend)


# PyTorch has no such samples for transposed convolutions.
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
        (gconv.GroupConv3d, {"kernel_size": (3, 3)}, RuntimeError, "kernel_size must be one number or three"),
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
