"""``gconv.fuse`` keeps the names, order and defaults of a network's inputs, or explains why it can't."""

from __future__ import annotations

import copy
import enum
import inspect
import io
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fusing import Branch, assert_same, trained
from torch import Tensor, nn

import gconv


class Mode(enum.Enum):
    PLAIN = 1
    FLIPPED = 2


class FlagAfterInputs(Branch):
    def forward(self, *inputs: Tensor, flip: bool = False) -> Tensor:
        y = super().forward(inputs[0]) - inputs[-1]
        return y.flip(-1) if flip else y


class Everything(Branch):
    def forward(
        self, x: Tensor, /, *more: Tensor, flip: bool = False, scale: Tensor, **rest: Tensor
    ) -> Tensor:
        y = super().forward(x) + more[0] * scale - rest["shift"] + rest.get("other", 0)
        return y.flip(-1) if flip else y


class KeywordOnly(Branch):
    def forward(self, x: Tensor, *, scale: Tensor, flip: bool = False) -> Tensor:
        y = super().forward(x) * scale
        return y.flip(-1) if flip else y


class PositionalOnly(Branch):
    def forward(self, x: Tensor, scale: Tensor, /, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x) * scale
        return y if mask is None else y * mask


class Keywords(Branch):
    def forward(self, **inputs: Tensor) -> Tensor:
        return super().forward(inputs["x"]) * inputs["scale"]


class Defaults(Branch):
    def forward(
        self,
        x: Tensor,
        mode: Mode = Mode.PLAIN,
        power: float = math.inf,
        form: torch.memory_format = torch.channels_last,
        dtype: torch.dtype = torch.float64,
        sizes: tuple[int, ...] = (2, 3),
        name: str = "?",
    ) -> Tensor:
        y = super().forward(x) * sizes[1]
        if mode is Mode.FLIPPED or form is not torch.channels_last or name != "?":
            y = y.flip(-1)
        return y.clamp(max=power) if dtype is torch.float64 else y.float()


class Nested(Branch):
    """A module that calls others in all these ways; one of them has a hook and isn't traced."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.whole = (
            FlagAfterInputs(),
            Everything(),
            Keywords(),
            Everything(),
        )
        self.whole.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        y = self.first(x, super().forward(x), flip=True)
        y = self.second(y, x, x, scale=scale, shift=y, other=x)
        y = self.whole(y, x, scale=scale, flip=True, shift=y)
        return self.third(scale=scale, x=y)


X, Z = torch.randn(2, 2, 8, 4, 3, dtype=torch.float64)
SCALE = torch.tensor(2.0, dtype=torch.float64)
CALLS: list[tuple[type[nn.Module], tuple, dict[str, Any]]] = [
    (FlagAfterInputs, (X,), {}),
    (FlagAfterInputs, (X, Z), {"flip": False}),
    (Everything, (X, Z), {"scale": SCALE, "shift": X}),
    (Everything, (X, Z, X), {"other": Z, "shift": X, "scale": SCALE, "flip": False}),
    (KeywordOnly, (X,), {"scale": SCALE}),
    (KeywordOnly, (), {"flip": False, "scale": SCALE, "x": X}),
    (PositionalOnly, (X, SCALE), {}),
    (PositionalOnly, (X, SCALE, None), {}),
    (PositionalOnly, (X, SCALE), {"mask": None}),
    (Keywords, (), {"scale": SCALE, "x": X}),
    (Defaults, (X,), {}),
    (Defaults, (X, Mode.PLAIN), {"sizes": (4, 5), "name": "?"}),
    (Nested, (X,), {"scale": SCALE}),
]


def copies(fused: nn.Module) -> Iterator[nn.Module]:
    """Yield ``fused``, its copy, the same saved and loaded, and fused again."""
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    yield from (fused, copy.deepcopy(fused), torch.load(file, weights_only=False), gconv.fuse(fused)[0])


@pytest.mark.parametrize(("cls", "arguments", "options"), CALLS)
def test_a_fused_network_is_called_as_the_model_is(
    cls: type[nn.Module], arguments: tuple, options: dict[str, Any]
) -> None:
    model = trained(cls())
    fused, report = gconv.fuse(model)
    assert report.folded
    names = list(inspect.signature(model.forward).parameters)
    with torch.no_grad():
        expected = model(*arguments, **options)
        # Nested has a hook, a lambda that can't be saved.
        for network in (fused,) if cls is Nested else copies(fused):
            assert list(inspect.signature(network.forward).parameters) == names
            torch.testing.assert_close(network(*arguments, **options), expected)


@pytest.mark.parametrize(
    ("cls", "option"),
    [
        (FlagAfterInputs, {"flip": True}),
        (PositionalOnly, {"mask": SCALE}),
        (Defaults, {"mode": Mode.FLIPPED}),
        (Defaults, {"dtype": torch.float32}),
        (Defaults, {"form": torch.contiguous_format}),
        (Defaults, {"name": "!"}),
        (Defaults, {"power": 1.0}),
    ],
)
def test_another_value_than_the_default_is_refused(cls: type[nn.Module], option: dict[str, Any]) -> None:
    fused, _ = gconv.fuse(trained(cls()))
    with pytest.raises(
        AssertionError, match=f"{next(iter(option))} must be .*, the default with which the network was fused"
    ):
        fused(X, *[SCALE] * (cls is PositionalOnly), **option)


class RequiredAfterDefault(Branch):
    def forward(self, x: Tensor | None = None, *, y: Tensor) -> Tensor:
        return super().forward(y)


class TensorAsDefault(Branch):
    def forward(self, x: Tensor, scale: Tensor = SCALE) -> Tensor:
        return super().forward(x) * scale


class FunctionAsDefault(Branch):
    def forward(self, x: Tensor, act: Any = torch.relu) -> Tensor:
        return act(super().forward(x))


class Unpacks(Branch):
    def forward(self, *inputs: Tensor, **options: Tensor) -> Tensor:
        return sum(super(Unpacks, self).forward(x) for x in inputs)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (
            RequiredAfterDefault,
            r"can't reproduce the signature of the model, forward\(x: .*: non-default argument",
        ),
        (TensorAsDefault, "the default of argument 'scale' is a tensor"),
        (FunctionAsDefault, "the model can't be traced: NotImplementedError"),
        (Unpacks, "the model can't be traced: TraceError"),
    ],
)
def test_a_signature_that_cannot_be_kept_is_refused_with_the_reason(
    cls: type[nn.Module], reason: str
) -> None:
    with pytest.raises(RuntimeError, match=reason):
        gconv.fuse(trained(cls()))


def test_an_example_shows_a_network_that_fails() -> None:
    class Failing(Branch):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y[99] if isinstance(x, torch.fx.Proxy) else y

    class PutsOutASize(Branch):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return y.dim() if isinstance(x, torch.fx.Proxy) else y

    with pytest.raises(
        RuntimeError, match=r"fails on the example, because the model takes another path than .*: IndexError"
    ):
        gconv.fuse(trained(Failing()), X)
    with pytest.raises(RuntimeError, match="on the example the fused network has an error of inf"):
        gconv.fuse(trained(PutsOutASize()), X)
    assert_same(trained(FlagAfterInputs()), gconv.fuse(trained(FlagAfterInputs()), X)[0], X)
