"""What is refused: the same on every backend, before anything runs, with the numbers in the message."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gconv
from gconv import functional

BACKENDS = ("aten", "reference")
X, W, B = torch.randn(1, 4, 5, 5), torch.randn(6, 2, 3, 3), torch.randn(6)

# What is changed in a call that is right: group_conv2d(X, W, B, groups=2).
RIGHT = {"input": X, "weight": W, "bias": B, "groups": 2}
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
    ({"dilation": 3}, RuntimeError, "larger than the image: 3 x 3 with dilation (3, 3) on 5 x 5"),
    ({"input": X[:, :, :0]}, RuntimeError, "only the batch may be empty, got input (1, 4, 0, 5)"),
    ({"weight": W[:0]}, RuntimeError, "only the batch may be empty, got input (1, 4, 5, 5) and weight (0, 2"),
    ({"weight": W[..., :0]}, RuntimeError, "and weight (6, 2, 3, 0)"),
    ({"weight": W.double()}, RuntimeError, "one dtype, got torch.float32, torch.float64, torch.float32"),
    ({"bias": B.half()}, RuntimeError, "one dtype, got torch.float32, torch.float32, torch.float16"),
    (dict.fromkeys(("input", "weight", "bias"), X.bool()), RuntimeError, "dense numbers, got torch.bool"),
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("change", "error", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_bad_arguments_raise_with_the_numbers(
    change: dict, error: type[Exception], message: str, backend: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        gconv.group_conv2d(**(RIGHT | change), backend=backend)


EQUAL = [(1, True), (1, 1.0), ((1, 1), (1, True)), ((1, 1), (1.0, 1))]


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [*((name, *pair) for name in ("stride", "padding", "dilation") for pair in EQUAL), ("groups", 2, 2.0)],
)
def test_what_equals_a_checked_number_is_checked_itself(name: str, right: Any, wrong: Any) -> None:
    """``True == 1.0 == 1``, so an answer that is kept for one must not count for the others."""
    gconv.group_conv2d(**(RIGHT | {name: right}))
    with pytest.raises(TypeError, match=f"{name} must be"):
        gconv.group_conv2d(**(RIGHT | {name: wrong}))


def test_checked_sizes_are_kept_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "_checked", {})
    monkeypatch.setattr(functional, "CHECKED", 2)
    for batch in (1, 2, 3, 1):
        gconv.group_conv2d(X.expand(batch, -1, -1, -1), W, groups=2)
    assert [geometry.input_size[0] for geometry in functional._checked.values()] == [1, 2]


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.functionalize], ids=["vmap", "functionalize"])
def test_symbolic_sizes_beneath_a_transform_are_traced(transform: Callable) -> None:
    """Such tensors look like others, but their sizes cannot be looked up."""
    convolve = transform(lambda x, w: gconv.group_conv2d(x, w, groups=2))
    operands = (X[None], W[None]) if transform is torch.vmap else (X, W)
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
def test_groups_are_taken_in_every_form_that_conv2d_takes(groups: object, backend: str) -> None:
    ours = gconv.group_conv2d(X, W, B, groups=groups, backend=backend)
    torch.testing.assert_close(ours, F.conv2d(X, W, B, groups=groups))


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


# Makers, since an iterator can be taken apart once only. 2 in every place is a call that fits.
NUMBERS: dict[str, Callable[[], Any]] = {
    "an int": lambda: 2,
    "NumPy's int": lambda: np.int32(2),
    "NumPy's number of no dimension": lambda: np.array(2),
    "a tensor of no dimension": lambda: torch.tensor(2),
    "a tuple": lambda: (2, 2),
    "a list": lambda: [2, 2],
    "a list of one": lambda: [2],
    "torch.Size": lambda: torch.Size((2, 2)),
    "NumPy's ints in a tuple": lambda: (np.int64(2), np.int8(2)),
    "tensors in a tuple": lambda: (torch.tensor(2), torch.tensor(2)),
}
ITERABLES: dict[str, Callable[[], Any]] = {
    "a list-like": lambda: Listed(2, 2),
    "a NumPy array": lambda: np.array([2, 2]),
    "a NumPy array of one": lambda: np.array([2]),
    "a tensor": lambda: torch.tensor([2, 2]),
    "a generator": lambda: (2 for _ in range(2)),
    "a range": lambda: range(2, 3),
    "a map": lambda: map(int, "22"),
    "keys": lambda: {2: "vertical"}.keys(),
}


@pytest.mark.parametrize("make", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_numbers_are_taken_in_every_form_that_conv2d_takes(name: str, make: Callable[[], Any]) -> None:
    ours = gconv.group_conv2d(X, W, B, groups=2, **{name: make()})
    torch.testing.assert_close(ours, F.conv2d(X, W, B, groups=2, **{name: 2}))


@pytest.mark.parametrize("make", ITERABLES.values(), ids=ITERABLES)
@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_what_conv2d_does_not_take_apart_is_refused(name: str, make: Callable[[], Any]) -> None:
    for convolve in (F.conv2d, gconv.group_conv2d):
        with pytest.raises(TypeError):
            convolve(X, W, B, groups=2, **{name: make()})


@pytest.mark.parametrize("make", (NUMBERS | ITERABLES).values(), ids=NUMBERS | ITERABLES)
@pytest.mark.parametrize("name", ["kernel_size", "stride", "padding", "dilation"])
def test_the_module_takes_numbers_in_every_form_that_nn_conv2d_takes(
    name: str, make: Callable[[], Any]
) -> None:
    """As plain ints, whatever they came in."""
    ours = gconv.GroupConv2d(4, 4, **{"kernel_size": 3, "groups": 2, name: make()})
    theirs = nn.Conv2d(4, 4, **{"kernel_size": 3, "groups": 2, name: 2})
    theirs.load_state_dict(ours.state_dict())
    assert repr(ours) == repr(theirs).replace("Conv2d", "GroupConv2d")
    assert {type(number) for number in getattr(ours, name)} == {int}
    torch.testing.assert_close(ours(X), theirs(X))


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


def test_three_numbers_are_refused_in_every_form() -> None:
    for make in (tuple, list, iter, np.array, torch.tensor, lambda numbers: Listed(*numbers)):
        for name in ("kernel_size", "stride", "padding", "dilation"):
            with pytest.raises(RuntimeError, match=f"{name} must be one number or two, got 3: .*2.*2.*2"):
                gconv.GroupConv2d(
                    **{"in_channels": 4, "out_channels": 4, "kernel_size": 3, name: make([2, 2, 2])}
                )


@pytest.fixture(scope="module")
def pytorchs() -> Any:
    """What PyTorch tests F.conv2d with; its catalogue of all operators takes seconds to import."""
    from torch.testing._internal.common_methods_invocations import op_db

    return next(op for op in op_db if op.name == "nn.functional.conv2d")


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_pytorchs_own_samples(pytorchs: Any, backend: str, dtype: torch.dtype) -> None:
    samples = list(pytorchs.sample_inputs("cpu", dtype, requires_grad=True))
    assert len(samples) > 20
    for sample in samples:
        ours = gconv.group_conv2d(sample.input, *sample.args, **sample.kwargs, backend=backend)
        theirs = F.conv2d(sample.input, *sample.args, **sample.kwargs)
        torch.testing.assert_close(ours, theirs)
        tensors = [t for t in (sample.input, *sample.args) if isinstance(t, torch.Tensor)]
        grad = torch.randn_like(theirs)
        torch.testing.assert_close(
            torch.autograd.grad(ours, tensors, grad), torch.autograd.grad(theirs, tensors, grad)
        )


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_integers(pytorchs: Any, backend: str) -> None:
    for sample in pytorchs.sample_inputs("cpu", torch.int64):
        ours = gconv.group_conv2d(sample.input, *sample.args, **sample.kwargs, backend=backend)
        assert torch.equal(ours, F.conv2d(sample.input, *sample.args, **sample.kwargs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_pytorchs_own_error_samples_raise_the_same_type(pytorchs: Any, backend: str) -> None:
    errors = list(pytorchs.error_inputs("cpu"))
    assert len(errors) > 8
    for error in errors:
        sample = error.sample_input
        with pytest.raises(error.error_type):
            F.conv2d(sample.input, *sample.args, **sample.kwargs)
        with pytest.raises(error.error_type):
            gconv.group_conv2d(sample.input, *sample.args, **sample.kwargs, backend=backend)


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
def test_bad_module_arguments_raise_when_it_is_made(
    change: dict, error: type[Exception], message: str
) -> None:
    arguments = {"in_channels": 4, "out_channels": 4, "kernel_size": 3, **change}
    with pytest.raises(error, match=re.escape(message)):
        gconv.GroupConv2d(**arguments)


def test_module_refuses_an_input_of_other_channels() -> None:
    with pytest.raises(RuntimeError, match=r"input \(1, 6, 5, 5\) has 6"):
        gconv.GroupConv2d(4, 4, 3, groups=2)(torch.randn(1, 6, 5, 5))
    assert isinstance(gconv.GroupConv2d(4, 4, 3, groups=2), nn.Conv2d)
