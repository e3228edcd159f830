"""``conv_between_norms`` returns the outputs, gradients and statistics of the modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from marks import interpreted
from sandwiches import WAYS, assert_alike, one_by_one, sandwich
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gconv
from gconv import dispatch


def draw(dtype: torch.dtype = torch.float64, channels: int = 8) -> Tensor:
    x = 2 * torch.randn(3, channels, 7, 6, dtype=dtype) + 5
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def step(run: Callable[..., Tensor], x: Tensor, modules: nn.Module, grad: Tensor) -> dict[str, Tensor]:
    """Return output, gradients and statistics of a training step."""
    modules.zero_grad()
    x = x.detach().requires_grad_()
    y = run(x, *modules)
    y.backward(grad.to(y.dtype))
    found = {"output": y.detach(), "input": x.grad}
    found |= {name: p.grad for name, p in modules.named_parameters() if p.grad is not None}
    return found | {name: buffer.detach().clone() for name, buffer in modules.named_buffers()}


@pytest.mark.parametrize(("backend", "dtype", "part"), WAYS)
@pytest.mark.parametrize(
    ("mode", "stride"),
    [("training", 1), ("training", 2), ("evaluation", 2), ("first frozen", 1), ("second frozen", 1)],
)
def test_outputs_gradients_and_statistics_are_those_of_the_modules(
    backend: str, dtype: torch.dtype, part: float, stride: int, mode: str, fused_calls: list[str]
) -> None:
    """Over several steps, so that the running statistics change."""
    modules = sandwich(stride=stride, bias=mode == "first frozen", dtype=dtype)
    modules.train(mode != "evaluation")
    if mode.endswith("frozen"):
        modules[0 if mode.startswith("first") else 2].eval()
    twin = copy.deepcopy(modules).double()
    for _ in range(3):
        x = draw(dtype)
        right_x, grad = x.detach().double(), torch.randn_like(one_by_one(x.double(), *copy.deepcopy(twin)))
        ours = step(lambda *a: gconv.conv_between_norms(*a, backend=backend), x, modules, grad)
        assert_alike(ours, step(one_by_one, right_x, twin, grad), part)
    assert len(fused_calls) == 3


def test_only_what_needs_a_gradient_gets_one(fused_calls: list[str]) -> None:
    modules = sandwich()
    for parameter in (modules[0].weight, modules[0].bias, modules[1].weight):
        parameter.requires_grad_(False)
    twin, x, grad = copy.deepcopy(modules), draw(), torch.randn(3, 8, 7, 6, dtype=torch.float64)
    ours = step(lambda *a: gconv.conv_between_norms(*a, backend="reference"), x, modules, grad)
    right = step(one_by_one, x, twin, grad)
    assert_alike(ours, right, 1e-9)
    assert "0.weight" not in ours and "2.weight" in ours and fused_calls


def test_training_between_the_two_passes_of_an_evaluation_leaves_its_gradients() -> None:
    modules, x = sandwich().eval(), draw()
    run = partial(gconv.conv_between_norms, backend="reference")
    grad = torch.randn_like(run(x, *modules))
    right = step(run, x, copy.deepcopy(modules), grad)["input"]
    y = run(x, *modules)
    modules.train()
    run(x.detach(), *modules)
    y.backward(grad)
    assert torch.equal(x.grad, right)


def test_gradients_are_exact() -> None:
    modules = sandwich(4, 2)
    parameters = [p.detach().clone().requires_grad_() for p in modules.parameters()]
    names = [name for name, _ in modules.named_parameters()]
    x = torch.randn(2, 4, 3, 4, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        for name, value in zip(
            names, values, strict=True
        ):  # not functional_call, which is part of torch.func
            at, _, attribute = name.partition(".")
            del modules[int(at)]._parameters[attribute]
            modules[int(at)]._parameters[attribute] = value
        return gconv.conv_between_norms(x, *modules, backend="reference")

    assert torch.autograd.gradcheck(run, (x, *parameters))


def test_the_second_derivative_is_refused() -> None:
    x = draw()
    y = gconv.conv_between_norms(x, *sandwich(), backend="reference")
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("operator", ["norm_forward", "norm_input_grad", "norm_weight_grad"])
def test_the_operators_refuse_gradients_that_they_do_not_have(operator: str) -> None:
    modules, x = sandwich(), draw()
    norm, weight = torch.ones(3, 8, dtype=torch.float64), modules[1].weight
    settings = ((1, 1), (1, 1, 1, 1), (1, 1), 2)
    arguments = {
        "norm_forward": (x, norm, weight, None, *settings),
        "norm_input_grad": (x, weight, x, norm, *settings),
        "norm_weight_grad": (x, x, norm, weight.shape, *settings, False),
    }[operator]
    with pytest.raises(RuntimeError, match=r"has no gradient: call gconv\.conv_between_norms instead"):
        getattr(torch.ops.gconv, operator)(*arguments, "reference")


@pytest.mark.parametrize("name", ["norm_forward", "norm_input_grad", "norm_weight_grad"])
def test_opcheck(name: str) -> None:
    x, weight = draw().detach(), sandwich()[1].weight.detach()
    norm, settings = torch.rand(3, 8, dtype=torch.float64), ((1, 1), (1, 1, 1, 1), (1, 1), 2)
    arguments = {
        "norm_forward": (x, norm, weight, None, *settings),
        "norm_input_grad": (x, weight, x, norm, *settings),
        "norm_weight_grad": (x, x, norm, weight.shape, *settings, True),
    }[name]
    result = torch.library.opcheck(getattr(torch.ops.gconv, name).default, (*arguments, "reference"))
    assert set(result.values()) == {"SUCCESS"}


def hooked(modules: nn.ModuleList) -> nn.ModuleList:
    modules[1].register_forward_hook(lambda *_: None)
    return modules


def synchronised(modules: nn.ModuleList) -> nn.ModuleList:
    modules.eval()  # its training needs a GPU
    return nn.SyncBatchNorm.convert_sync_batchnorm(modules)


def averaged(modules: nn.ModuleList) -> nn.ModuleList:
    modules[0].momentum = None
    return modules


def activated(modules: nn.ModuleList) -> nn.ModuleList:
    modules[1].activation = "relu"
    return modules


def reflected(modules: nn.ModuleList) -> nn.ModuleList:
    modules[1] = gconv.GroupConv2d(8, 8, 3, padding=1, groups=2, padding_mode="reflect").double()
    return modules


def without_affine(modules: nn.ModuleList) -> nn.ModuleList:
    modules[2] = nn.BatchNorm2d(8, affine=False).double()
    return modules


def without_statistics(modules: nn.ModuleList) -> nn.ModuleList:
    modules[2] = nn.BatchNorm2d(8, track_running_stats=False).double()
    return modules


def frozen_statistics(modules: nn.ModuleList) -> nn.ModuleList:
    modules[0].track_running_stats = False
    return modules


def without_counter(modules: nn.ModuleList) -> nn.ModuleList:
    modules[0].num_batches_tracked = None
    return modules


def with_backward_hook(modules: nn.ModuleList) -> nn.ModuleList:
    modules[0].register_full_backward_hook(lambda *_: None)
    return modules


def on_conv2d(modules: nn.ModuleList) -> nn.ModuleList:
    modules[1].__class__ = nn.Conv2d
    return modules


@pytest.mark.parametrize(
    "change",
    [
        hooked,
        synchronised,
        averaged,
        activated,
        reflected,
        without_affine,
        without_statistics,
        frozen_statistics,
        without_counter,
        with_backward_hook,
        on_conv2d,
    ],
)
def test_what_the_kernels_do_not_know_goes_through_the_modules(
    change: Callable[[nn.ModuleList], nn.ModuleList], fused_calls: list[str]
) -> None:
    modules = change(sandwich())
    twin, x, grad = copy.deepcopy(modules), draw(), torch.randn(3, 8, 7, 6, dtype=torch.float64)
    ours = step(lambda *a: gconv.conv_between_norms(*a, backend="reference"), x, modules, grad)
    assert_alike(ours, step(one_by_one, x, twin, grad), 1e-9)
    assert not fused_calls


def test_the_input_is_never_written_into() -> None:
    x = draw().detach()
    before = x.clone()
    for first in (nn.Identity(), nn.BatchNorm2d(8).double().eval()):
        gconv.conv_between_norms(x, first, sandwich()[1], nn.Identity(), backend="reference")
        assert torch.equal(x, before)


def test_autocast_does_not_narrow_the_norm_of_a_float32_input(fused_calls: list[str]) -> None:
    modules = sandwich(dtype=torch.float32)
    x = (torch.randn(3, 8, 7, 6) + 100).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = gconv.conv_between_norms(x, *modules, backend="reference")
        right = one_by_one(x, *copy.deepcopy(modules))
    assert torch.equal(y, right) and not fused_calls


def test_on_aten_the_modules_run(fused_calls: list[str]) -> None:
    for backend in ("auto", "aten"):
        gconv.conv_between_norms(draw(), *sandwich(), backend=backend)
    assert not fused_calls


def test_the_backend_holds_for_the_modules_too() -> None:
    seen, modules = [], hooked(sandwich())
    modules[1].register_forward_pre_hook(lambda *_: seen.append(dispatch.requested(None)))
    gconv.conv_between_norms(draw(), *modules, backend="reference")
    assert seen == ["reference"]
    with pytest.raises(ValueError, match="backend must be one of"):
        gconv.conv_between_norms(draw(), *modules, backend="cudnn")


def test_one_value_a_channel_is_refused_as_batch_norm_refuses_it() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        gconv.conv_between_norms(
            torch.randn(1, 8, 1, 1, dtype=torch.float64), *sandwich(), backend="reference"
        )


def test_wrong_channels_are_refused_as_the_modules_refuse_them() -> None:
    before, conv, after = sandwich()
    with pytest.raises(RuntimeError, match=r"weight .* expects .* but input .* has 6"):
        gconv.conv_between_norms(draw(channels=6), before, conv, after, backend="reference")


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype: torch.dtype, fused_calls: list[str]) -> None:
    """Statistics and gradients of the norms are in float32."""
    modules = sandwich(dtype=torch.float32)
    twin, x = copy.deepcopy(modules), draw(torch.float32)
    grad = torch.randn(3, 8, 7, 6)

    def fused(x: Tensor, *arguments: nn.Module) -> Tensor:
        with torch.autocast("cpu", dtype):
            y = gconv.conv_between_norms(x.to(dtype), *arguments, backend="triton")
        assert y.dtype == dtype
        return y

    ours, right = step(fused, x, modules, grad), step(one_by_one, x, twin, grad)
    assert fused_calls and all(ours[name].dtype == right[name].dtype for name in right if name != "output")
    for name in right:  # small values of the gradients of the norms can pass the ReLU or not
        apart = (ours[name].double() - right[name].double()).norm() / right[name].double().norm().clamp(min=1)
        assert apart < 0.05, name


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_moves_statistics_as_it_does_with_the_modules(reentrant: bool) -> None:
    modules = sandwich()
    twin, x, grad = copy.deepcopy(modules), draw(), torch.randn(3, 8, 7, 6, dtype=torch.float64)
    fused = step(
        lambda x, *m: checkpoint(
            lambda x: gconv.conv_between_norms(x, *m, backend="reference"), x, use_reentrant=reentrant
        ),
        x, modules, grad,
    )  # fmt: skip
    right = step(
        lambda x, *m: checkpoint(lambda x: one_by_one(x, *m), x, use_reentrant=reentrant), x, twin, grad
    )
    assert_alike(fused, right, 1e-9)


def test_torch_func_goes_through_the_modules() -> None:
    modules = sandwich().eval()
    x = draw().detach()

    def loss(x: Tensor) -> Tensor:
        return gconv.conv_between_norms(x, *modules, backend="reference").square().sum()

    torch.testing.assert_close(torch.func.grad(loss)(x), torch.autograd.functional.jacobian(loss, x))
