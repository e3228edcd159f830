"""The limits of ``gconv.fuse``: hooks, modes, modules that can't be traced."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zoo
from fusing import Branch, assert_same, counts, trained
from torch import Tensor, nn

import gconv


class Depends(nn.Module):
    """A module that can't be traced, because its path depends on values; its submodules can."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Branch(nn.ReLU()), Branch(nn.SiLU())
        self.conv, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return self.one(x) if x.sum() > 0 else self.two(x)


def test_what_cannot_be_traced_stays_as_it_is() -> None:
    model = trained(nn.Sequential(Branch(), Depends()))
    fused, report = gconv.fuse(model)
    assert counts(report) == (2, 5, 0, 1)
    assert list(report.not_traced) == ["1"] and "control flow" in report.not_traced["1"]
    assert "not traced: 1: " in str(report)
    for sign in (1, -1):
        assert_same(model, fused, sign * torch.rand(2, 8, 6, 5, dtype=torch.float64))
    with pytest.raises(
        RuntimeError, match=r"the model can't be traced: TraceError: .*; fuse its submodules instead"
    ):
        gconv.fuse(model[1])


def test_what_a_module_without_a_graph_shares_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), Depends())
    model[2].conv = model[0]
    fused, report = gconv.fuse(trained(model))
    assert report.not_folded["1"] == "the convolution is called more than once"
    for sign in (1, -1):
        assert_same(model, fused, sign * torch.rand(2, 8, 6, 5, dtype=torch.float64))


def test_every_norm_that_stays_has_a_reason() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8))
    _, report = gconv.fuse(trained(model))
    assert report.folded == ["1"]
    assert report.not_folded == {"3": "something else runs between it and the convolution"}


def test_what_torch_fx_cannot_even_call_is_refused() -> None:
    class Calls(Branch):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(super().forward(x) if self.inner(x, object()).sum() > 0 else x)

    model = Calls()
    model.inner = Depends()
    model.inner.forward = lambda x, _: x
    with pytest.raises(RuntimeError, match="the model can't be traced"):
        gconv.fuse(trained(model))


def test_hooks_and_replaced_forwards_go_on() -> None:
    x, seen = torch.randn(2, 8, 6, 5, dtype=torch.float64), []
    for watch in (
        lambda m: m[0].register_forward_hook(lambda *_: seen.append("block")),
        lambda m: m[0].norm2.register_forward_pre_hook(lambda *_: seen.append("norm")),
        lambda m: m[0].last.register_forward_hook(lambda _m, _x, y: seen.append("conv") or 2 * y),
        lambda m: setattr(m[0].norm2, "forward", lambda y: seen.append("forward") or 3 * y),
    ):
        model = trained(nn.Sequential(Branch(), nn.ReLU()))
        watch(model)
        fused, report = gconv.fuse(model)
        assert report.not_folded
        assert_same(model, fused, x)
    assert seen == ["block", "block", "norm", "norm", "conv", "conv", "forward", "forward"]
    model = trained(Branch())
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(
        ValueError,
        match="the model has hooks or a replaced forward, which fuse would lose: fuse its submodules",
    ):
        gconv.fuse(model)


def test_optional_inputs_keep_their_defaults() -> None:
    class Masked(Branch):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            y = super().forward(x)
            return y if mask is None else y * mask

    model = trained(Masked())
    fused, _ = gconv.fuse(model)
    assert_same(model, fused, torch.randn(2, 8, 6, 5, dtype=torch.float64))


def test_an_example_shows_a_trace_that_took_another_path() -> None:
    class Flattering(Branch):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if isinstance(x, torch.fx.Proxy) else 2 * super().forward(x)

    model, x = trained(Flattering()), torch.randn(2, 8, 6, 5, dtype=torch.float64)
    gconv.fuse(model)
    with pytest.raises(
        RuntimeError, match=r"the fused network has an error of .*: the model takes another path than"
    ):
        gconv.fuse(model, x)
    gconv.fuse(trained(Branch()), x)


def test_training_mode_is_refused_by_name() -> None:
    model = trained(Branch())
    model.norm2.train()
    with pytest.raises(ValueError, match=r"layer 'norm2' is in training mode: call .eval\(\) first"):
        gconv.fuse(model)
    with pytest.raises(ValueError, match="the model is in training mode"):
        gconv.fuse(Branch())
    with pytest.raises(TypeError, match="model must be an nn"):
        gconv.fuse(F.relu)


def test_depthwise_can_be_left() -> None:
    model = trained(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU()))
    assert counts(gconv.fuse(model)[1]) == (1, 0, 1, 0)
    assert counts(gconv.fuse(model, depthwise=False)[1]) == (1, 0, 0, 0)


def test_classes_that_do_more_than_convolve_are_left() -> None:
    class Doubling(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    standardised = zoo.load("timm").layers.ScaledStdConv2d
    for conv in (Doubling(8, 8, 3, groups=2), standardised(8, 8, 3, groups=2)):
        model = trained(nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU()))
        fused, report = gconv.fuse(model)
        assert counts(report) == (0, 1, 0, 0) and "does more than" in str(report)
        assert_same(model, fused, torch.randn(2, 8, 6, 5, dtype=torch.float64))
    model = trained(nn.Sequential(standardised(8, 8, 3, groups=2), nn.ReLU()))
    fused, report = gconv.fuse(model)
    assert counts(report) == (0, 0, 1, 0)
    assert_same(model, fused, torch.randn(2, 8, 6, 5, dtype=torch.float64))
