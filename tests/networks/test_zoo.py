"""``convert`` on the networks of timm and torchvision."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
import zoo
from torch import Tensor, nn

import gconv
from gconv.torch_internals import ConvolutionBase

# One network of each family and each design of the block around the convolution, with its image size.
NETWORKS = {
    "bat_resnext26ts": 256,
    "cpubone_nano": 64,
    "cs3sedarknet_xdw": 64,
    "cspresnext50": 64,
    "dla46x_c": 64,
    "dla60_res2next": 64,
    "dm_nfnet_f0": 64,
    "dpn48b": 64,
    "dpn68": 64,
    "eca_botnext26ts_256": 64,
    "eca_halonext26ts": 256,
    "eca_nfnet_l0": 64,
    "ecaresnext26t_32x4d": 64,
    "efficientnet_b0_g16_evos": 64,
    "efficientnet_b0_g8_gn": 64,
    "efficientvit_b0": 64,
    "efficientvit_l1": 64,
    "gcresnext26ts": 64,
    "haloregnetz_b": 224,
    "legacy_seresnext26_32x4d": 64,
    "mobilenet_edgetpu_v2_xs": 64,
    "nextvit_small": 64,
    "nf_regnet_b0": 64,
    "regnetv_040": 64,
    "regnetx_002": 64,
    "regnety_002": 64,
    "regnetz_b16": 64,
    "regnetz_b16_evos": 64,
    "repvgg_b1g4": 64,
    "res2next50": 64,
    "resnest14d": 64,
    "resnext50_32x4d": 64,
    "seresnext26d_32x4d": 64,
    "skresnext50_32x4d": 64,
    "test_nfnet": 64,
    "visformer_tiny": 64,
    # depthwise only
    "convnext_atto": 64,
    "mixnet_s": 64,
    "mobilenetv4_conv_small": 64,
    "tf_efficientnet_b0": 65,
    "torchvision/mobilenet_v3_small": 64,
    "torchvision/shufflenet_v2_x0_5": 64,
    # in torchvision's Conv2dNormActivation
    "torchvision/regnet_y_400mf": 64,
}
SLOW = {
    "bat_resnext26ts",
    "cs3sedarknet_xdw",
    "cspresnext50",
    "dla60_res2next",
    "dm_nfnet_f0",
    "eca_halonext26ts",
    "eca_nfnet_l0",  # of test_nfnet's classes
    "ecaresnext26t_32x4d",
    "efficientvit_l1",
    "haloregnetz_b",
    "legacy_seresnext26_32x4d",
    "nextvit_small",
    "regnetv_040",
    "repvgg_b1g4",
    "res2next50",
    "seresnext26d_32x4d",
    "skresnext50_32x4d",
}


def create(name: str, size: int) -> nn.Module:
    library, _, name = name.rpartition("/")
    if library:
        return zoo.load("torchvision.models").get_model(name, num_classes=5)
    fixed = zoo.load("timm").models.get_pretrained_cfg_value(name, "fixed_input_size")
    options = {"img_size": size} if fixed else {}
    return zoo.load("timm").create_model(name, num_classes=5, **options)


def train_step(model: nn.Module, size: int) -> dict[str, Tensor]:
    """Return output and gradients on three random images; random numbers are the same each time."""
    torch.manual_seed(7)
    y = model(torch.randn(3, 3, size, size, dtype=torch.float64))
    y.square().sum().backward()
    return {"output": y.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, id=name, marks=[pytest.mark.long] * (name in SLOW))
        for name, size in NETWORKS.items()
    ],
)
def test_converted_networks_train_as_the_original(name: str, size: int) -> None:
    """On the reference backend, which shares no code with PyTorch's convolutions.

    Compared with the original in channels_last, because some gradients are only rounding errors, which change
    with the layout.
    """
    model = create(name, size).double().train()
    twin = copy.deepcopy(model)
    classes = [type(module) for module in twin.modules()]
    report = gconv.convert(twin, depthwise=True)
    assert report.converted and {layer.reason for layer in report.skipped} <= {"dense: groups=1"}
    with gconv.backend("reference"):
        ours = train_step(twin, size)
    expected = train_step(model.to(memory_format=torch.channels_last), size)
    assert ours.keys() == expected.keys()
    largest = max(tensor.abs().max().item() for tensor in expected.values())
    for key in expected:  # some gradients are only rounding errors: of a bias before a batch norm
        torch.testing.assert_close(
            ours[key], expected[key], rtol=1e-7, atol=1e-12 * largest, msg=lambda m, key=key: f"{key}: {m}"
        )
    assert len(gconv.revert(twin)) == len(report.converted)
    assert [type(module) for module in twin.modules()] == classes


@pytest.mark.long
def test_every_grouped_convolution_of_timm_is_swapped() -> None:
    """And each skipped one has its reason; the README quotes the totals."""
    timm, total = zoo.load("timm"), Counter()
    for name in timm.list_models():
        with torch.device("meta"):
            model = timm.create_model(name)
        keys = list(model.state_dict())
        counted = Counter(
            "dense" if m.groups == 1 else "depthwise" if m.groups == m.in_channels else "grouped"
            for m in dict.fromkeys(model.modules())
            if isinstance(m, ConvolutionBase)
        )
        report = gconv.convert(model)
        reasons = Counter(layer.reason.partition(":")[0] for layer in report.skipped)
        assert reasons == {k: n for k, n in counted.items() if k != "grouped"}, (name, reasons)
        assert len(report.converted) == counted["grouped"], name
        assert len(gconv.convert(model, depthwise=True).converted) == counted["depthwise"], name
        assert list(model.state_dict()) == keys
        total += counted
        total["networks"] += 1
        total["networks with grouped"] += counted["grouped"] > 0
    if timm.__version__ == "1.0.31":
        assert (total["networks"], total["networks with grouped"], total["grouped"]) == (1371, 161, 4669)
    assert total["grouped"] > 4000
