"""Numbers are accepted in every form that PyTorch accepts, and rejected in every other."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from calls import BACKENDS, right
from oracle import FUNCTIONS
from torch import nn

import gconv
from gconv.kinds import KINDS, Kind
from gconv.module import LAYERS


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [np.int64(2), torch.tensor(2)], ids=repr)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_groups_are_taken_in_every_form_that_pytorch_takes(kind: Kind, groups: object, backend: str) -> None:
    call = right(kind) | {"groups": groups}
    torch.testing.assert_close(FUNCTIONS[kind](**call, backend=backend), kind.pytorch(**call))


class Listed(Sequence):
    """A list-like class that is not a list, as OmegaConf's ListConfig is."""

    def __init__(self, *items: object) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> object:
        return self.items[index]

    def __repr__(self) -> str:
        return repr(list(self.items))


# Functions of the number of dimensions, because an iterator can be used only once. Every setting can be 2.
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
    """Return a valid call with one setting changed; an output padding of 2 needs a larger stride."""
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
    """And store them as plain ints."""
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
    rule = {1: "one number", 2: "one or two numbers", 3: "one or three numbers"}[layer._gconv_kind.dims]
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
