"""``torch.ops.gconv``: the operators in compiled and exported graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import FUNCTIONS, OTHERS, Case, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gconv import dispatch, ops
from gconv.geometry import ConvGeometry
from gconv.kinds import KINDS, Kind

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
CASES = [
    Case("3x3", (2, 4, 5, 6), (4, 2, 3, 3), {"padding": 1, "groups": 2}),
    Case("stride 2, dilated", (2, 4, 7, 6), (6, 2, 3, 2), {"stride": 2, "dilation": (1, 2), "groups": 2}),
    Case("no images", (0, 4, 5, 6), (4, 2, 3, 3), {"padding": 1, "groups": 2}),
]


# The first case of each kind.
FIRST = {kind: next(case for case in (*CASES, *OTHERS) if case.kind is kind) for kind in KINDS}


def calls(case: Case, backend: str) -> dict[str, tuple]:
    """Return the arguments of each operator; with a residual, which has no gradient, none are required."""
    pairs = {"stride": 1, "padding": 0, "dilation": 1, **case.settings}
    stride, padding, dilation = (
        (pairs[name],) * 2 if isinstance(pairs[name], int) else pairs[name]
        for name in ("stride", "padding", "dilation")
    )
    zeros = (padding[0], padding[0], padding[1], padding[1])
    settings = (stride, zeros, dilation, case.groups)
    x, w, b = case.tensors()
    grad = torch.randn_like(F.conv2d(x, w, b, **case.settings)).requires_grad_()
    beside = torch.randn(x.shape[1], dtype=x.dtype).requires_grad_()
    return {
        "forward": (x, w, b, *settings, "relu", None, backend),
        "forward with a residual": (*detached(x, w, b), *settings, "silu", grad.detach().cos(), backend),
        "input_grad": (grad, w, None, x.shape, *settings, None, None, backend),
        "input_grad with a bias": (grad, w, beside, x.shape, *settings, "relu", None, backend),
        "input_grad with a residual": (
            *detached(grad, w, beside),
            x.shape,
            *settings,
            "silu",
            x.detach().cos(),
            backend,
        ),
        "weight_grad": (grad, x, w.shape, *settings, True, backend),
    }


def detached(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.detach() for tensor in tensors]


CALLS = list(calls(CASES[0], "aten"))


@pytest.mark.parametrize("backend", ["auto", "aten", "reference"])
@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, id=f"{case.name}-{name}", marks=[pytest.mark.long] * more)
        for case in CASES
        for name in CALLS
        for more in (case is not CASES[0] and "with a" in name,)
    ],
)
def test_opcheck(case: Case, name: str, backend: str) -> None:
    operator = getattr(torch.ops.gconv, name.split()[0]).default
    result = torch.library.opcheck(operator, calls(case, backend)[name])
    assert set(result.values()) == {"SUCCESS"}


def test_weight_grad_without_bias_leaves_it_empty() -> None:
    grad, x, size, *settings, _, backend = calls(CASES[0], "reference")["weight_grad"]
    weight, bias = torch.ops.gconv.weight_grad(grad, x, size, *settings, False, backend)
    assert weight.shape == size and bias.shape == (0,)


@pytest.mark.parametrize("name", ["forward with a residual", "input_grad with a residual"])
def test_a_residual_inside_an_operator_has_no_gradient(name: str) -> None:
    first, *rest = calls(CASES[0], "reference")[name]
    with pytest.raises(RuntimeError, match="a residual or activation inside the kernel has no gradient"):
        getattr(torch.ops.gconv, name.split()[0])(first.requires_grad_(), *rest)


@pytest.mark.parametrize("path", ["reference", "aten operators"])
@pytest.mark.parametrize("case", [*CASES[:2], *OTHERS], ids=lambda case: case.name)
def test_flop_counter_counts_each_pass_once(case: Case, path: str) -> None:
    """As two per multiply-add; PyTorch's formula counts the weight gradient ``groups`` times."""
    tensors = case.tensors()
    with FlopCounterMode(display=False) as counter:
        y = case.run(path, *tensors)
        forward = counter.get_total_flops()
        y.sum().backward()
    # Each output, or each input if transposed, is multiplied with all weights of one filter.
    met = tensors[0] if case.kind.transposed else y
    assert forward == 2 * met.numel() * tensors[1][0].numel()
    assert counter.get_total_flops() == 3 * forward
    with FlopCounterMode(display=False) as counter:
        case.pytorch(*tensors)
    assert counter.get_total_flops() == forward


@pytest.mark.parametrize("transform", [torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1]])
def test_torch_func_inside_compile_is_refused(transform: object) -> None:
    """Instead of a wrong result or an unclear error of PyTorch."""
    w = torch.randn(4, 2, 3, 3)
    function = transform(lambda x: run("reference", x, w, groups=2).sum())
    with pytest.raises(Exception, match=r"can't be transformed by torch\.func"):
        torch.compile(function, backend="aot_eager", fullgraph=True)(torch.randn(1, 4, 5, 5))
    torch._dynamo.reset()


def trained(case: Case) -> None:
    """Run a forward and a backward pass on the reference."""
    case.run("reference", *case.tensors()).sum().backward()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_nobody_watching_the_passes_run_without_operators(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a plain eager call, an operator written in Python costs more than everything else."""
    monkeypatch.setattr(ops, "registered", None)
    case = FIRST[kind]
    trained(case)
    with torch.no_grad():
        trained_without = case.run("reference", *case.tensors())
    with torch.inference_mode():
        torch.testing.assert_close(case.run("reference", *case.tensors()), trained_without)


class Watching(TorchDispatchMode):
    """Record the names of gconv's operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        namespace, name, _ = str(func).split(".")
        self.seen += [name] * (namespace == "gconv")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_profiler_sees_each_pass(kind: Kind) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        trained(FIRST[kind])
    seen = {event.key for event in profiler.key_averages() if event.key.startswith("gconv::")}
    assert seen == {"gconv::forward", "gconv::input_grad", "gconv::weight_grad"}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_mode_sees_each_pass(kind: Kind) -> None:
    """A transposed convolution is an input gradient, and its input gradient is a forward pass."""
    with Watching() as mode:
        y = FIRST[kind].run("reference", *FIRST[kind].tensors())
        first = list(mode.seen)
        y.sum().backward()
    forward, input_grad = ("input_grad", "forward") if kind.transposed else ("forward", "input_grad")
    assert first == [forward]
    assert sorted(mode.seen) == sorted([forward, input_grad, "weight_grad"])


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_residual_and_an_activation_are_part_of_the_pass_in_inference(
    kind: Kind, activation: str | None
) -> None:
    case = FIRST[kind]
    tensors = case.tensors()
    with torch.no_grad():
        expected = case.pytorch(*tensors)
    residual = torch.randn_like(expected)
    expected = expected + residual
    expected = expected if activation is None else getattr(F, activation)(expected)
    options = {"residual": residual, "activation": activation, "backend": "reference"}
    operator, asked = (ops.input_grad if kind.transposed else ops.forward), []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        run = operator.run
        patch.setattr(operator, "run", lambda *arguments: asked.append(arguments[4:6]) or run(*arguments))
        y = FUNCTIONS[kind](*tensors, **case.settings, **options)
    torch.testing.assert_close(y, expected)
    ((inside, beside),) = asked
    # The slices of a volume become images in another order than those of the residual.
    assert (inside, beside is None) == ((None, True) if kind.dims == 3 else (activation, False))


@pytest.mark.parametrize("kind", ["conjugated", "meta", "subclass"])
def test_tensors_that_do_not_simply_hold_their_numbers_go_through_operators(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sub(torch.Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl

    x, w = torch.randn(2, 4, 5, 6, dtype=torch.complex64), torch.randn(4, 2, 3, 3, dtype=torch.complex64)
    x = {"conjugated": x.conj(), "meta": x.to("meta"), "subclass": x.real.clone().as_subclass(Sub)}[kind]
    w = w.to(x.device) if kind != "subclass" else w.real.clone()
    with monkeypatch.context() as patch:
        patch.setattr(ops, "registered", None)
        with pytest.raises(AttributeError), torch.no_grad():
            run("reference", x, w, groups=2)
    with torch.no_grad():
        y = run("reference", x, w, groups=2)
        if kind != "meta":
            torch.testing.assert_close(*(t.as_subclass(torch.Tensor) for t in (y, F.conv2d(x, w, groups=2))))
    assert y.shape == (2, 4, 3, 4)


@pytest.mark.parametrize("operator", ops.OPERATORS, ids=lambda operator: operator.name)
def test_x_or_its_gradient_decides_who_runs_a_pass(
    operator: ops.Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight gradient runs on the backend of the forward pass, whatever the layout of dy."""
    x, weight, norm = torch.randn(1, 4, 3, 3), torch.randn(4, 2, 1, 1), torch.ones(3, 4)
    tensors = {
        "input": x,
        "weight": weight,
        "bias": None,
        "grad_output": torch.randn(1, 4, 3, 3),
        "norm": norm,
    }
    geometry = ConvGeometry.of(x.shape, weight.shape, (1, 1), (0, 0, 0, 0), (1, 1), 2)
    options = {"activation": None, "residual": None, "with_bias": False}
    asked: list[tuple[str, torch.Tensor]] = []
    choose = dispatch.backend_for

    def noting(pass_: str, name: str, operand: torch.Tensor, geometry: ConvGeometry) -> Any:
        asked.append((pass_, operand))
        return choose(pass_, name, operand, geometry)

    monkeypatch.setattr(dispatch, "backend_for", noting)
    given = [tensors[declared.split()[-1]] for declared in operator.tensors]
    operator(*given, geometry, *[options[o.split()[-1]] for o in operator.options], "reference")
    ((pass_, operand),) = asked
    assert pass_ == operator.name.removeprefix("norm_")
    assert operand is tensors["grad_output" if pass_ == "input_grad" else "input"]
