"""Converted networks with every kind of convolution, with other features of PyTorch."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from fusing import assert_same, trained
from marks import interpreted
from mixed import NETWORKS, SWAPPED, twins
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import gconv
from gconv.kinds import KINDS, kind_of

pytestmark = [
    # From F.conv1d, for wav2vec2's even kernel with padding="same", and from vmap, for gconv's operators.
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]


@pytest.fixture(params=["aten", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with gconv.backend(request.param):
        yield request.param


@pytest.fixture(params=NETWORKS)
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    torch._dynamo.reset()
    yield request.param
    torch._dynamo.reset()


def step(model: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """Return output and gradients of a training step of the model, or of ``run``."""
    model.zero_grad()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = (model if run is None else run)(x)
    y.square().sum().backward()
    grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "input": x.grad, **grads}


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], **tolerance, msg=lambda m, key=key: f"{key}: {m}")


def test_a_converted_network_trains_as_the_original(name: str, backend: str) -> None:
    plain, converted = twins(name)
    x = plain.example(3, torch.float64)
    close(step(converted, x), step(plain, x))
    assert gconv.revert(converted) == tuple(SWAPPED[name])
    close(step(converted, x), step(plain, x))
    assert [type(m) for m in converted.modules() if not parametrize.is_parametrized(m)] == [
        type(m) for m in plain.modules() if not parametrize.is_parametrized(m)
    ]


@interpreted
def test_a_converted_network_trains_on_the_kernels(name: str) -> None:
    plain, converted = twins(name, torch.float32)
    x = plain.example(2, torch.float32)
    with gconv.backend("triton"):
        found = step(converted, x)
    close(found, step(plain, x), atol=2e-3, rtol=2e-3)


def test_second_order_gradients_of_a_network(name: str, backend: str) -> None:
    plain, converted = twins(name)
    x = plain.example(2, torch.float64)
    results = []
    for model in (converted, plain):
        parameters = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(model(x).sin().sum(), parameters, create_graph=True)
        penalty = sum(g.square().sum() for g in grads)
        results.append(torch.autograd.grad(penalty, parameters, allow_unused=True))
    torch.testing.assert_close(*results)


def test_copies_and_state_dicts_of_a_converted_network(name: str) -> None:
    plain, converted = twins(name)
    x = plain.example(2, torch.float64)
    assert list(plain.state_dict()) == list(converted.state_dict())
    plain.eval(), converted.eval()
    torch.testing.assert_close(copy.deepcopy(converted)(x), plain(x))
    if name != "speech":  # PyTorch can't pickle parametrized modules
        saved = io.BytesIO()
        torch.save(converted, saved)
        saved.seek(0)
        loaded = torch.load(saved, weights_only=False)
        torch.testing.assert_close(loaded(x), plain(x))
        kinds = [type(m) for m in loaded.modules() if kind_of(m)]
        assert kinds == [type(m) for m in converted.modules() if kind_of(m)]


def test_compile_trains_and_infers_with_any_batch(name: str, backend: str) -> None:
    plain, converted = twins(name)
    if name == "speech":  # on a CPU PyTorch's returns other strides than the compiler expects
        plain.block.batch_norm = converted.block.batch_norm = nn.Identity()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(converted, fullgraph=True, backend=counter)
    for batch in (3, 4):
        x = plain.example(batch, torch.float64)
        torch._dynamo.mark_dynamic(x, 0)
        plain.zero_grad(), converted.zero_grad()
        ours, theirs = compiled(x), plain(x)
        torch.testing.assert_close(ours, theirs)
        grads = [
            torch.autograd.grad(y.square().sum(), list(model.parameters()))
            for y, model in ((ours, converted), (theirs, plain))
        ]
        torch.testing.assert_close(*grads)
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:No complete tensor found:UserWarning")
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_saves_loads_and_decomposes(name: str, backend: str, strict: bool, tmp_path: Path) -> None:
    plain, converted = twins(name)
    plain.eval(), converted.eval()
    shapes = {"x": {0: Dim("batch", min=1, max=64)}}
    program = torch.export.export(
        converted, (plain.example(3, torch.float64),), dynamic_shapes=shapes, strict=strict
    )
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2")
    standard = loaded.run_decompositions(gconv.decompositions())
    x = plain.example(5, torch.float64)
    for exported in (program, loaded, standard):
        torch.testing.assert_close(exported.module()(x), plain(x))
    own = [str(n.target) for n in loaded.graph.nodes if "gconv" in str(n.target)]
    transposed = sum(kind_of(converted.get_submodule(layer)).transposed for layer in SWAPPED[name])
    expected = ["gconv.forward.default"] * (len(SWAPPED[name]) - transposed)
    expected += ["gconv.input_grad.default"] * transposed
    assert sorted(own) == (expected if backend == "reference" else [])
    assert not any("gconv" in str(node.target) for node in standard.graph.nodes)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_onnx_holds_standard_convolutions(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    _, converted = twins(name, torch.float32)
    converted.eval()
    x = converted.example(3, torch.float32)
    with gconv.backend("reference"):
        exported = torch.onnx.export(
            converted,
            (x,),
            dynamic_shapes={"x": {0: Dim("batch", min=1, max=64)}},
            dynamo=True,
            verbose=False,
        )
    operators = [node.op_type for node in exported.model.graph]
    layers = [kind_of(m) for m in converted.modules() if kind_of(m)]
    assert operators.count("Conv") == sum(not kind.transposed for kind in layers)
    assert operators.count("ConvTranspose") == sum(kind.transposed for kind in layers)
    assert {node.domain for node in exported.model.graph} == {""}
    exported.save(tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    x = converted.example(6, torch.float32)
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), converted(x), atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_torchscript_holds_standard_convolutions(name: str) -> None:
    plain, converted = twins(name)
    plain.eval(), converted.eval()
    with gconv.backend("reference"):
        traced = torch.jit.trace(converted, (plain.example(3, torch.float64),))
    kinds = [node.kind() for node in traced.inlined_graph.nodes()]
    assert not [kind for kind in kinds if "Python" in kind or "gconv" in kind]
    x = plain.example(5, torch.float64)
    torch.testing.assert_close(traced(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_trains(name: str, backend: str, dtype: torch.dtype) -> None:
    plain, converted = twins(name, torch.float32)
    x = plain.example(3, torch.float32)
    results = []
    for model in (converted, plain):

        def cast(x: Tensor, model: nn.Module = model) -> Tensor:
            with torch.autocast("cpu", dtype):
                return model(x).float()

        results.append(step(model, x, cast))
    scale = max(float(t.abs().max()) for t in results[1].values())
    eps = torch.finfo(dtype).eps
    close(*results, atol=64 * eps * scale, rtol=0)


def test_activation_checkpointing(name: str, backend: str) -> None:
    plain, converted = twins(name)
    x = plain.example(3, torch.float64)
    close(step(converted, x, partial(checkpoint, converted, use_reentrant=False)), step(plain, x))


def test_per_sample_gradients(name: str, backend: str) -> None:
    plain, converted = twins(name)
    plain.eval(), converted.eval()
    x = plain.example(3, torch.float64)

    def loss(parameters: dict[str, Tensor], x: Tensor, model: nn.Module) -> Tensor:
        return torch.func.functional_call(model, parameters, (x.unsqueeze(0),)).square().sum()

    results = []
    for model in (converted, plain):
        parameters = {key: p.detach() for key, p in model.named_parameters()}
        each = torch.func.vmap(torch.func.grad(partial(loss, model=model)), in_dims=(None, 0))
        results.append(each(parameters, x))
    close(*results)


@pytest.mark.parametrize("backend", ["aten", "reference", pytest.param("triton", marks=pytest.mark.long)])
def test_deterministic_algorithms_give_the_same_bits(name: str, backend: str) -> None:
    """PyTorch then also fills new memory with NaN, so values that a pass doesn't write would show."""
    _, converted = twins(name, torch.float32)
    x = converted.example(2, torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        with gconv.backend(backend):
            first, second = step(converted, x), step(converted, x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[key], second[key]) and first[key].isfinite().all() for key in first)


def test_flop_counter_counts_as_for_the_original(name: str, backend: str) -> None:
    counts = []
    for model in twins(name):
        with FlopCounterMode(display=False) as counter:
            model(model.example(3, torch.float64))
        counts.append({key: sum(flops.values()) for key, flops in counter.get_flop_counts().items()})
    assert counts[0] == counts[1] and counts[0]["Global"] > 0


# Numbers of batch norms folded and not folded, and of activations and residuals fused.
FUSED = {"speech": (2, 0, 2, 0), "u-net": (4, 0, 3, 1), "video": (1, 0, 1, 0)}


def test_fuse_folds_norms_of_every_kind(name: str) -> None:
    model = trained(NETWORKS[name]())
    if name == "speech":
        parametrize.remove_parametrizations(model.position, "weight")
    x = model.example(2, torch.float64)
    fused, report = gconv.fuse(model, x)
    activations = sum(layer.activation is not None for layer in report.layers)
    residuals = sum(layer.residual for layer in report.layers)
    assert (len(report.folded), len(report.not_folded), activations, residuals) == FUSED[name], report
    for backend in ("aten", "reference"):
        with gconv.backend(backend):
            assert_same(model, fused, x)


def test_profile_and_explain_every_layer(name: str, few_rounds: None) -> None:
    plain, converted = twins(name, torch.float32)
    x = plain.example(2, torch.float32)
    result = gconv.profile(converted, x)
    layers = [key for key, m in plain.named_modules() if kind_of(m)]
    assert [c.call.name for c in result.convolutions] == layers
    assert result.total("aten") > 0 and result.total("floor") > 0 and result.network > 0
    text = str(result)
    kinds = {kind_of(plain.get_submodule(layer)) for layer in layers}
    assert ("transposed" in text) == any(kind.transposed for kind in kinds)
    seen: dict[str, Tensor] = {}
    for layer in layers:
        converted.get_submodule(layer).register_forward_pre_hook(
            lambda _, args, layer=layer: seen.update({layer: args[0]})
        )
    converted(x)
    for layer, operand in seen.items():
        module = converted.get_submodule(layer)
        found = gconv.explain(module, operand)
        recorded = next(c for c in result.convolutions if c.call.name == layer)
        assert found.call == recorded.call.convolution and found.backend == "aten"
        assert " x ".join(map(str, module(operand).shape)) in str(found)
        assert list(found.passes) == ["forward", "input_grad", "weight_grad"]


class Trimmed(nn.ConvTranspose1d):
    """An upsampler that cuts off outputs that depend on the future, as in vocoders."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(x, output_size)[..., : -self.stride[0]]


class Doubling(nn.ConvTranspose2d):
    """A layer that always doubles the size, and has attributes named ``function`` and ``kind``."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)
        self.function, self.kind = torch.tanh, "causal"

    def forward(self, x: Tensor) -> Tensor:
        return self.function(super().forward(x, [2 * size for size in x.shape[2:]]))


class Causal(nn.Conv1d):
    """A convolution padded on the left only."""

    function, kind = nn.Tanh(), "causal"

    def forward(self, x: Tensor) -> Tensor:
        assert self.kind == "causal"
        return self.function(super().forward(nn.functional.pad(x, (self.dilation[0] * 2, 0))))


class ByItself(nn.ConvTranspose1d):
    """A transposed convolution with a ``_conv_forward``, which only the other convolutions have."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, 2 * self.weight, self.bias)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return nn.functional.conv_transpose1d(x, weight, bias, groups=self.groups)


SUBCLASSES = {
    "trimmed": (lambda: Trimmed(4, 6, 4, stride=2, groups=2), (2, 4, 5)),
    "doubling": (lambda: Doubling(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 5, 4)),
    "causal": (lambda: Causal(4, 6, 3, groups=2), (2, 4, 9)),
}


@pytest.mark.parametrize(("make", "size"), SUBCLASSES.values(), ids=SUBCLASSES)
def test_subclasses_of_every_kind_keep_what_they_do(make: Callable[[], nn.Module], size: tuple) -> None:
    original = make().double()
    layer = copy.deepcopy(original)
    assert gconv.convert(layer, channels_last=False).converted and isinstance(layer, type(original))
    x = torch.randn(size, dtype=torch.float64)
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    for changed in (layer, copy.deepcopy(layer), torch.load(saved, weights_only=False)):
        with gconv.backend("reference"):
            ours = step(changed, x)
        assert isinstance(changed, tuple(kind.layer for kind in KINDS)) and hasattr(changed, "_gconv_kind")
        close(ours, step(original, x))
    assert gconv.revert(layer) == ("",) and type(layer) is type(original)
    close(step(layer, x), step(original, x))


def test_what_convert_cannot_take_is_left_with_the_reason() -> None:
    model = nn.Sequential(ByItself(4, 4, 3, groups=2), nn.ConvTranspose3d(4, 4, (1, 2, 2), groups=2))
    x = torch.randn(1, 4, 5)
    before = model[0](x)
    report = gconv.convert(model)
    assert not report.converted and torch.equal(model[0](x), before)
    assert [layer.reason for layer in report.skipped] == [
        "class ByItself computes the convolution itself: let its forward call super().forward(input)",
        "gconv doesn't support nn.ConvTranspose3d",
    ]
    assert "4 -> 4, 1x2x2, transposed" in str(report)


def test_explain_of_a_lazy_layer_says_what_to_do() -> None:
    with pytest.raises(
        ValueError, match="lazy and hasn't seen an input yet: call it once before explaining it"
    ):
        gconv.explain(nn.LazyConv1d(4, 3), torch.randn(1, 4, 9))
