"""The passes as PyTorch operators, ``torch.ops.gconv.forward``, ``input_grad`` and so on, defined by a table.

An operator is a single node of a compiled or exported graph. Each has a fake kernel (sizes and strides
without data) and a formula for PyTorch's FLOP counter; ``gconv.autograd`` registers their gradients. If
"aten" runs every pass, gconv's functions call PyTorch's directly and don't use the operators.

Arguments have the order of ``gconv.group_conv2d``. Here and in ``gconv.backends`` a
``ConvGeometry`` contains the sizes and settings; the operators have an argument for
each, with ``padding`` as (top, bottom, left, right).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gconv import dispatch
from gconv.batch_norm import wide_dtype
from gconv.geometry import ConvGeometry
from gconv.kinds import is_channels_last
from gconv.namespace import NAMESPACE, registered
from gconv.torch_internals import (
    below_autograd,
    dispatch_keys,
    dispatch_modes,
    profiler_enabled,
    transforms_active,
    without_autocast,
)

SETTINGS = "int[2] stride, SymInt[4] padding, int[2] dilation, SymInt groups"
# define and impl, because they take a quarter of the host time per call that custom_op does.
library = torch.library.Library(NAMESPACE, "DEF")


@dataclass(eq=False)
class Operator:
    """One pass as an operator. Call it with its tensors, a geometry, its options and the name of a backend.

    Args:
        name: name of the operator and of the function in ``gconv.backends.Backend``.
        tensors: the tensor arguments, as in the schema.
        input, weight: indices of the tensors with the sizes of x and w; None if the size is an argument.
        operand: index of the tensor whose device, dtype and layout decide the backend.
        like: indices of the two tensors that decide the layout of the result.
        result: name of the geometry's size that the result has.
        options: the arguments after the settings, as in the schema. Defaults to none.
        second: the second result: "" for none, "bias" for dbias (K,), or the name of a size of the geometry,
            for two numbers per channel, (2, channels). Defaults to "".
    """

    name: str
    tensors: tuple[str, ...]
    input: int | None
    weight: int | None
    operand: int
    like: tuple[int, int]
    result: str
    options: tuple[str, ...] = ()
    second: str = ""
    pass_: str = field(init=False)  # the pass whose backend is chosen
    sizes: tuple[str, ...] = field(init=False)  # size arguments, which follow the tensors in the schema
    count: int = field(init=False)  # number of tensors at the start
    last: int | None = field(init=False)  # index of a tensor among the options, from the end

    def __post_init__(self) -> None:
        self.pass_ = self.name.removeprefix("norm_")
        places = {"input_size": self.input, "weight_size": self.weight}
        self.sizes = tuple(name for name, place in places.items() if place is None)
        self.count = len(self.tensors)
        self.last = -2 if self.options and self.options[-1].startswith("Tensor") else None

    @property
    def schema(self) -> str:
        """The schema for ``torch.library``."""
        sizes = (f"SymInt[4] {name}" for name in self.sizes)
        arguments = ", ".join((*self.tensors, *sizes, SETTINGS, *self.options, "str backend"))
        return f"{self.name}({arguments}) -> {'(Tensor, Tensor)' if self.second else 'Tensor'}"

    def __call__(self, *arguments: Any) -> Any:
        """Run the pass; as an operator only if a mode, a transform or the profiler observes operators.

        An operator written in Python costs the host 25 us per call. All tensors of all passes are checked
        here, so that no lazily conjugated, batched or wrapped tensor reaches a kernel.
        """
        tensors = arguments[: self.count]
        watched = tensors if self.last is None else (*tensors, arguments[self.last])
        if ordinary(*watched) and not profiler_enabled():
            with below_autograd():
                return self.run(*arguments)
        geometry, options = arguments[self.count], arguments[self.count + 1 :]
        sizes = [getattr(geometry, name) for name in self.sizes]
        return getattr(registered, self.name)(*tensors, *sizes, *geometry.settings, *options)

    def run(self, *arguments: Any) -> Any:
        """Run the pass on the backend chosen for it; the result has the layout that ``F.conv2d`` returns."""
        geometry, backend = arguments[self.count], arguments[-1]
        module = dispatch.backend_for(self.pass_, backend, arguments[self.operand], geometry)
        with without_autocast():  # the operands are cast already; autocast would narrow float32 sums
            results = getattr(module, self.name)(*arguments[:-1])
        result, second = results if self.second else (results, None)
        result = _arrange(result, _layout(arguments[self.like[0]], arguments[self.like[1]]))
        if not self.second:
            return result
        return result, result.new_empty(0) if second is None else second  # operators can't return None

    def fake(self, *arguments: Any) -> Any:
        """Return empty tensors with the sizes, strides and dtypes of the results of ``run``."""
        geometry, like = arguments[self.count], arguments[self.like[0]]
        layout = _layout(like, arguments[self.like[1]])
        size = getattr(geometry, self.result)
        result = torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)
        if not self.second:
            return result
        if self.second == "bias":
            with_bias = arguments[self.count + 1]
            return result, like.new_empty(size[0] if with_bias else 0)
        sums = torch.empty(
            2, getattr(geometry, self.second)[1], dtype=wide_dtype(like.dtype), device=like.device
        )
        return result, sums

    def flops(self, *arguments: Any, out_shape: Any = None) -> int:
        """Return the FLOPs of a call, from the operator's arguments with shapes instead of tensors."""
        return self.unpack(arguments, shape_of=lambda shape: shape)[self.count].flops

    def unpack(
        self, arguments: Sequence[Any], shape_of: Callable[[Any], Any] = lambda tensor: tensor.shape
    ) -> list[Any]:
        """Turn the operator's arguments into those of ``run``, with a geometry for sizes and settings.

        Args:
            arguments: all arguments, by position.
            shape_of: returns the shape of a tensor argument. Defaults to its ``shape``.
        """
        after = self.count + len(self.sizes)
        tensors, sizes, rest = arguments[: self.count], list(arguments[self.count : after]), arguments[after:]
        input_size = sizes.pop(0) if self.input is None else shape_of(tensors[self.input])
        weight_size = sizes.pop(0) if self.weight is None else shape_of(tensors[self.weight])
        return [*tensors, ConvGeometry.of(input_size, weight_size, *rest[:4]), *rest[4:]]

    def register(self) -> None:
        """Define the operator with its kernel, fake kernel and FLOP formula."""
        library.define(self.schema)
        library.impl(self.name, lambda *a: self.run(*self.unpack(a)), "CompositeExplicitAutograd")
        torch.library.register_fake(
            f"{NAMESPACE}::{self.name}", lambda *a: self.fake(*self.unpack(a)), lib=library
        )
        register_flop_formula(getattr(registered, self.name))(self.flops)

    def on_aten(self, *arguments: Any) -> Any:
        """Run the operator on PyTorch's own convolution, ignoring its backend argument."""
        return self.run(*self.unpack(arguments)[:-1], "aten")


def ordinary(*tensors: Any) -> bool:
    """Whether a kernel can read the data of the tensors: no tracer, mode, transform or subclass is involved.

    Args:
        tensors: a tensor, followed by tensors or None.
    """
    if torch.compiler.is_compiling() or dispatch_modes() or transforms_active():
        return False
    keys = _ordinary_keys(tensors[0].device)
    for tensor in tensors:  # all() of a generator is half a microsecond slower
        if tensor is not None and not (type(tensor) in _PLAIN and dispatch_keys(tensor) in keys):
            return False
    return True


_PLAIN = (Tensor, torch.nn.Parameter)


@cache
def _ordinary_keys(device: torch.device) -> frozenset[int]:
    """Return the dispatch keys of plain tensors: not batched, lazily conjugated, wrapped and so on."""
    found = set()
    for inference in () if device.type == "meta" else (False, True):
        with torch.inference_mode(inference):
            found.add(dispatch_keys(torch.empty(0, device=device)))
    return frozenset(found)


def _layout(first: Tensor, second: Tensor) -> torch.memory_format:
    """Return the layout of a result, with the rule of ``F.conv2d``: channels_last if either tensor is."""
    either = is_channels_last(first) or is_channels_last(second)
    return torch.channels_last if either else torch.contiguous_format


def _arrange(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    """Return ``tensor`` in ``layout``, with exactly its strides, even along axes of length 1."""
    whole = tensor.contiguous(memory_format=layout)
    # An operator's result must not be a view into another tensor: that of the fake kernel has offset 0.
    tensor = whole.clone(memory_format=layout) if whole.storage_offset() else whole
    _, c, h, w = tensor.shape
    strides = (c * h * w, 1, w * c, c) if layout == torch.channels_last else (c * h * w, h * w, w, 1)
    return tensor if tensor.stride() == strides else tensor.as_strided(tensor.shape, strides)


X, W, B, DY, NORM = "Tensor input", "Tensor weight", "Tensor? bias", "Tensor grad_output", "Tensor norm"
forward = Operator(
    "forward",
    (X, W, B),
    input=0,
    weight=1,
    operand=0,
    like=(0, 1),
    result="output_size",
    options=("str? activation", "Tensor? residual"),
)
input_grad = Operator(  # has a bias for transposed convolutions
    "input_grad",
    (DY, W, B),
    input=None,
    weight=1,
    operand=0,
    like=(0, 1),
    result="input_size",
    options=("str? activation", "Tensor? residual"),
)
weight_grad = Operator(
    "weight_grad",
    (DY, X),
    input=1,
    weight=None,
    operand=1,
    like=(0, 1),
    result="weight_size",
    options=("bool with_bias",),
    second="bias",
)
norm_forward = Operator(
    "norm_forward",
    (X, NORM, W, B),
    input=0,
    weight=2,
    operand=0,
    like=(0, 2),
    result="output_size",
    second="output_size",
)
norm_input_grad = Operator(
    "norm_input_grad",
    (DY, W, X, NORM),
    input=2,
    weight=1,
    operand=0,
    like=(0, 1),
    result="input_size",
    second="input_size",
)
norm_weight_grad = Operator(
    "norm_weight_grad",
    (DY, X, NORM),
    input=1,
    weight=None,
    operand=1,
    like=(0, 1),
    result="weight_size",
    options=("bool with_bias",),
    second="bias",
)
OPERATORS = (forward, input_grad, weight_grad, norm_forward, norm_input_grad, norm_weight_grad)
for _operator in OPERATORS:
    _operator.register()


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """Return decompositions of gconv's operators into PyTorch's, for ``ExportedProgram.run_decompositions``.

    A program exported on a GPU can contain gconv's operators, so a script that loads it must import gconv.
    After the decomposition it runs without gconv and can be exported to ONNX.

    Returns:
        A function in PyTorch's operators for each operator of gconv.

    Examples:
        >>> layer = gconv.GroupConv2d(8, 8, 3, groups=4)
        >>> program = torch.export.export(layer, (torch.randn(1, 8, 5, 5),))
        >>> portable = program.run_decompositions(gconv.decompositions())
    """
    return {getattr(registered, operator.name).default: operator.on_aten for operator in OPERATORS}
