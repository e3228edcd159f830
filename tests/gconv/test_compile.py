"""``torch.compile`` and ``torch.export``."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracle import FUNCTIONS, Case
from torch import Tensor, nn
from torch.export import Dim, export

import gconv
from gconv.kinds import CONV1D, CONV2D, CONV3D, CONV_TRANSPOSE1D, CONV_TRANSPOSE2D, KINDS, Kind
from gconv.module import LAYERS

COMPILERS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[
            pytest.mark.long,  # make test compiles a converted network with it in test_ecosystem.py
            pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler"),
        ],
    ),
]
# All dimensions differ: Dynamo would use one symbol for equal ones.
SIZES = [(2, 8, 9, 6), (3, 8, 7, 10), (5, 8, 12, 4)]


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["aten", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with gconv.backend(request.param):
        yield request.param


class Block(nn.Module):
    """A convolution between other operations; ``options`` are those of gconv's layers."""

    def __init__(self, kind: Kind = CONV2D, **options: Any) -> None:
        super().__init__()
        options = {"padding": 1, "groups": 4, "activation": "relu", "dtype": torch.float64, **options}
        layer = next(layer for layer in LAYERS if layer._gconv_kind is kind)
        self.conv = layer(8, 8, 3, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.sin()).cos()


def outputs_and_gradients(model: nn.Module, x: Tensor, like: nn.Module) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *like.parameters()])]


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_gives_the_same_numbers_and_strides(backend: str, dynamic: bool, compiler: str) -> None:
    model = Block()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=compiler)
    for size in SIZES if dynamic else SIZES[:1]:
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(size, dtype=torch.float64).contiguous(memory_format=layout)
            ours, eager = (outputs_and_gradients(m, x, model) for m in (compiled, model))
            torch.testing.assert_close(ours, eager)
            assert ours[0].stride() == eager[0].stride()
            with torch.no_grad():
                torch.testing.assert_close(compiled(x), eager[0])


@pytest.mark.parametrize(
    "options",
    [{"stride": 2}, {"padding": "same"}, {"padding_mode": "circular"}, {"padding": "valid"}],
    ids=str,
)
def test_compile_of_other_settings(backend: str, options: dict) -> None:
    model = Block(**options)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in SIZES[:2]:
        x = torch.randn(size, dtype=torch.float64)
        torch.testing.assert_close(
            outputs_and_gradients(compiled, x, model), outputs_and_gradients(model, x, model)
        )


# Each is computed differently. Compiling takes seconds.
OTHER_KINDS = [
    pytest.param(
        kind, options, dynamic, id=f"{kind}, {options}, {'dynamic' if dynamic else 'static'}", marks=marks
    )
    for kind, options, marks in [
        (CONV1D, {}, []),
        (CONV1D, {"padding_mode": "circular", "stride": 2}, pytest.mark.long),
        (CONV3D, {}, []),
        (CONV3D, {"padding": (0, 1, 1)}, pytest.mark.long),
        (CONV_TRANSPOSE1D, {"stride": 2}, pytest.mark.long),
        (CONV_TRANSPOSE2D, {"stride": 2, "output_padding": 1}, []),
        (CONV_TRANSPOSE2D, {"dilation": 3, "output_padding": 2, "activation": None}, pytest.mark.long),
    ]
    for dynamic in (False, True)
    if dynamic or marks
]


@pytest.mark.parametrize(("kind", "options", "dynamic"), OTHER_KINDS)
def test_compile_of_other_convolutions(kind: Kind, options: dict, dynamic: bool) -> None:
    model = Block(kind, **options)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with gconv.backend("reference"):
        for size in [(2, 8, 9, 6, 5), (3, 8, 7, 10, 4)][: 1 + dynamic]:
            x = torch.randn(size[: 2 + kind.dims], dtype=torch.float64)
            ours, eager = (outputs_and_gradients(m, x, model) for m in (compiled, model))
            torch.testing.assert_close(ours, eager)
            assert ours[0].stride() == eager[0].stride()


def test_dynamic_shapes_compile_once(backend: str) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(Block(), fullgraph=True, dynamic=True, backend=counter)
    for size in SIZES:
        compiled(torch.randn(size, dtype=torch.float64))
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_backend_can_be_set_inside_a_compiled_function(kind: Kind) -> None:
    convolve = FUNCTIONS[kind]

    def both(x: Tensor, w: Tensor) -> Tensor:
        with gconv.backend("reference"):
            first = convolve(x, w, groups=2)
        return first - convolve(x, w, groups=2)

    case = Case("", (1, 4, *[5] * kind.dims), (4, 2, *[3] * kind.dims))
    x, w = (t.detach() for t in case.tensors(torch.float32)[:2])
    assert torch.compile(both, fullgraph=True, backend="aot_eager")(x, w).abs().max() < 1e-5


def test_compiled_graphs_follow_a_change_of_backend() -> None:
    w = torch.randn(4, 2, 3, 3)
    graphs = []

    def remember(graph: torch.fx.GraphModule, _inputs: list) -> object:
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    compiled = torch.compile(lambda x: gconv.group_conv2d(x, w, groups=2), fullgraph=True, backend=remember)
    x = torch.randn(1, 4, 5, 5)
    plain = compiled(x)
    with gconv.backend("reference"):
        torch.testing.assert_close(compiled(x), plain)
    compiled(x)
    assert ["gconv.forward" in graph for graph in graphs] == [False, True]


def test_compile_under_autocast(backend: str) -> None:
    model = Block().float()
    x = torch.randn(SIZES[0])

    def cast(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model.conv(x)

    compiled, eager = torch.compile(cast, fullgraph=True, backend="aot_eager")(model), cast(model)
    assert compiled.dtype == torch.bfloat16
    torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_an_exported_pass_is_one_operator_or_pytorchs_convolution(kind: Kind) -> None:
    """Also for sequences and volumes, which become images, and with an activation."""
    model = Block(kind)
    sizes = (9, 6, 5)[: kind.dims]
    example = torch.randn(2, 8, *sizes, dtype=torch.float64)
    with gconv.backend("reference"):
        program = export(model, (example,), dynamic_shapes={"x": {0: Dim("batch", min=1, max=64)}})
    ours = [str(node.target) for node in program.graph.nodes if "gconv" in str(node.target)]
    assert ours == [f"gconv.{kind.pass_of_geometry('forward')}.default"]
    exported = program.module()
    portable = program.run_decompositions(gconv.decompositions())
    assert not [node for node in portable.graph.nodes if "gconv" in str(node.target)]
    for batch in (1, 7):
        x = torch.randn(batch, 8, *sizes, dtype=torch.float64)
        expected = outputs_and_gradients(model, x, model)
        torch.testing.assert_close(outputs_and_gradients(exported, x, exported), expected)
        torch.testing.assert_close(portable.module()(x), expected[0])


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_with_a_dynamic_batch_runs_and_trains(backend: str, strict: bool) -> None:
    model = Block()
    shapes = {"x": {0: Dim("batch", min=1, max=64), 2: Dim("height", min=4, max=64)}}
    example = (torch.randn(SIZES[0], dtype=torch.float64),)
    program = export(model, example, dynamic_shapes=shapes, strict=strict)
    targets = {str(node.target) for node in program.graph.nodes}
    assert ("gconv.forward.default" in targets) == (backend == "reference")
    exported = program.module()
    for size in ((1, 8, 9, 6), (7, 8, 5, 6)):
        x = torch.randn(size, dtype=torch.float64)
        torch.testing.assert_close(
            outputs_and_gradients(exported, x, exported), outputs_and_gradients(model, x, model)
        )


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_fx_traces_the_call_as_one_node(kind: Kind) -> None:
    convolve = FUNCTIONS[kind]

    class Net(Block):
        def forward(self, x: Tensor) -> Tensor:
            return convolve(self.conv(x), self.conv.weight, groups=4, backend="reference")

    net = Net(kind)
    traced = torch.fx.symbolic_trace(net)
    nodes = [node for node in traced.graph.nodes if node.target is convolve]
    assert [node.kwargs["activation"] for node in nodes] == ["relu", None]
    assert [node.kwargs["backend"] for node in nodes] == [None, "reference"]
    x = torch.randn(2, 8, *[5] * kind.dims, dtype=torch.float64)
    torch.testing.assert_close(traced(x), net(x))
