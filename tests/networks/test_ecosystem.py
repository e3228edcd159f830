"""Converted networks with other features of PyTorch: compilers, export, autocast, processes, torch.func."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.multiprocessing
import workers
import zoo
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import gconv
from gconv import ops
from gconv.geometry import PASSES


@pytest.fixture(params=["aten", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with gconv.backend(request.param):
        yield request.param


@pytest.fixture
def compiling() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """Grouped convolutions of three classes, batch norm and a residual."""

    def __init__(self) -> None:
        super().__init__()
        layers = zoo.load("timm.layers")
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.standardised = layers.ScaledStdConv2d(16, 16, 3, groups=2)
        self.same = layers.Conv2dSame(16, 16, 3, stride=2, groups=8)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.norm(self.grouped(x)).relu()
        return self.same(self.standardised(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def pair(dtype: torch.dtype = torch.float64) -> tuple[Net, Net]:
    """Return a network and its converted copy."""
    torch.manual_seed(3)
    plain = Net().to(dtype)
    converted = copy.deepcopy(plain)
    assert len(gconv.convert(converted).converted) == 3
    return plain, converted


def images(batch: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(batch, 3, 11, 14, generator=torch.Generator().manual_seed(batch), dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


def step(model: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """Return output and gradients of a training step of the model, or of ``run``."""
    model.zero_grad()
    y = (model if run is None else run)(x)
    y.square().sum().backward()
    return {"output": y.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
COMPILERS = [
    ("aten", "aot_eager"),
    ("reference", "aot_eager"),
    pytest.param("reference", "inductor", marks=[needs_compiler, pytest.mark.long]),
]


@pytest.mark.parametrize(("backend", "compiler"), COMPILERS, indirect=["backend"])
def test_compile_trains_and_infers_with_any_batch(compiling: None, backend: str, compiler: str) -> None:
    plain, converted = pair()
    counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)
    compiled = torch.compile(converted, fullgraph=True, backend=counter)
    for batch in (3, 4, 6):
        x = images(batch)
        torch._dynamo.mark_dynamic(x, 0)
        assert_same(step(converted, x, compiled), step(plain, x))
    assert counter.frame_count == 1
    plain.eval(), converted.eval()
    with torch.no_grad():
        for batch in (2, 5):
            x = images(batch)
            torch._dynamo.mark_dynamic(x, 0)
            torch.testing.assert_close(compiled(x), plain(x))
    assert counter.frame_count == 2


@needs_compiler
def test_inductor_keeps_channels_last_and_the_numbers(
    compiling: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in training, where Inductor makes networks with grouped aten convolutions contiguous."""
    plain, converted = (
        nn.Sequential(model.grouped, nn.ReLU(), model.same).to(memory_format=torch.channels_last)
        for model in pair()
    )
    seen: dict[str, set[bool]] = {}

    def spy_on(name: str) -> Callable[..., Any]:
        run = getattr(ops, name).run

        def spy(first: Tensor, *args: Any) -> Any:
            seen.setdefault(name, set()).add(first.is_contiguous(memory_format=torch.channels_last))
            return run(first, *args)

        return spy

    for name in PASSES:
        monkeypatch.setattr(getattr(ops, name), "run", spy_on(name))
    x = torch.randn(3, 16, 11, 14, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    with gconv.backend("reference"):
        found = step(converted, x, torch.compile(converted, fullgraph=True))
    assert_same(found, step(plain, x))
    assert found["output"].is_contiguous(memory_format=torch.channels_last)
    assert seen == {"forward": {True}, "input_grad": {True}, "weight_grad": {True}}


def test_a_compiled_network_can_be_converted_and_reverted(
    compiling: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = pair()
    compiled = torch.compile(plain.eval(), fullgraph=True, backend="aot_eager")
    traced, x = [], images()
    expected = compiled(x)
    ran: list[int] = []
    original = ops.forward
    monkeypatch.setattr(ops, "forward", lambda *args: ran.append(1) or original(*args))
    for change in (gconv.convert, gconv.revert):
        assert change(compiled)
        ran.clear()
        with gconv.backend("reference"):
            torch.testing.assert_close(compiled(x), expected)
        traced.append(len(ran))
    assert traced == [3, 0]


# torch.export.save warns about each channels_last weight.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:No complete tensor found:UserWarning")
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_saves_loads_and_decomposes(backend: str, strict: bool, tmp_path: Path) -> None:
    plain, converted = pair()
    plain.eval(), converted.eval()
    program = torch.export.export(
        converted, (images(),), dynamic_shapes={"x": {0: Dim("batch", min=1, max=64)}}, strict=strict
    )
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2")
    standard = loaded.run_decompositions(gconv.decompositions())
    for exported in (program, loaded, standard):
        torch.testing.assert_close(exported.module()(images(7)), plain(images(7)))
    targets = [str(node.target) for node in loaded.graph.nodes]
    assert targets.count("gconv.forward.default") == (3 if backend == "reference" else 0)
    targets = [str(node.target) for node in standard.graph.nodes]
    assert targets.count("aten.conv2d.default") == 4 and not any("gconv." in target for target in targets)


def test_decompositions_of_the_gradients() -> None:
    w = torch.randn(4, 2, 3, 3, dtype=torch.float64)

    def gradients(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = gconv.group_conv2d(x, w, padding=1, groups=2, backend="reference")
        return torch.autograd.grad(y.square().sum(), (x, w))

    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    made = torch.fx.experimental.proxy_tensor.make_fx(gradients, decomposition_table=gconv.decompositions())
    traced = made(x, w.requires_grad_())
    assert not any("gconv" in str(node.target) for node in traced.graph.nodes)
    torch.testing.assert_close(traced(x, w), gradients(x, w))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("from_program", [False, True], ids=["module", "decomposed program"])
def test_onnx_holds_standard_convolutions(from_program: bool, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    _, converted = pair(torch.float32)
    converted.eval()
    shapes = {"x": {0: Dim("batch", min=1, max=64)}}
    x = images(dtype=torch.float32)
    with gconv.backend("reference"):
        if from_program:
            program = torch.export.export(converted, (x,), dynamic_shapes=shapes)
            model = program.run_decompositions(gconv.decompositions())
        else:
            model = converted
        exported = torch.onnx.export(model, (x,), dynamic_shapes=shapes, dynamo=True, verbose=False)
    kinds = [node.op_type for node in exported.model.graph]
    assert kinds.count("Conv") == 4 and {node.domain for node in exported.model.graph} == {""}
    exported.save(tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    x = images(6, torch.float32)
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), converted(x), atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning:torch.nn.functional"
)
def test_traced_torchscript_holds_standard_convolutions() -> None:
    _, converted = pair()
    converted.eval()
    with gconv.backend("reference"):
        traced = torch.jit.trace(converted, (images(),))
    kinds = [node.kind() for node in traced.inlined_graph.nodes()]
    assert kinds.count("aten::_convolution") == 4 and not [kind for kind in kinds if "Python" in kind]
    torch.testing.assert_close(traced(images(5)), converted(images(5)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_with_a_gradient_scaler_trains(backend: str, dtype: torch.dtype) -> None:
    """Gradients are unscaled, steps with infinite gradients are skipped, and parameters stay float32."""
    plain, converted = pair(torch.float32)
    kinds: set[torch.dtype] = set()
    converted.grouped.register_forward_hook(lambda module, args, y: kinds.add(y.dtype))
    steps: list[list[bool]] = []
    for model in (plain, converted):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        changed = []
        for scale in (1.0, 1.0, torch.inf, 1.0):
            before = model.grouped.weight.detach().clone()
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = cross_entropy(model(images(4, torch.float32)), torch.tensor([0, 1, 2, 3])) * scale
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            changed.append(not torch.equal(before, model.grouped.weight))
        steps.append([*changed, scaler.get_scale()])
    assert steps[0] == steps[1] == [True, True, False, True, 2.0**10]
    assert kinds == {dtype}
    tolerance = {"atol": 0.05, "rtol": 0.05} if backend == "reference" else {"atol": 0, "rtol": 0}
    assert_same(converted.state_dict(), plain.state_dict(), **tolerance)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_activation_checkpointing_computes_again_what_it_did(
    backend: str, reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, converted = pair()
    ran: list[str] = []
    for name in PASSES:
        operator = getattr(ops, name)
        original = operator.run
        monkeypatch.setattr(operator, "run", lambda *a, n=name, run=original: ran.append(n) or run(*a))

    def run(x: Tensor) -> Tensor:
        return converted.head(checkpoint(converted.features, x, use_reentrant=reentrant))

    x = images().requires_grad_()  # reentrant checkpointing needs an input with a gradient
    assert_same(step(converted, x, run), step(plain, x))
    if backend == "reference":
        again = ["forward"] * 3 + ["input_grad", "weight_grad"] * 3
        assert ran[:3] == ["forward"] * 3 and sorted(ran[3:]) == sorted(again)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functional_call_grad_and_vmap(backend: str) -> None:
    """Per-sample gradients, and an ensemble in one call, the two main uses of torch.func."""
    plain, converted = pair()
    plain.eval(), converted.eval()
    x, labels = images(), torch.tensor([0, 3, 1])

    def loss(parameters: dict[str, Tensor], x: Tensor, label: Tensor, model: Net) -> Tensor:
        y = torch.func.functional_call(model, parameters, (x.unsqueeze(0),))
        return cross_entropy(y, label.unsqueeze(0))

    results = []
    for model in (converted, plain):
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        each = torch.func.vmap(torch.func.grad(partial(loss, model=model)), in_dims=(None, 0, 0))
        results.append(each(parameters, x, labels))
    assert_same(*results)

    twins = [copy.deepcopy(converted), converted]
    for parameter in twins[0].parameters():
        nn.init.normal_(parameter, std=0.3)
    stacked, buffers = torch.func.stack_module_state(twins)

    def call(parameters: dict, buffers: dict) -> Tensor:
        return torch.func.functional_call(converted, (parameters, buffers), (x,))

    ensemble = torch.func.vmap(call)(stacked, buffers)
    torch.testing.assert_close(ensemble, torch.stack([twin(x) for twin in twins]))


def test_exponential_moving_average_of_the_weights(backend: str) -> None:
    plain, converted = pair()
    averages = []
    for model in (converted, plain):
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for batch in (3, 4):
            step(model, images(batch))
            optimizer.step()
            ema.update_parameters(model)
        averages.append(ema.eval()(images(2)))
    torch.testing.assert_close(*averages)
    assert not torch.equal(averages[0], converted.eval()(images(2)))


@pytest.mark.parametrize("backend", ["aten", "reference", pytest.param("triton", marks=pytest.mark.long)])
def test_deterministic_algorithms_run_and_give_the_same_bits(backend: str) -> None:
    """PyTorch then also fills new memory with NaN, so values that a pass doesn't write would show."""
    _, converted = pair(torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        with gconv.backend(backend):
            first, second = (step(converted, images(2, torch.float32)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) and first[name].isfinite().all() for name in first)


def test_flop_counter_counts_as_for_the_original(backend: str) -> None:
    """Layer by layer. PyTorch counts a weight gradient ``groups`` times, gconv once."""
    counts = []
    for model in pair():
        with FlopCounterMode(display=False) as counter:
            y = model(images())
        counts.append({name: sum(flops.values()) for name, flops in counter.get_flop_counts().items()})
    assert counts[0] == counts[1] and counts[0]["Net.grouped"] == 2 * 3 * 16 * 11 * 14 * 4 * 9
    with FlopCounterMode(display=False) as counter:
        y.square().sum().backward()
    weight_grads_too_often = sum(
        (layer.groups - 1) * counts[0][f"Net.{name}"]
        for name in ("grouped", "standardised", "same")
        for layer in [getattr(model, name)]
    )
    stem = counts[0]["Net.stem"]  # its input needs no gradient
    once = 2 * counts[0]["Global"] - stem
    assert counter.get_total_flops() == once + (weight_grads_too_often if backend == "aten" else 0)


def test_two_processes_train_as_one_with_all_images(tmp_path: Path) -> None:
    """DistributedDataParallel and FSDP2, on networks converted before or after wrapping."""
    torch.multiprocessing.spawn(workers.in_a_group, (tmp_path,), nprocs=2)
    states = torch.load(tmp_path / "states.pt")
    assert list(states) == ["data_parallel", "converted_when_wrapped", "fully_sharded", "sharded_alone"]
    alone = workers.network()
    start = alone[0].first.weight.clone()
    workers.train(alone, *workers.data())
    assert not torch.equal(start, alone[0].first.weight)
    for state in states.values():
        assert_same(state, alone.state_dict())
