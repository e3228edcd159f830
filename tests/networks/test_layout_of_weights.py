"""The layout of weights: ``convert`` moves them to channels_last, and ``revert`` back."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import zoo
from convolutions import grouped_network
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import gconv
from gconv import dispatch


def small_timm() -> nn.Module:
    torch.manual_seed(3)
    return zoo.load("timm").create_model("regnetx_002", num_classes=5)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> list[float]:
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 3, 64, 64, generator=generator).double()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def is_channels_last(tensor: Tensor) -> bool:
    return tensor.stride(1) == 1 and tensor.is_contiguous(memory_format=torch.channels_last)


def test_a_contiguous_network_runs_in_channels_last_and_trains_on() -> None:
    """Outputs, gradients, state dicts and momenta of an optimizer after some steps; then revert."""
    model = small_timm().double()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (model, twin)]
    assert train(model, optimizers[0], 2, 1) == train(twin, optimizers[1], 2, 1)
    before = {key: (id(value), value.clone()) for key, value in twin.state_dict(keep_vars=True).items()}

    report = gconv.convert(twin)

    moved = [m for m in twin.modules() if isinstance(m, nn.Conv2d)]
    assert "weights moved to channels_last, and activations follow" in str(report)
    assert all(is_channels_last(m.weight) for m in moved)
    for key, value in twin.state_dict(keep_vars=True).items():
        assert id(value) == before[key][0] and torch.equal(value, before[key][1]), key
    layouts: list[bool] = []
    for module in twin.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_hook(lambda _, args, y: layouts.append(is_channels_last(y)))
    losses = [train(m, optimizer, 3, 2) for m, optimizer in zip((model, twin), optimizers, strict=True)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert len(layouts) > 50 and all(layouts)
    assert all(is_channels_last(m.weight.grad) for m in moved)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[key], value)
    model.load_state_dict(twin.state_dict())
    twin.load_state_dict(model.state_dict())
    assert all(is_channels_last(m.weight) for m in moved)

    gconv.revert(twin)
    assert [m.weight.stride() for m in moved] == [
        m.weight.stride() for m in model.modules() if isinstance(m, nn.Conv2d)
    ]
    x = torch.randn(2, 3, 64, 64).double()
    assert torch.equal(model.eval()(x), twin.eval()(x))


def test_weights_stay_where_the_user_or_nothing_asks_to_move_them() -> None:
    kept, dense = grouped_network(), nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8))
    last = grouped_network().to(memory_format=torch.channels_last)
    strides = [p.stride() for p in last.parameters()]
    for model, options in ((kept, {"channels_last": False}), (dense, {}), (last, {})):
        report = gconv.convert(model, **options)
        assert report.layout == "", "nothing changed, so the report has nothing to say"
    assert all(p.is_contiguous() for m in (kept, dense) for p in m.parameters())
    gconv.revert(last)
    spatial = [i for i, p in enumerate(last.parameters()) if p.ndim == 4 and p.shape[2:] != (1, 1)]
    after = [p.stride() for p in last.parameters()]
    assert [after[i] for i in spatial] == [strides[i] for i in spatial], "they were channels_last before"


FUSED = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, fused=True),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 0.01, fused=True),
}


@pytest.mark.parametrize("begun", [True, False], ids=["begun", "first step"])
@pytest.mark.parametrize("make", FUSED.values(), ids=FUSED)
def test_a_fused_optimiser_finds_gradients_and_its_state_in_the_layout_of_the_weights(
    make: Callable, begun: bool
) -> None:
    """It reads them in memory order whatever their strides, and would silently mix them up."""
    model = grouped_network().double()
    twin = copy.deepcopy(model)
    optimizers = [make(m.parameters()) for m in (model, twin)]
    x = torch.randn(3, 2, 3, 9, 9, dtype=torch.float64)
    for step, images in enumerate(x):
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad(set_to_none=False)
            m(images).square().sum().backward()
            if m is twin and step == int(begun):
                assert gconv.convert(twin).layout, "between backward and step"
            optimizer.step()
    gconv.revert(twin)
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        m(x[0]).square().sum().backward()
        optimizer.step()
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == theirs.stride()


def test_optimisers_and_wrappers_that_were_never_finished_are_no_obstacle() -> None:
    broken = [object.__new__(torch.optim.SGD), object.__new__(torch.nn.parallel.DistributedDataParallel)]
    assert gconv.convert(grouped_network()).layout and len(broken) == 2


def test_conversion_in_inference_mode_leaves_a_model_that_trains() -> None:
    model = grouped_network()
    for change in (gconv.convert, gconv.revert):
        with torch.inference_mode():
            change(model)
        model(torch.randn(1, 3, 9, 9)).sum().backward()


def test_modules_that_share_a_weight_keep_its_layout_together() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 8, 3, groups=4))
    model[1].weight = model[0].weight
    gconv.convert(model)
    assert model[0].weight is model[1].weight and is_channels_last(model[0].weight)
    last = nn.Sequential(model[1])
    gconv.revert(last)
    assert last[0].weight.is_contiguous()


def in_a_flat_buffer() -> nn.Conv2d:
    layer = nn.Conv2d(8, 8, 3, groups=4)
    buffer = torch.zeros(layer.weight.numel() + 8)
    layer.weight.data = buffer[8:].view_as(layer.weight).copy_(layer.weight.data)
    return layer


def in_shared_memory() -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, groups=4).share_memory()


def parametrised() -> nn.Conv2d:
    return parametrizations.weight_norm(nn.Conv2d(8, 8, 3, groups=4))


@pytest.mark.parametrize("make", [in_a_flat_buffer, in_shared_memory, parametrised])
def test_a_weight_that_others_hold_or_make_is_not_moved(make: Callable[[], nn.Conv2d]) -> None:
    layer, x = make(), torch.randn(2, 8, 5, 5)
    places, expected = [p.data_ptr() for p in layer.parameters()], layer(x)
    report = gconv.convert(layer)
    assert report.converted and not report.layout
    assert [p.data_ptr() for p in layer.parameters()] == places
    torch.testing.assert_close(layer(x), expected)


def test_the_report_says_who_runs_each_layer_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it is PyTorch; on a GPU ``auto`` decides, for large batches in channels_last."""
    model = nn.Sequential(nn.Conv2d(64, 64, 3, groups=16), nn.Conv2d(64, 64, 5, groups=16))
    report = gconv.convert(model)
    text = str(report)
    assert text.count("PyTorch\n") == 2 and "PyTorch: gconv has no kernels for cpu" in text
    assert "small batches" not in text

    def decide(pass_: str, device: torch.device, layout: str, dtype: torch.dtype, geometry: object) -> object:
        assert (device.type, layout) == ("cuda", "channels_last")
        taken = geometry.weight_size[2] == 3 and dtype != torch.float32
        taken = taken and (pass_ == "forward" or dtype == torch.float16)
        return dispatch.Decision("triton" if taken else "aten", "not known to be faster", 100.0)

    monkeypatch.setattr("gconv.networks.reports.this_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(dispatch, "decide_by_auto", decide)
    lines = str(report).splitlines()
    assert lines[1].endswith("gconv's kernels: bfloat16 (forward); float16")
    assert lines[2].endswith("PyTorch") and "PyTorch: not known to be faster" in lines
    assert lines[-1].startswith("small batches run on PyTorch; gconv.profile(model, x)")
