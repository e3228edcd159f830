"""The ResNeXt family: parameters, state dicts, the three forms of the block, complexity."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gconv
import resnext
from resnext import Bottleneck, ResNeXt, complexity, forms
from resnext.model import VARIANTS

# The numbers of torchvision; for CIFAR the paper gives three digits (34.4M, 68.1M).
PARAMETERS = {
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "resnext101_64x4d": 83_455_272,
    "resnext29_8x64d": 34_426_698,
    "resnext29_16x64d": 68_155_210,
}


def on_meta(name: str, **options: object) -> ResNeXt:
    with torch.device("meta"):
        return VARIANTS[name](**options)


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_to_the_last_one(name: str) -> None:
    assert complexity.parameter_count(on_meta(name)) == PARAMETERS[name]
    assert getattr(resnext, name) is VARIANTS[name]


def torchvision_state(
    layers: tuple[int, ...], groups: int, width_per_group: int
) -> dict[str, tuple[int, ...]]:
    """Return the keys and shapes of a ResNet's state dict in torchvision, derived from its structure."""

    def conv(name: str, out: int, into: int, size: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, into, size, size)}

    def norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
        vectors = ("weight", "bias", "running_mean", "running_var")
        return {**{f"{name}.{v}": (channels,) for v in vectors}, f"{name}.num_batches_tracked": ()}

    state = {**conv("conv1", 64, 3, 7), **norm("bn1", 64)}
    channels = 64
    for stage, blocks in enumerate(layers):
        planes = 64 * 2**stage
        width, out = int(planes * width_per_group / 64) * groups, 4 * planes
        for i in range(blocks):
            name = f"layer{stage + 1}.{i}"
            state |= conv(f"{name}.conv1", width, channels, 1) | norm(f"{name}.bn1", width)
            state |= conv(f"{name}.conv2", width, width // groups, 3) | norm(f"{name}.bn2", width)
            state |= conv(f"{name}.conv3", out, width, 1) | norm(f"{name}.bn3", out)
            if i == 0:
                state |= conv(f"{name}.downsample.0", out, channels, 1) | norm(f"{name}.downsample.1", out)
            channels = out
    return state | {"fc.weight": (1000, 2048), "fc.bias": (1000,)}


@pytest.mark.parametrize(
    ("name", "layers", "groups", "width"),
    [
        ("resnet50", (3, 4, 6, 3), 1, 64),
        ("resnext50_32x4d", (3, 4, 6, 3), 32, 4),
        ("resnext101_32x8d", (3, 4, 23, 3), 32, 8),
        ("resnext101_64x4d", (3, 4, 23, 3), 64, 4),
    ],
)
def test_keys_order_and_sizes_are_torchvisions(name: str, layers: tuple, groups: int, width: int) -> None:
    ours = [(key, tuple(tensor.shape)) for key, tensor in on_meta(name).state_dict().items()]
    assert ours == list(torchvision_state(layers, groups, width).items())


def test_state_dict_of_plain_convolutions_loads_and_gives_the_same() -> None:
    """Strict loading between a network of nn.Conv2d, as in torchvision, and ours, in both directions."""
    torch.manual_seed(1)
    ours = ResNeXt((1, 1, 1, 1), 8, 4, num_classes=5).eval()
    plain = ResNeXt((1, 1, 1, 1), 8, 4, num_classes=5).eval()
    for module in plain.modules():
        if isinstance(module, gconv.GroupConv2d):
            module.__class__ = nn.Conv2d
    x = torch.randn(2, 3, 32, 32)
    ours.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(ours(x), plain(x))
    gconv.convert(plain)
    plain.load_state_dict(ours.state_dict(), strict=True)
    assert torch.equal(ours(x), plain(x))


@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_network_trains_on_every_backend(backend: str) -> None:
    model = ResNeXt((1, 1, 1, 0), 4, 2, 3, in_channels=1, stem="small", stem_width=8)
    with gconv.backend(backend):
        model(torch.randn(4, 1, 12, 12)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_network_is_what_its_state_dict_and_the_paper_say(stem: str) -> None:
    """Compares with the same function, written in terms of the state dict."""
    model = ResNeXt((2, 1, 1, 0), 4, 2, 7, stem=stem, stem_width=8).double().eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) - (0.5 if tensor.ndim > 1 else -0.5))
    state = model.state_dict()

    def conv_norm(x: Tensor, conv: str, norm: str, **settings: int) -> Tensor:
        x = F.conv2d(x, state[f"{conv}.weight"], **settings)
        mean, var, weight, bias = (
            state[f"{norm}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias)

    x = torch.randn(2, 3, 40, 36, dtype=torch.float64)
    if stem == "imagenet":
        y = F.max_pool2d(conv_norm(x, "conv1", "bn1", stride=2, padding=3).relu(), 3, 2, 1)
    else:
        y = conv_norm(x, "conv1", "bn1", padding=1).relu()
    for stage, blocks in enumerate(model.repeats):
        for i in range(blocks):
            name, stride = f"layer{stage + 1}.{i}", 2 if stage and not i else 1
            z = conv_norm(y, f"{name}.conv1", f"{name}.bn1").relu()
            z = conv_norm(z, f"{name}.conv2", f"{name}.bn2", stride=stride, padding=1, groups=4).relu()
            z = conv_norm(z, f"{name}.conv3", f"{name}.bn3")
            if i == 0:
                y = conv_norm(y, f"{name}.downsample.0", f"{name}.downsample.1", stride=stride)
            y = (y + z).relu()
    expected = y.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]
    torch.testing.assert_close(model(x), expected)


def test_weights_start_at_the_deviation_of_he() -> None:
    """The deviation is sqrt(2 / fan out), where the fan out is that of one group."""
    model = ResNeXt((1, 1, 1, 1), 2, 32, stem_width=32)
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        fan_out = conv.out_channels * conv.weight[0, 0].numel()
        assert abs(conv.weight.std() / math.sqrt(2 / fan_out) - 1) < 0.1


def test_output_sizes_of_both_stems() -> None:
    for stem, size in (("imagenet", (1, 256, 2, 2)), ("small", (1, 256, 8, 8))):
        model = ResNeXt((1, 1, 1, 1), 4, 2, 7, stem=stem, stem_width=8).eval()
        x = torch.randn(1, 3, 64, 64)
        assert model.forward_features(x).shape == size
        assert model(x).shape == (1, 7)


def test_zero_init_residual_starts_each_block_as_its_shortcut() -> None:
    model = ResNeXt((2, 1, 1, 1), 4, 2, 7, stem_width=8, zero_init_residual=True).eval()
    x = torch.rand(2, 32, 6, 6)
    assert torch.equal(model.layer1[1](x), x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repeats": (3, 4, 6)}, r"repeats must have four entries, one for each stage, .*got 3: \(3, 4, 6\)"),
        ({"repeats": (3, 4, 6, 3, 2)}, "repeats must have four entries.*got 5"),
        ({"repeats": (3, 0, 6, 3)}, "repeats must be positive, except for trailing zeros, got"),
        ({"repeats": (0, 0, 0, 0)}, "repeats must be positive"),
        ({"repeats": (3, 4, -1, 0)}, "repeats must be positive"),
        ({"cardinality": 0}, "cardinality must be at least 1, got 0"),
        ({"base_width": -4}, "base_width must be at least 1, got -4"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"stem": "cifar"}, "stem must be one of 'imagenet', 'small', got 'cifar'"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResNeXt(**{"repeats": (1, 1, 1, 1), **arguments})


def block(stride: int, in_channels: int, cardinality: int = 4) -> Bottleneck:
    """Return a float64 block in which no number has its initial value, batch norm statistics included."""
    made = Bottleneck(in_channels, 32, cardinality, 3, stride).double()
    for tensor in itertools.chain(made.parameters(), made.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    for conv in (m for m in made.modules() if isinstance(m, nn.Conv2d)):
        nn.init.normal_(conv.weight, std=0.3)
    return made


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("cardinality", [1, 4])
@pytest.mark.parametrize(("stride", "in_channels"), [(1, 32), (1, 16), (2, 16), (2, 32)])
def test_three_forms_of_the_block_agree(
    stride: int, in_channels: int, cardinality: int, training: bool
) -> None:
    grouped = block(stride, in_channels, cardinality).train(training)
    variants = [grouped, forms.split(grouped), forms.concatenate(grouped)]
    x = torch.randn(3, in_channels, 7, 6, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(forms.split(grouped)(x))
    results = []
    for form in variants:
        output = form(x)
        output.backward(grad)
        carried = form if form is grouped else forms.group(form)
        results.append([output, x.grad, *gradients_as_grouped(form), *carried.state_dict().values()])
        x.grad = None
    for ours in results[1:]:
        for one, other in zip(ours, results[0], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def gradients_as_grouped(form: nn.Module) -> list[Tensor]:
    """Return the gradients of ``form``, arranged as `forms.group` arranges its weights."""
    twin = copy.deepcopy(form)
    with torch.no_grad():
        for weight, parameter in zip(twin.parameters(), form.parameters(), strict=True):
            weight.copy_(parameter.grad)
    grouped = twin if isinstance(twin, Bottleneck) else forms.group(twin)
    return [p.detach() for p in grouped.parameters()]


def test_paper_facts_of_the_structure_table() -> None:
    """Table 1 of the paper: 25.5M parameters and 4.1 GFLOPs against 25.0M and 4.2."""
    facts = {"resnet50": (25.5, 4.1), "resnext50_32x4d": (25.0, 4.2)}
    for name, (parameters, flops) in facts.items():
        stages = complexity.stages(on_meta(name))
        assert [s.name for s in stages] == ["conv1", "conv2", "conv3", "conv4", "conv5", "fc"]
        assert [s.output[-1] for s in stages] == [112, 56, 28, 14, 7, 1000]
        assert [s.repeats for s in stages] == [1, 3, 4, 6, 3, 1]
        assert sum(s.parameters for s in stages) == PARAMETERS[name]
        assert abs(sum(s.parameters for s in stages) / 1e6 - parameters) < 0.06
        assert abs(sum(s.flops for s in stages) / 1e9 - flops) < 0.05
    assert stages[1].layers == ("1x1, 128", "3x3, 128, C=32", "1x1, 256")
    assert stages[2].layers == ("1x1, 256", "3x3, 256, C=32", "1x1, 512"), (
        "those of the blocks without a stride"
    )


def test_paper_facts_of_equal_complexity() -> None:
    """Table 2 of the paper: widths, about 70k parameters and 0.22 GFLOPs per block."""
    assert list(complexity.EQUAL_COMPLEXITY.items()) == [(1, 64), (2, 40), (4, 24), (8, 14), (32, 4)]
    for c, d in complexity.EQUAL_COMPLEXITY.items():
        parameters, flops = complexity.block_complexity(c, d)
        assert complexity.matching_width(c) == d
        assert parameters == c * (256 * d + 9 * d * d + 256 * d)
        assert flops == parameters * 56 * 56
        assert abs(parameters / 70_000 - 1) < 0.03 and abs(flops / 0.22e9 - 1) < 0.03


def test_complexity_is_counted_on_the_modules_and_leaves_them_alone() -> None:
    model = ResNeXt((1, 2, 0, 0), 4, 2, 10, in_channels=1, stem="small", stem_width=8)
    rows = complexity.stages(model, (20, 12))
    assert [row.output for row in rows] == [(8, 20, 12), (32, 20, 12), (64, 10, 6), (10,)]
    convs = [m for m in model.layer1.modules() if isinstance(m, nn.Conv2d)]
    assert rows[1].flops == 20 * 12 * sum(conv.weight.numel() for conv in convs)
    assert rows[1].parameters == complexity.parameter_count(model.layer1)
    assert model.training and model.conv1.weight.device.type == "cpu"
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        complexity.stages(model, 0)
