"""Measure steps of complete networks: with gconv, fused, on PyTorch's convolution, and of ResNet-50."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import DeviceType

import gconv
from benchmarks.layers import in_a_line
from gconv import GroupConv2d
from gconv.measure.problem import LAYOUTS, cudnn_precision
from gconv.measure.timing import cudnn_searching, wall_time
from resnext import measured
from resnext.model import VARIANTS, ResNeXt

TASKS = ("inference", "training")
MODES = ("eager", "compiled", "graphed", "compiled-graphed")
NETWORKS: dict[str, Callable[[], ResNeXt]] = {
    **VARIANTS,
    # not a real network: for trying the command in seconds
    "tiny": partial(ResNeXt, (1, 1, 0, 0), 4, 4, 10, stem="small", stem_width=16),
}
CHECKED = 16  # images that are also computed in float32
WARM_UP = 3  # steps before a CUDA graph is captured
# Largest error of the logits (inference) and of all gradients (training), relative to their norm: that of
# bfloat16 in a hundred layers. Wrong results are off by about 1.
NETWORK_TOLERANCES = {"inference": 5e-2, "training": 2.5e-1}


@dataclass(frozen=True)
class NetworkContender:
    """A network, the implementation of its grouped convolutions, and their layout.

    Args:
        network: a key of ``NETWORKS``.
        runner: "gconv" for the backend ``auto``; "fused" for the same with the batch norms inside the
            kernels, in inference by ``gconv.fuse``; "F.conv2d" for nn.Conv2d.
        layout: a key of ``LAYOUTS``.
    """

    network: str
    runner: str
    layout: str


@dataclass(frozen=True)
class NetworkRow:
    """The measurements of one contender.

    Args:
        network, runner, layout: the contender.
        task, mode, batch, image: what was run: the task and mode, the batch size, and the height and width of
            the images.
        p20, p50, p80: time of a step in milliseconds; None if the network is wrong or failed.
        images_per_second: throughput at the median time.
        peak_bytes: peak memory of the steps; None on a CPU.
        grouped_share: share of the grouped convolutions in the device time of an eager step; None in other
            modes, and if the profiler sees no time.
        error: error of the logits or gradients against float32, relative to their norm.
        problem: why there is no time: a wrong result or an error.
    """

    network: str
    runner: str
    layout: str
    task: str
    mode: str
    batch: int
    image: int
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    images_per_second: float | None = None
    peak_bytes: int | None = None
    grouped_share: float | None = None
    error: float | None = None
    problem: str | None = None


NETWORK_CASE = ("network", "runner", "layout", "task", "mode", "batch", "image")


def network_contenders(networks: list[str]) -> list[NetworkContender]:
    """Return each network with gconv, fused, and with F.conv2d in both layouts; ResNet-50 only the last."""
    found = []
    for name in networks:
        ours = () if name == "resnet50" else ("gconv", "fused")
        found += [NetworkContender(name, runner, "channels_last") for runner in ours]
        found += [NetworkContender(name, "F.conv2d", layout) for layout in LAYOUTS]
    return found


def cases(
    networks: list[str], tasks: list[str], modes: list[str], batches: list[int], image: int
) -> Iterator[tuple[NetworkContender, str, str, int, int]]:
    """Yield all measurements to make, with those to be compared next to each other."""
    for task, batch, mode, contender in product(tasks, batches, modes, network_contenders(networks)):
        yield contender, task, mode, batch, image


def measure(
    contender: NetworkContender, task: str, mode: str, batch: int, image: int, device: torch.device
) -> NetworkRow:
    """Check the result of a contender in one mode, then time it."""
    row: dict[str, Any] = {
        **asdict(contender), "task": task, "mode": mode, "batch": batch, "image": image
    }  # fmt: skip
    torch.compiler.reset()
    _reset_peak(device)  # frees the memory of the previous network
    try:
        with cudnn_searching():
            row |= _measure(contender, task, mode, batch, image, device)
    except Exception as error:  # such as out of memory: goes into the row, and the next contender runs
        row["problem"] = in_a_line(error)
    return NetworkRow(**row)


def _measure(
    contender: NetworkContender, task: str, mode: str, batch: int, image: int, device: torch.device
) -> dict[str, Any]:
    """Return the measurements, or the problem."""
    torch.manual_seed(0)
    model, exact = _build(contender, task, device)
    x = torch.randn(batch, 3, image, image, device=device).contiguous(memory_format=LAYOUTS[contender.layout])
    labels = torch.randint(0, model.fc.out_features, (batch,), device=device)
    error = _error(model, exact, x[:CHECKED], labels[:CHECKED], task)
    if not error <= NETWORK_TOLERANCES[task]:  # NaN too
        return {"error": error, "problem": f"wrong by {error:.1e}"}
    expected = _eager_result(model, x, labels, task)
    step = _step(torch.compile(model) if mode.startswith("compiled") else model, model, x, labels, task)
    differences = [_difference(step(), expected)]
    share = _grouped_share(step, device) if mode == "eager" else None
    _reset_peak(device)
    if mode.endswith("graphed"):
        step, result = _graph(step)
        # a training graph has made more steps than the eager network, so only NaN can be detected
        differences.append(_difference(result, expected if task == "inference" else result))
    else:
        step()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    for difference in differences:
        if not difference <= NETWORK_TOLERANCES["inference"]:
            return {"error": difference, "problem": f"wrong by {difference:.1e}, {mode} against eager"}
    found = {"peak_bytes": peak, "grouped_share": share, "error": float(f"{error:.2e}")}
    return found | _times(step, batch, device)


def _times(step: Callable[[], object], batch: int, device: torch.device) -> dict[str, float]:
    """Time a step, and return milliseconds and images per second at the median."""
    times = wall_time(step, device)
    milliseconds = {name: round(t * 1e3, 4) for name, t in times._asdict().items()}
    return {**milliseconds, "images_per_second": round(batch / times.p50, 1)}


def _eager_result(model: nn.Module, x: Tensor, labels: Tensor, task: str) -> Tensor:
    """Return the result of the first step, made on a copy of the model."""
    plain = copy.deepcopy(model)
    return _step(plain, plain, x, labels, task)()


def _reset_peak(device: torch.device) -> None:
    gc.collect()  # an optimizer is part of a reference cycle
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _difference(result: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, relative to the expected norm; NaN if either contains NaN."""
    return ((result.double() - expected.double()).norm() / expected.double().norm()).item()


def _build(contender: NetworkContender, task: str, device: torch.device) -> tuple[nn.Module, ResNeXt]:
    """Return the contender's network, and the same network with the same weights on F.conv2d."""
    build = NETWORKS[contender.network]
    model = build().to(device, memory_format=LAYOUTS[contender.layout])
    exact = _on_conv2d(copy.deepcopy(model))
    if contender.runner == "fused" and task == "inference":
        model, _ = gconv.fuse(model.eval())
    elif contender.runner == "fused":
        model = build(fused=True).to(device, memory_format=LAYOUTS[contender.layout])
        model.load_state_dict(exact.state_dict())
    return (copy.deepcopy(exact) if contender.runner == "F.conv2d" else model), exact


def _on_conv2d(model: ResNeXt) -> ResNeXt:
    """Convert gconv's layers in a network to nn.Conv2d, in place."""
    for module in model.modules():
        if isinstance(module, GroupConv2d):
            module.__class__ = nn.Conv2d
    return model


def _step(run: nn.Module, model: nn.Module, x: Tensor, labels: Tensor, task: str) -> Callable[[], Tensor]:
    """Return a step in bfloat16 autocast: inference, or loss, gradients and SGD with momentum.

    Args:
        run: ``model``, compiled or not.
        model: the network.
        x: images, (N, 3, H, W).
        labels: their classes, (N,).
        task: a member of ``TASKS``.
    """
    autocast = partial(torch.autocast, x.device.type, torch.bfloat16)
    model.train(task == "training")
    if task == "inference":

        @torch.no_grad()
        def infer() -> Tensor:
            with autocast():
                return run(x)

        return infer
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)

    def train() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            loss = F.cross_entropy(run(x), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return train


def _error(model: nn.Module, exact: ResNeXt, x: Tensor, labels: Tensor, task: str) -> float:
    """Return the error of the logits, or of all gradients, in bfloat16 against float32 on F.conv2d.

    The batch norms use their running statistics. With statistics of the batch, the gradients of deep networks
    are chaotic: in bfloat16 they differ from those in float32 as much as from unrelated gradients.
    """
    ours, exact = copy.deepcopy(model).eval(), exact.eval()
    results = []
    with cudnn_precision("ieee"):
        for network, autocast in ((ours, True), (exact, False)):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
                logits = network(x)
                loss = F.cross_entropy(logits, labels)
            if task == "training":
                loss.backward()
            found = [logits] if task == "inference" else [p.grad for p in network.parameters()]
            results.append(torch.cat([tensor.detach().double().flatten() for tensor in found]))
    return _difference(*results)


def _graph(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Capture a step in a CUDA graph and run it once; return its replay, and the tensor with its result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):  # compiles and lets cuDNN choose
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay(_kept: Callable = step) -> None:  # keeps the optimizer's state alive
        graph.replay()

    replay()
    return replay, result


def _grouped_share(step: Callable[[], Tensor], device: torch.device) -> float | None:
    """Return the share of the grouped convolutions in the device time of a step's operators.

    None if the profiler sees no time, for example because it isn't allowed to trace the device.
    """
    events = measured.profiled(step, device)
    whole = measured.device_seconds(events, device)
    grouped = sum(
        event.device_time_total if device.type == "cuda" else event.cpu_time_total
        for event in events
        if event.device_type == DeviceType.CPU and _is_grouped(event)
    )
    return round(grouped / 1e6 / whole, 4) if whole else None


def _is_grouped(event: Any) -> bool:
    """Return whether an operator is a grouped convolution or its gradient, and not inside another of them."""
    above = event.cpu_parent
    while above is not None:
        if above.name.startswith("gconv::"):
            return False
        above = above.cpu_parent
    if event.name.startswith("gconv::"):
        return True
    place = {"aten::convolution": 1, "aten::convolution_backward": 2}.get(event.name)  # index of the weight
    if place is None:
        return False
    input, weight = event.input_shapes[place - 1 : place + 1]
    return input[1] != weight[1]
