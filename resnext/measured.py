"""Device time of the stages of a network, measured with PyTorch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import gconv
from resnext.model import ResNeXt
from resnext.torch_internals import place

WARM_UP = 3  # calls before the profiled one, in which kernels are compiled and cuDNN picks algorithms


@dataclass(frozen=True)
class StageTimes:
    """Device time of a stage in seconds per image.

    Attributes:
        name: "conv1" to "conv5", or "fc".
        inference: time of a forward pass in evaluation mode.
        fused_inference: the same after `gconv.fuse`.
        training: time of a forward and a backward pass in training mode.
        fused_training: the same with ``ResNeXt(..., fused=True)``.
    """

    name: str
    inference: float
    fused_inference: float
    training: float
    fused_training: float


def measure(
    build: Callable[..., ResNeXt], batch: int, image_size: int, device: torch.device
) -> list[StageTimes]:
    """Profile each stage separately, unfused and fused, in bfloat16 autocast and channels_last.

    Args:
        build: function that builds the network, called with ``fused=False`` and ``fused=True``.
        batch: batch size.
        image_size: height and width of the images.
        device: device to run on. On a CPU, the times are those of PyTorch's operators.

    Returns:
        The times of each stage, in order, without empty stages.
    """
    plain, fused = (place(build(fused=fused), device, torch.channels_last) for fused in (False, True))
    x = torch.randn(batch, plain.conv1.in_channels, image_size, image_size, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    rows = []
    for (name, stage), (_, fused_stage) in zip(_stages(plain), _stages(fused), strict=True):
        first = name == "conv1"
        stage.eval()
        times = [
            _infer(stage, x, device),
            _infer(gconv.fuse(stage)[0], x, device),
            _train(stage.train(), x, first, device),
            _train(fused_stage.train(), x, first, device),
        ]
        rows.append(StageTimes(name, *(seconds / batch for seconds in times)))
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            x = stage(x)
    return rows


def _stages(model: ResNeXt) -> Iterator[tuple[str, nn.Module]]:
    yield "conv1", nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
    for i, stage in enumerate(model.stages, 2):
        if len(stage):
            yield f"conv{i}", stage
    yield "fc", nn.Sequential(model.avgpool, nn.Flatten(), model.fc)


def _infer(stage: nn.Module, x: Tensor, device: torch.device) -> float:
    @torch.no_grad()
    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            stage(x)

    return device_seconds(profiled(step, device), device)


def _train(stage: nn.Module, x: Tensor, first: bool, device: torch.device) -> float:
    x = x.detach().requires_grad_(not first)  # the image needs no gradient
    with torch.autocast(device.type, torch.bfloat16):
        grad = torch.randn_like(stage(x))

    def step() -> None:
        stage.zero_grad(set_to_none=True)
        x.grad = None
        with torch.autocast(device.type, torch.bfloat16):
            y = stage(x)
        y.backward(grad)

    return device_seconds(profiled(step, device), device)


def profiled(call: Callable[[], Any], device: torch.device) -> list[Any]:
    """Call a few times, then once under PyTorch's profiler, and return its events without annotations."""
    for _ in range(WARM_UP):
        call()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    # PyTorch 2.11 warns without acc_events
    with profile(activities=activities, record_shapes=True, acc_events=True) as profiler:
        call()
        torch.get_device_module(device).synchronize()
    return [event for event in profiler.events() if not event.is_user_annotation]


def device_seconds(events: Iterable[Any], device: torch.device) -> float:
    """Return the total time in seconds of the kernels among ``events``, or of the operators on a CPU."""
    cuda = device.type == "cuda"
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    on_device = (event for event in events if event.device_type == kind)
    return sum(e.self_device_time_total if cuda else e.self_cpu_time_total for e in on_device) / 1e6
