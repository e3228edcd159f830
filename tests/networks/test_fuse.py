"""``gconv.fuse``: the same outputs with fewer operators, and its report."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import zoo
from fusing import Branch, assert_same, counts, trained
from marks import interpreted
from torch import Tensor, nn

import gconv
from gconv.networks.rewrite import fold
from resnext import ResNeXt, resnext50_32x4d

# Numbers of batch norms folded and not folded, and of activations and residuals fused.
NETWORKS = {
    "torchvision/resnext50_32x4d": (53, 0, 16, 0),
    "torchvision/regnet_y_400mf": (53, 0, 16, 0),
    "torchvision/mobilenet_v2": (52, 0, 17, 0),
    "torchvision/mobilenet_v3_small": (34, 0, 11, 0),
    "torchvision/mnasnet0_5": (52, 0, 17, 0),
    "torchvision/shufflenet_v2_x0_5": (56, 0, 0, 0),  # no activation follows its depthwise convolutions
    "torchvision/efficientnet_b0": (49, 0, 16, 0),
    "resnext26ts": (31, 0, 8, 0),
    "seresnext26d_32x4d": (31, 0, 8, 0),
    "regnetx_002": (44, 0, 13, 0),
    "regnety_004": (53, 0, 16, 0),
    "regnetz_b16": (68, 0, 22, 0),
    "mobilenetv3_small_050": (34, 0, 11, 0),
    "tf_mobilenetv3_small_075": (34, 0, 11, 0),  # Conv2dSame
    "resnest14d": (23, 0, 4, 0),
    "repvgg_b1g4": (56, 23, 0, 13),  # branches that end in a sum, some with only a batch norm
    "dpn48b": (33, 21, 16, 0),  # norms before the convolutions
    "nf_regnet_b0": (0, 0, 0, 0),  # no norms
}


def create(name: str) -> nn.Module:
    library, _, name = name.rpartition("/")
    if library:
        return zoo.load("torchvision.models").get_model(name, weights=None)
    return zoo.load("timm").create_model(name)


LONG = ("mnasnet0_5", "efficientnet_b0", "regnetx_002", "regnetz_b16", "mobilenetv3_small_050", "dpn48b")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.long] * n.endswith(LONG)) for n in NETWORKS]
)
def test_real_networks_put_out_the_same(name: str) -> None:
    model = trained(create(name))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fused, report = gconv.fuse(model)
    assert counts(report) == NETWORKS[name] and not report.not_traced
    assert_same(model, fused, torch.randn(2, 3, 64, 64, dtype=torch.float64))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert not any(type(module) is gconv.GroupConv2d for module in model.modules())
    assert not any(parameter.requires_grad for parameter in fused.parameters())


def test_ours_fused_for_training_or_not() -> None:
    for option in (False, True):
        model = trained(ResNeXt((1, 1, 0, 0), 4, 4, 10, stem="small", stem_width=16, fused=option))
        fused, report = gconv.fuse(model)
        assert counts(report) == (9, 0, 2, 0)
        assert_same(model, fused, torch.randn(2, 3, 12, 12, dtype=torch.float64))


@pytest.mark.parametrize("backend", ["aten", "reference", pytest.param("triton", marks=interpreted)])
@pytest.mark.parametrize(
    "activation", [None, nn.ReLU(inplace=True), nn.ReLU6(), nn.SiLU(), nn.Hardswish()], ids=str
)
def test_the_closing_sum_and_activation_go_into_the_kernel(
    backend: str, activation: nn.Module | None
) -> None:
    model = trained(Branch(activation, inplace=True))
    fused, report = gconv.fuse(model)
    assert counts(report) == (2, 0, 0 if activation is None else 1, 1)
    operators = [node.op for node in fused.graph.nodes]
    assert operators == ["placeholder", "call_module", "call_function", "call_module", "output"]
    x = torch.randn(2, 8, 6, 5)
    with gconv.backend(backend), torch.no_grad():
        torch.testing.assert_close(fused.float()(x), model.float()(x), rtol=1e-4, atol=1e-4)


def test_a_sum_in_place_keeps_the_type_of_the_convolution() -> None:
    """A sum that isn't in place promotes the dtypes, as in the original model."""
    x = torch.randn(2, 8, 6, 5)
    for inplace, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        model = trained(Branch(nn.ReLU(), inplace=inplace)).float()
        fused, report = gconv.fuse(model)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found, right = fused(x), model(x)
        assert found.dtype == right.dtype == dtype and counts(report) == (2, 0, 1, 1)
        torch.testing.assert_close(found, right, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("swap", [False, True])
def test_both_orders_of_the_sum_are_known(swap: bool) -> None:
    model = trained(Branch(swap=swap))
    fused, report = gconv.fuse(model)
    assert counts(report) == (2, 0, 0, 1)
    assert_same(model, fused, torch.randn(2, 8, 6, 5, dtype=torch.float64))


class Odd(nn.Module):
    """A model that looks like a convolution with its norm, but isn't; ``how`` selects the difference."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(8, track_running_stats=how != "no statistics")
        self.other = nn.Conv2d(8, 8, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "broadcast":
            return x + self.conv(self.pool(x))
        y = self.conv(x)
        if self.how == "used twice":
            return self.norm(y) + y
        if self.how == "called twice":
            return self.norm(self.conv(F.relu(self.norm(y))))
        if self.how == "norm called twice":
            return self.norm(F.relu(self.norm(y)))
        if self.how == "broadcast the other way":
            return F.relu(y + self.pool(x))
        if self.how == "itself":
            return F.relu(y + y)
        if self.how == "scaled":
            return F.relu(torch.add(y, x, alpha=2))
        if self.how == "a view changed before the sum":
            y = self.conv(x)
            x.flatten(1).mul_(2)
            return y + x
        if self.how == "a size":
            return F.relu(y + x.size(2))
        if self.how == "by keyword":
            return self.norm(self.other(input=y)) + x
        if self.how == "into the other":
            z = self.other(x)
            z.add_(y)
            return z * self.other(z)
        if self.how == "weights read":
            return F.relu(self.norm(y)) * self.conv.weight.sum()
        if self.how == "a number":
            return F.relu(y + 1)
        if self.how == "changed before the sum":
            z = self.other(x.relu_())
            return F.relu(y + z)
        if self.how == "after another":
            return F.relu(self.norm(torch.sigmoid(y)))
        return F.relu(self.norm(y))  # "no statistics", "hooks"


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("used twice", (0, 1, 0, 0)),
        ("called twice", (0, 1, 0, 0)),
        ("norm called twice", (0, 1, 0, 0)),
        ("broadcast", (0, 0, 0, 1)),
        ("broadcast the other way", (0, 0, 1, 1)),
        ("itself", (0, 0, 0, 0)),
        ("scaled", (0, 0, 0, 0)),
        ("a view changed before the sum", (0, 0, 0, 0)),
        ("a size", (0, 0, 1, 1)),
        ("by keyword", (0, 1, 0, 0)),
        ("into the other", (0, 0, 0, 0)),
        ("weights read", (0, 1, 0, 0)),
        ("a number", (0, 0, 0, 0)),
        ("changed before the sum", (0, 0, 0, 0)),
        ("after another", (0, 1, 0, 0)),
        ("no statistics", (0, 1, 0, 0)),
        ("hooks", (0, 1, 0, 0)),
    ],
)
def test_what_only_looks_like_it_stays_as_it_is(how: str, expected: tuple[int, ...]) -> None:
    model = trained(Odd(how))
    if how == "hooks":
        model.conv.register_forward_hook(lambda *_: None)
    fused, report = gconv.fuse(model)
    assert counts(report) == expected, str(report)
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fused(x.clone()), model(x.clone()), rtol=1e-9, atol=1e-9)


def test_every_norm_that_stays_has_its_reason() -> None:
    for how in ("used twice", "called twice", "norm called twice", "after another", "no statistics"):
        _, report = gconv.fuse(trained(Odd(how)))
        (reason,) = report.not_folded.values()
        assert reason, how


@torch.fx.wrap
def doubled(x: Tensor) -> Tensor:
    return x.mul_(2)


def hooked(module: nn.Module, hook: Callable[..., object]) -> nn.Module:
    module.register_forward_hook(hook)
    return module


torch.library.define("gconv_test::double", "(Tensor(a!) x) -> Tensor(a!)")
torch.library.impl("gconv_test::double", "cpu", lambda x: x.mul_(2))
WRITES = {
    "an operator": lambda: lambda x: torch.ops.gconv_test.double(x),
    "out": lambda: lambda x: torch.add(x, 1, out=x),
    "a wrapped function": lambda: lambda x: doubled(x),
    "in a module with a hook": lambda: hooked(nn.Sequential(nn.ReLU(inplace=True)), lambda *_: None),
    "in a hook": lambda: hooked(nn.Sigmoid(), lambda _, inputs, y: y + inputs[0].mul_(2)),
    "in a hook of a convolution": lambda: hooked(
        nn.Conv2d(8, 8, 1), lambda _, inputs, y: y + inputs[0].mul_(2)
    ),
}


@pytest.mark.parametrize("where", WRITES)
def test_a_sum_stays_behind_what_may_write_into_the_input_of_the_convolution(where: str) -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.write = nn.Conv2d(8, 8, 3, padding=1, groups=2), WRITES[where]()

        def forward(self, x: Tensor) -> Tensor:
            x = 1 * x
            return self.conv(x) + self.write(x)

    model = trained(Writing())
    fused, report = gconv.fuse(model)
    assert counts(report)[3] == 0 and "may write in place" in str(report)
    assert_same(model, fused, torch.randn(2, 8, 6, 5, dtype=torch.float64))


@pytest.mark.parametrize("added", [0.1, 1e300, 3, True])
def test_a_number_is_added_as_it_is(added: float) -> None:
    class Adding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=2)

        def forward(self, x: Tensor, added: float) -> Tensor:
            return self.conv(x) + added

    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = Adding().to(dtype).eval()
        fused, report = gconv.fuse(model)
        right, found = model(x.to(dtype), added), fused(x.to(dtype), added)
        assert counts(report)[3] == 1 and found.dtype == dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found, right, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("half", [True, False])
def test_a_norm_stays_if_its_fold_overflows_float16(half: bool) -> None:
    """Channels that hardly vary around 300: the bias would be 95,000, and the convolution take as much."""
    conv, norm = nn.Conv2d(8, 8, 3, groups=2, bias=False), nn.BatchNorm2d(8)
    with torch.no_grad():
        conv.weight.fill_(300 / 36)
        norm.running_mean.fill_(300)
        norm.running_var.fill_(0)
        norm.weight.fill_(-1)
    model, x = nn.Sequential(conv, norm).eval(), torch.ones(1, 8, 9, 9)
    if half:
        model, x = model.half(), x.half()
    fused, report = gconv.fuse(model)
    assert report.not_folded == {"1": "the folded weights or biases would be larger than float16 can hold"}
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(fused(x), model(x)) and fused(x).isfinite().all()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_fold(affine: bool, bias: bool) -> None:
    conv, norm = nn.Conv2d(4, 6, 3, bias=bias), nn.BatchNorm2d(6, affine=affine)
    model = trained(nn.Sequential(conv, norm))
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    right = model(x)
    assert fold(conv, norm)
    torch.testing.assert_close(conv(x), right)


def test_the_fused_network_is_copied_kept_and_compiled() -> None:
    model = trained(Branch(nn.ReLU()))
    fused, _ = gconv.fuse(model)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    for again in (copy.deepcopy(fused), torch.load(file, weights_only=False)):
        assert_same(model, again, x)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for backend in ("aten", "reference"):
        with gconv.backend(backend):
            assert_same(model, compiled, x)
    torch._dynamo.reset()


def test_fusing_again_changes_nothing() -> None:
    model = trained(Branch(nn.ReLU()))
    fused, _ = gconv.fuse(model)
    again, report = gconv.fuse(fused)
    assert counts(report) == (0, 0, 0, 0)
    assert_same(model, again, torch.randn(2, 8, 6, 5, dtype=torch.float64))


def test_half_precision_folds_in_full() -> None:
    model = trained(Branch(nn.ReLU())).to(torch.bfloat16)
    fused, _ = gconv.fuse(model)
    x = torch.randn(2, 8, 6, 5).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=5e-2, atol=5e-2)
    assert {parameter.dtype for parameter in fused.parameters()} == {torch.bfloat16}


def test_report_reads_well() -> None:
    with torch.device("meta"):
        model = resnext50_32x4d().eval()
    _, report = gconv.fuse(model)
    lines = str(report).splitlines()
    assert lines[0].split() == [
        "layer",
        "geometry",
        "folded",
        "norm",
        "fused",
        "into",
        "kernel",
        "not",
        "fused",
        "because",
    ]
    assert lines[3].split() == ["layer1.0.conv2", "128", "->", "128,", "3x3", "layer1.0.bn2", "relu"]
    assert lines[-2:] == [
        "folded 53 of 53 batch norms",
        "fused 16 activations and 0 residuals into grouped convolutions",
    ]
