"""Tensors that aren't plain arrays in memory, for every argument of every function."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from marks import interpreted
from oracle import FUNCTIONS
from sandwiches import one_by_one, sandwich
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_leaves, tree_map_only

import gconv
from gconv import ops
from gconv.geometry import ConvGeometry, Padding
from gconv.kinds import CONV1D, CONV2D, CONV3D, CONV_TRANSPOSE2D, Kind

BACKENDS = ["reference", pytest.param("triton", marks=interpreted)]
Call = Callable[[Tensor], Any]


def number(t: Tensor) -> Tensor:
    """Return a tensor with the first number of ``t`` everywhere."""
    return t.flatten()[0].expand(t.shape)


def functional(call: Call, t: Tensor) -> Any:
    def unwrap(result: Tensor) -> Tensor:
        if not torch._is_functional_tensor(result):
            return result
        torch._sync(result)
        return torch._from_functional_tensor(result)

    return tree_map_only(Tensor, unwrap, call(torch._to_functional_tensor(t)))


def vmapped(call: Call, t: Tensor) -> Any:
    return tree_map_only(Tensor, lambda r: r[1], torch.vmap(call)(torch.stack([t + 1, t])))


def inferred(call: Call, t: Tensor) -> Any:
    with torch.inference_mode():
        return call(t.clone())


# How to call a function with the numbers of ``t`` in another form of tensor; the results are plain tensors.
FORMS: dict[str, Callable[[Call, Tensor], Any]] = {
    "negative bit": lambda call, t: call(torch._neg_view(-t)),
    "imaginary part of a conjugate": lambda call, t: call(torch.complex(t, -t).conj().imag),
    "wrapper subclass": lambda call, t: tree_map_only(TwoTensor, lambda r: r.b, call(TwoTensor(t - 1, t))),
    "subclass": lambda call, t: call(t.as_subclass(type("Sub", (Tensor,), {}))),
    "functionalised": functional,
    "vmapped": vmapped,
    "expanded": lambda call, t: call(number(t)),
    "zeros that are not in memory": lambda call, t: call(torch._efficientzerotensor(t.shape)),
    "every other number": lambda call, t: call(torch.stack([t, t + 1], -1)[..., 0]),
    "not aligned": lambda call, t: call(F.pad(t.flatten(), (1, 0))[1:].view(t.shape)),
    "leaf": lambda call, t: call(t.clone().requires_grad_()),
    "parameter": lambda call, t: call(nn.Parameter(t)),
    "inference": inferred,
}
# One form of each kind whose memory doesn't contain the numbers one after the other.
LAZY = ["negative bit", "wrapper subclass", "functionalised", "vmapped", "expanded"]
LAZY += ["zeros that are not in memory", "every other number"]
NUMBERS = {"expanded": number, "zeros that are not in memory": torch.zeros_like}


def check(form: str, call: Call, right: Call, t: Tensor) -> None:
    """Check that ``call`` of a tensor in ``form`` returns what ``right`` does for its numbers in float64."""
    t = NUMBERS.get(form, torch.Tensor.clone)(t)
    expected = tree_leaves(right(t.double()))
    with torch.no_grad() if form != "leaf" else torch.enable_grad():
        found = tree_leaves(FORMS[form](call, t))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(
            one.detach().double().as_subclass(Tensor), other.detach(), rtol=1e-4, atol=1e-4
        )


GROUPS = 2
OUTPUT = (1, 4, 2, 1)
SIZES = {
    "input": (1, 4, 2, 2),
    "weight": (4, 2, 1, 2),
    "bias": (4,),
    "residual": OUTPUT,
    "grad_output": OUTPUT,
    "norm": (3, 4),
}
GEOMETRY = ConvGeometry(SIZES["input"], SIZES["weight"], (1, 1), Padding(0, 0, 0, 0), (1, 1), GROUPS)


def draw(*names: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return random tensors by name, in float32 and the same in float64."""
    tensors = {name: torch.randn(SIZES[name]) for name in names}
    return tensors, {name: t.double() for name, t in tensors.items()}


def convolve(
    input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, kind: Kind = CONV2D
) -> Tensor:
    """Return the expected result of gconv's function."""
    y = kind.pytorch(input, weight, bias, groups=GROUPS)
    return y if residual is None else F.silu(y + residual)


# Sizes of input, weight and output of each kind. In the interpreter only one kind is tested.
SIZES_OF = {
    CONV1D: ((1, 4, 3), (4, 2, 2), (1, 4, 2)),
    CONV2D: (SIZES["input"], SIZES["weight"], OUTPUT),
    CONV3D: ((1, 4, 2, 2, 2), (4, 2, 2, 1, 2), (1, 4, 1, 2, 1)),
    CONV_TRANSPOSE2D: (SIZES["input"], SIZES["weight"], (1, 4, 2, 3)),
}
RUNS = [(kind, "reference") for kind in SIZES_OF] + [pytest.param(CONV2D, "triton", marks=interpreted)]


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["input", "weight", "bias", "residual"])
@pytest.mark.parametrize(("kind", "backend"), RUNS)
def test_functions(kind: Kind, backend: str, name: str, form: str) -> None:
    input, weight, residual = (torch.randn(size) for size in SIZES_OF[kind])
    tensors = {"input": input, "weight": weight, "bias": torch.randn(4)}
    if name == "residual":
        tensors["residual"] = residual
    wide = {key: t.double() for key, t in tensors.items()}
    options = {"groups": GROUPS, "activation": "silu" if name == "residual" else None, "backend": backend}
    check(
        form,
        lambda t: FUNCTIONS[kind](**tensors | {name: t}, **options),
        lambda t: convolve(**wide | {name: t}, kind=kind),
        tensors[name],
    )


@pytest.mark.parametrize("name", ["input", "weight", "bias"])
@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_conjugate_bit(backend: str, name: str) -> None:
    """Only complex tensors have this bit, which the kernels don't support."""
    tensors = {key: torch.randn(SIZES[key], dtype=torch.complex64) for key in ("input", "weight", "bias")}
    conjugated = tensors | {name: tensors[name].conj()}
    expected = convolve(**tensors | {name: tensors[name].conj().resolve_conj()})
    with torch.no_grad():
        found = gconv.group_conv2d(**conjugated, groups=GROUPS, backend=backend)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["input", "weight", "bias", "residual"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_fake_tensors(backend: str, name: str) -> None:
    """Outside of their mode, because an active mode would be noticed without looking at a tensor."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tensors, _ = draw("input", "weight", "bias", "residual")
    tensors[name] = mode.from_tensor(tensors[name])
    with torch.no_grad():
        found = gconv.group_conv2d(**tensors, groups=GROUPS, activation="silu", backend=backend)
    assert isinstance(found, FakeTensor) and found.shape == OUTPUT


@pytest.mark.parametrize("form", [form for form in LAZY if form != "vmapped"])
@pytest.mark.parametrize("name", ["input", "weight", "bias", "grad_output"])
@interpreted
def test_gradients(name: str, form: str) -> None:
    """For all operands, with one of them or the gradient of the output in another form."""
    tensors, wide = draw("input", "weight", "bias", "grad_output")

    def gradients(run: Callable[..., Tensor], tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        *operands, grad_output = tensors.values()
        with torch.enable_grad():
            operands = [t.detach().requires_grad_() for t in operands]
            return torch.autograd.grad(run(*operands), operands, grad_output)

    def ours(*operands: Tensor) -> Tensor:
        return gconv.group_conv2d(*operands, groups=GROUPS, backend="triton")

    check(
        form,
        lambda t: gradients(ours, tensors | {name: t}),
        lambda t: gradients(convolve, wide | {name: t}),
        tensors[name],
    )


# The arguments of each operator other than tensors: sizes and options.
OPERATORS: dict[str, tuple[tuple, tuple]] = {
    "forward": ((), ("silu",)),
    "input_grad": ((GEOMETRY.input_size,), ("silu",)),
    "weight_grad": ((GEOMETRY.weight_size,), (True,)),
    "norm_forward": ((), ()),
    "norm_input_grad": ((), ()),
    "norm_weight_grad": ((GEOMETRY.weight_size,), (True,)),
}


def tensors_of(operator: str) -> list[str]:
    """Return the names of an operator's tensors, from its schema, so that new ones are tested too."""
    arguments = getattr(torch.ops.gconv, operator).default._schema.arguments
    return [argument.name for argument in arguments if "Tensor" in str(argument.type)]


def run_operator(operator: str, tensors: dict[str, Tensor], backend: str) -> Any:
    """Run an operator of ``torch.ops.gconv``."""
    sizes, options = OPERATORS[operator]
    run, (first, residual) = getattr(torch.ops.gconv, operator), split(tensors)
    return run(*first, *sizes, *GEOMETRY.settings, *options, *residual, backend)


def run_pass(operator: str, tensors: dict[str, Tensor], backend: str) -> Any:
    """Run a pass as gconv does, without the operator if nothing observes operators."""
    first, residual = split(tensors)
    return getattr(ops, operator)(*first, GEOMETRY, *OPERATORS[operator][1], *residual, backend)


def split(tensors: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors at the start, and the residual, which is the last option."""
    first = [tensor for name, tensor in tensors.items() if name != "residual"]
    return first, [tensor for name, tensor in tensors.items() if name == "residual"]


# The kernels are slow, so test only one of the forms that are detected in the same way.
WAYS = [(run, "reference", form) for run in (run_operator, run_pass) for form in LAZY]
WAYS += [
    pytest.param(run_pass, "triton", form, marks=interpreted)
    for form in ("negative bit", "wrapper subclass", "expanded", "every other number")
]


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize(
    ("operator", "name"), [(operator, name) for operator in OPERATORS for name in tensors_of(operator)]
)
@pytest.mark.parametrize(("run", "backend", "form"), WAYS)
def test_operators(run: Callable[..., Any], backend: str, operator: str, name: str, form: str) -> None:
    tensors, wide = draw(*tensors_of(operator))
    if operator == "input_grad":  # is added to dx
        tensors["residual"] = torch.randn(SIZES["input"])
        wide["residual"] = tensors["residual"].double()
    check(
        form,
        lambda t: run(operator, tensors | {name: t}, backend),
        lambda t: run_operator(operator, wide | {name: t}, "aten"),
        tensors[name],
    )


@interpreted
def test_a_lazily_negated_residual_in_the_layout_of_the_kernels() -> None:
    """No copy is made on the way, so only the operator can resolve it."""
    x, w, residual = torch.randn(1, 8, 4, 4), torch.randn(8, 4, 3, 3), torch.randn(1, 8, 4, 4)
    residual = residual.contiguous(memory_format=torch.channels_last)
    settings = {"padding": 1, "groups": 2}
    expected = F.conv2d(x.double(), w.double(), **settings) + residual.double()
    y = gconv.group_conv2d(x, w, residual=torch._neg_view(-residual), backend="triton", **settings)
    torch.testing.assert_close(y.double(), expected, atol=1e-4, rtol=1e-4)


PLACES = ["input", "grad_output", "1.weight", "1.bias"]
PLACES += [f"{i}.{name}" for i in (0, 2) for name in ("weight", "bias", "running_mean", "running_var")]


@pytest.mark.parametrize("form", ["negative bit", "wrapper subclass", "every other number"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@interpreted
def test_conv_between_norms(training: bool, place: str, form: str) -> None:
    """Output, statistics and gradients, with any tensor of the modules or the call in another form."""
    modules = sandwich(4, 2, dtype=torch.float32)
    modules[1] = gconv.GroupConv2d(4, 4, 1, groups=2)  # cheaper to interpret than 3x3
    modules.train(training)
    wide = copy.deepcopy(modules).double()
    tensors, wide_tensors = draw("input")
    tensors["grad_output"], wide_tensors["grad_output"] = (t["input"].sin() for t in (tensors, wide_tensors))
    module, _, name = place.rpartition(".")

    def step(run: Callable[..., Tensor], modules: nn.ModuleList, tensors: dict[str, Tensor]) -> Any:
        if module:
            held, t = modules.get_submodule(module), tensors[place]
            (held._buffers if name in held._buffers else held._parameters)[name] = t
            return run(tensors["input"], *modules), t
        with torch.enable_grad():
            operands = [tensors["input"].detach().requires_grad_(), *modules.parameters()]
            y = run(operands[0], *modules)
            return y, *torch.autograd.grad(y, operands, tensors["grad_output"])

    def fused(*arguments: Any) -> Tensor:
        return gconv.conv_between_norms(*arguments, backend="triton")

    check(
        form,
        lambda t: step(fused, modules, tensors | {place: t}),
        lambda t: step(one_by_one, wide, wide_tensors | {place: t}),
        getattr(modules.get_submodule(module), name).detach() if module else tensors[place],
    )
