"""``ResNeXt(fused=True)`` trains, evaluates and compiles like the unfused network."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from marks import interpreted
from sandwiches import WAYS, assert_alike
from torch import nn

import gconv
from resnext import ResNeXt


def networks(**options: object) -> tuple[ResNeXt, ResNeXt]:
    """Return the same small network, fused and unfused."""
    arguments = ((1, 2, 0, 0), 4, 4, 5)
    made = [
        ResNeXt(*arguments, stem="small", stem_width=16, fused=fused, **options) for fused in (True, False)
    ]
    for module in made[1].modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    made[0].load_state_dict(made[1].state_dict())
    return tuple(network.to(memory_format=torch.channels_last) for network in made)


@pytest.fixture
def _reset() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("backend", "dtype", "part"),
    [WAYS[0], pytest.param(*WAYS[1].values, marks=[interpreted, pytest.mark.long])],
)
def test_a_fused_resnext_trains_as_the_unfused_one(
    backend: str, dtype: torch.dtype, part: float, fused_calls: list[str]
) -> None:
    """Compares outputs, all gradients and running statistics over several steps of SGD with momentum."""
    fused, plain = networks()
    fused, plain = fused.to(dtype), plain.double()
    optimizers = [torch.optim.SGD(net.parameters(), 0.02, momentum=0.9) for net in (fused, plain)]
    for _ in range(2):
        x, labels = torch.randn(4, 3, 8, 8, dtype=dtype), torch.randint(5, (4,))
        found = []
        for net, optimizer, image in ((fused, optimizers[0], x), (plain, optimizers[1], x.double())):
            optimizer.zero_grad()
            with gconv.backend(backend if net is fused else "aten"):
                logits = net(image)
                F.cross_entropy(logits, labels).backward()
            grads = {name: p.grad for name, p in net.named_parameters()}
            buffers = {name: b.clone() for name, b in net.named_buffers()}
            found.append({"logits": logits.detach(), **grads, **buffers})
        assert_alike(*found, part)
        for optimizer in optimizers:
            optimizer.step()
    assert len(fused_calls) == 6
    for net in (fused, plain):
        net.eval()
    with torch.no_grad():
        expected = plain(x.double())
        with gconv.backend(backend):
            assert_alike({"logits": fused(x)}, {"logits": expected}, part)


def test_another_activation_is_used_everywhere(fused_calls: list[str]) -> None:
    fused, plain = networks()
    for net in (fused, plain):
        for block in (*net.layer1, *net.layer2):
            block.relu = nn.GELU()
    x = torch.randn(2, 3, 8, 8)
    with gconv.backend("reference"):
        torch.testing.assert_close(fused(x), plain(x))
    assert not fused_calls


def test_state_dicts_are_alike() -> None:
    fused, plain = networks()
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert all(module.fused for module in fused.modules() if hasattr(module, "fused"))


@pytest.mark.usefixtures("_reset")
@pytest.mark.parametrize(
    ("compiler", "name"),
    [
        ("aot_eager", "reference"),
        ("aot_eager", "auto"),
        pytest.param("inductor", "reference", marks=pytest.mark.long),
    ],
)
def test_a_fused_resnext_compiles_whole(compiler: str, name: str) -> None:
    fused, plain = (net.double() for net in networks())
    compiled = torch.compile(fused, fullgraph=True, backend=compiler)
    x, found = torch.randn(3, 3, 8, 8, dtype=torch.float64), []
    for run, net, backend in ((compiled, fused, name), (plain, plain, "aten")):
        with gconv.backend(backend):
            y = run(x)
            y.square().sum().backward()
        grads = {name: p.grad for name, p in net.named_parameters()}
        found.append({"y": y.detach(), **grads, **dict(net.named_buffers())})
    assert_alike(*found, 1e-9)
