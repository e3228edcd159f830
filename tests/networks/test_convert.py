"""``convert`` and ``revert``: what is converted or skipped, and why; everything else is unchanged."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from convolutions import (
    Activated,
    ByItself,
    ByItselfDecorated,
    ChildOfByItself,
    Final,
    FromC,
    LazyForever,
    MadeWithArguments,
    OwnConvolution,
    Padded,
    PickledItsWay,
    grouped_network,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import gconv


def test_convert_swaps_grouped_convolutions_and_keeps_all_else() -> None:
    model = grouped_network().train()
    original = copy.deepcopy(model)
    seen: list[str] = []
    model[2].register_forward_hook(lambda *_: seen.append("hook"))
    before = {key: id(p) for key, p in model.named_parameters(remove_duplicate=False)}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    report = gconv.convert(model, depthwise=True)

    assert [layer.name for layer in report.converted] == ["1.0", "2", "3"]
    assert [layer.name for layer in report.skipped] == ["0", "5"]
    assert {key: id(p) for key, p in model.named_parameters(remove_duplicate=False)} == before
    assert list(model.state_dict()) == list(original.state_dict())
    assert all(type(model[i]) is gconv.GroupConv2d for i in (2, 3, 4)) and model[2] is model[4]
    x = torch.randn(2, 3, 9, 9)
    for name in ("aten", "reference"):
        with gconv.backend(name):
            torch.testing.assert_close(model(x), original(x))
    assert seen
    model(x).sum().backward()
    optimizer.step()
    assert not torch.equal(model[2].weight, original[2].weight)


def test_state_dicts_go_both_ways_strictly() -> None:
    plain, converted = grouped_network(), grouped_network()
    gconv.convert(converted)
    saved = io.BytesIO()
    torch.save(plain.state_dict(), saved)
    saved.seek(0)
    converted.load_state_dict(torch.load(saved, weights_only=True), strict=True)
    x = torch.randn(2, 3, 9, 9)
    plain.eval(), converted.eval()
    torch.testing.assert_close(plain(x), converted(x))
    other = grouped_network().eval()
    other.load_state_dict(converted.state_dict(), strict=True)
    assert torch.equal(other(x), plain(x))


def test_convert_says_what_it_left_and_why() -> None:
    model = nn.ModuleDict(
        {
            "dense": nn.Conv2d(8, 8, 3),
            "depthwise": nn.Conv2d(8, 16, 3, groups=8),
            "alone": ByItself(8, 8, 3, groups=2),
            "own": OwnConvolution(8, 8, 3, groups=2),
            "active": Activated(8, 8, 3, groups=2),
            "c": FromC(8, 8, 3, groups=2),
            "child": ChildOfByItself(8, 8, 3, groups=2),
            "decorated": ByItselfDecorated(8, 8, 3, groups=2),
            "pickled": PickledItsWay(8, 8, 3, groups=2),
            "made": MadeWithArguments(8, 8, 3, groups=2),
            "final": Final(8, 8, 3, groups=2),
            "forever": LazyForever(8, 3, groups=2),
            "prepared": nn.Conv2d(8, 8, 3, groups=2),
            "convolves": nn.Conv2d(8, 8, 3, groups=2),
            "kept": nn.Conv2d(8, 8, (3, 5), stride=(2, 1), groups=4),
            "done": gconv.GroupConv2d(8, 8, 3, groups=4),
            "patched": nn.Conv2d(8, 8, 3, groups=2),
            "lazy": nn.LazyConv2d(8, 3, groups=8),
            "fast": nn.Conv2d(8, 16, 3, stride=2, dilation=3, groups=4),
        }
    )
    model["patched"].forward = lambda x: x
    model["convolves"]._conv_forward = lambda x, weight, bias: x
    model["prepared"].qconfig = "some"
    report = gconv.convert(model, filter=lambda module, name: name != "kept")
    by_itself = (
        "computes the convolution itself: let its forward call self._conv_forward(input, weight, bias)"
    )
    assert {layer.name: layer.reason for layer in report.layers} == {
        "dense": "dense: groups=1",
        "depthwise": "depthwise: pass depthwise=True to convert it",
        "alone": f"class ByItself {by_itself}",
        "own": "class OwnConvolution has a custom _conv_forward",
        "active": "has an attribute named activation",
        "c": f"class FromC {by_itself}",
        "child": f"class ChildOfByItself {by_itself}",
        "decorated": f"class ByItselfDecorated {by_itself}",
        "pickled": "class PickledItsWay has custom pickling",
        "made": "class MadeWithArguments has custom pickling",
        "final": "class Final can't be subclassed: no subclasses, please",
        "forever": "can't tell which convolution class LazyForever will become",
        "prepared": "prepared for torch.ao.quantization, which needs its exact class",
        "convolves": "its forward was replaced",
        "kept": "excluded by filter",
        "done": "already a GroupConv2d",
        "patched": "its forward was replaced",
        "lazy": "may be depthwise: pass depthwise=True to convert it",
        "fast": "groups=4",
    }
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "geometry", "result", "reason", "backend", "here"]
    assert not any(line.startswith("dense") for line in lines)
    assert lines[14] == "kept       8 -> 8, 3x5, stride (2, 1)          skipped    excluded by filter"
    assert lines[17].startswith("lazy       ? -> 8, 3x3                         skipped")
    assert lines[18].startswith("fast       8 -> 16, 3x3, stride 2, dilation 3  converted  groups=4")
    assert lines[19] == "converted 1 of 19 convolutions; 1 dense (groups=1), not listed"
    assert not gconv.convert(model, filter=lambda module, name: name != "kept").converted
    alone = gconv.convert(nn.Conv2d(8, 8, 3))
    assert str(alone) == "converted 0 of 1 convolution; 1 dense (groups=1), not listed"


def test_depthwise_convolutions_are_swapped_on_request() -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3, groups=8), nn.LazyConv2d(16, 3, groups=16), nn.Conv2d(16, 1, 1))
    assert not gconv.convert(model).converted
    assert [layer.name for layer in gconv.convert(model, depthwise=True).converted] == ["0", "1"]


def test_settings_that_are_no_pairs_are_taken_as_conv2d_takes_them() -> None:
    layer, x = nn.Conv2d(8, 8, 3, groups=4), torch.randn(2, 8, 9, 9)
    layer.stride, layer.dilation, layer.padding = 2, (1,), 1
    expected = layer(x)
    assert "8 -> 8, 3x3, stride 2  converted" in str(gconv.convert(layer))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_what_quantisation_looks_for_is_left_to_it() -> None:
    quantization = torch.ao.quantization
    model = nn.Sequential(quantization.QuantStub(), nn.Conv2d(8, 8, 3, groups=4), quantization.DeQuantStub())
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(model.train(), inplace=True)
    (left,) = gconv.convert(model).skipped
    assert "torch.ao.quantization" in left.reason
    model(torch.randn(2, 8, 9, 9))
    assert "quantized" in type(quantization.convert(model.eval())[1]).__module__


def test_lazy_convolutions_become_group_convolutions_with_their_first_input() -> None:
    layer, x = nn.LazyConv2d(8, 3, groups=4), torch.randn(2, 12, 5, 5)
    assert "converted  groups=4" in str(gconv.convert(layer))
    assert gconv.convert(layer).skipped[0].reason == "already a GroupConv2d"
    twin = copy.deepcopy(layer)
    assert layer(x).shape == (2, 8, 3, 3) and type(layer) is gconv.GroupConv2d
    assert gconv.revert(layer) == ("",) and type(layer) is nn.Conv2d
    assert gconv.revert(twin) == ("",) and type(twin) is nn.LazyConv2d
    twin(x)
    assert type(twin) is nn.Conv2d and not gconv.revert(twin)


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 3


@pytest.mark.parametrize("parametrized_first", [True, False])
def test_parametrised_convolutions_stay_parametrised(parametrized_first: bool) -> None:
    x, layer = torch.randn(2, 8, 5, 5), Padded(8, 8, 3, groups=4)
    if not parametrized_first:
        gconv.convert(layer)
    parametrizations.weight_norm(layer)
    parametrize.register_parametrization(layer, "bias", Scaled())
    expected = layer(x)
    if parametrized_first:
        assert gconv.convert(layer).converted
    ran = count_calls(layer)
    assert torch.equal(layer(x), expected) and ran
    assert [key for key, _ in layer.named_parameters()] == [
        "parametrizations.weight.original0",
        "parametrizations.weight.original1",
        "parametrizations.bias.original",
    ]
    twin = copy.deepcopy(layer)
    assert gconv.revert(twin) == ("",) and type(twin).__name__ == "ParametrizedPadded"
    assert torch.equal(twin(x), expected) and not isinstance(twin, gconv.GroupConv2d)
    parametrize.remove_parametrizations(layer, "bias")
    assert torch.equal(layer(x), expected) and parametrize.is_parametrized(layer)
    parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(layer(x), expected)
    assert type(layer).__name__ == "GroupPadded"
    assert gconv.revert(layer) == ("",) and type(layer) is Padded


def count_calls(layer: nn.Module) -> list[int]:
    """Return a list that grows with each convolution that ``layer`` computes with gconv."""
    calls: list[int] = []
    original = type(layer)._conv_forward

    def counting(*args: Tensor) -> Tensor:
        calls.append(1)
        return original(layer, *args)

    assert original is gconv.GroupConv2d._conv_forward
    layer._conv_forward = counting
    return calls


def test_parametrized_weights_are_not_computed() -> None:
    """In training, spectral norm changes its buffers whenever the weight is read."""
    for layer in (nn.Conv2d(8, 8, 3, groups=2), nn.ConvTranspose2d(8, 4, 3, groups=2)):
        model = nn.utils.parametrizations.spectral_norm(layer).train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        (converted,) = gconv.convert(model).converted
        assert converted.large_call is not None
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("wrap", [nn.utils.spectral_norm, nn.utils.weight_norm], ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_made_by_hooks_are_still_made(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """After a change of their source: a cached weight would be the old one."""
    layer, x = wrap(nn.Conv2d(8, 8, 3, groups=4)).eval(), torch.randn(2, 8, 5, 5)
    source = next(p for name, p in layer.named_parameters() if name != "bias")
    with torch.no_grad():
        source.mul_(2)
        expected = layer(x)
        source.div_(2)
        layer(x)
        assert gconv.convert(layer).converted
        source.mul_(2)
        assert torch.equal(layer(x), expected)


def test_hooks_of_every_kind_stay() -> None:
    layer, ran = nn.Conv2d(4, 4, 3, groups=2), []
    layer.register_forward_pre_hook(lambda *_: ran.append("before"))
    layer.register_forward_hook(lambda *_: ran.append("after"))
    layer.register_full_backward_hook(lambda *_: ran.append("gradient"))
    layer.register_state_dict_post_hook(lambda *_: ran.append("state"))
    gconv.convert(layer)
    layer(torch.randn(1, 4, 5, 5, requires_grad=True)).sum().backward()
    layer.state_dict()
    assert ran == ["before", "after", "gradient", "state"]


def test_revert_leaves_layers_that_were_made_as_group_convolutions() -> None:
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3, groups=4), gconv.GroupConv2d(8, 8, 3, groups=4, activation="relu")
    )
    gconv.convert(model)
    before = copy.deepcopy(model[0].__dict__)
    assert gconv.revert(model) == ("0",)
    assert [type(layer) for layer in model] == [nn.Conv2d, gconv.GroupConv2d]
    assert model[0].__dict__.keys() == nn.Conv2d(8, 8, 3).__dict__.keys() < before.keys()
    assert not gconv.revert(model)


def test_revert_refuses_what_became_something_else() -> None:
    class Wrapped(gconv.GroupConv2d):
        pass

    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 8, 3, groups=4))
    gconv.convert(model)
    model[1].__class__ = Wrapped
    with pytest.raises(
        RuntimeError, match=r"layer '1' became a Wrapped after conversion: call gconv\.revert before"
    ):
        gconv.revert(model)
    assert type(model[0]) is gconv.GroupConv2d
    model[1].__class__ = Padded
    assert gconv.convert(model).converted[0].name == "1"


def test_revert_refuses_to_drop_an_activation() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 8, 3, groups=4))
    gconv.convert(model)
    model[1].activation = "relu"
    with pytest.raises(
        RuntimeError, match="layer '1' has activation='relu', which Conv2d lacks: set it to None"
    ):
        gconv.revert(model)
    assert all(isinstance(layer, gconv.GroupConv2d) for layer in model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_is_refused_before_and_after() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2))
    scripted = torch.jit.script(model)
    for function in (gconv.convert, gconv.revert):
        with pytest.raises(
            TypeError, match=r"TorchScript module, which can't be changed: convert before torch\.jit\.script"
        ):
            function(scripted)
    gconv.convert(model)
    with pytest.raises(RuntimeError, match=r"can't compile GroupConv2d: .* or after gconv\.revert, or use"):
        torch.jit.script(model)
    gconv.revert(model)
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(torch.jit.script(model)(x), model(x))


def test_convert_of_a_single_layer_and_of_no_module() -> None:
    layer = nn.Conv2d(8, 8, 3, groups=2)
    assert "(the model)" in str(gconv.convert(layer)) and isinstance(layer, gconv.GroupConv2d)
    assert str(gconv.convert(nn.Linear(2, 2))).startswith("the model has no convolution layers")
    with pytest.raises(TypeError, match=r"filter must be callable as filter\(module, name\), got str"):
        gconv.convert(nn.Linear(2, 2), filter="0")
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got function"):
        gconv.convert(lambda x: x)


def test_converted_modules_copy_and_pickle() -> None:
    layer = nn.Conv2d(8, 8, 3, groups=2)
    gconv.convert(layer)
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    x = torch.randn(1, 8, 5, 5)
    for twin in (copy.deepcopy(layer), torch.load(saved, weights_only=False)):
        assert type(twin) is gconv.GroupConv2d
        assert torch.equal(twin(x), layer(x))
