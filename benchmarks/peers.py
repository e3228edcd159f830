"""The implementations of a layer that are compared: gconv's and its peers'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import gconv
from gconv import dispatch
from gconv.kinds import conv2d_call, layout_of
from gconv.measure.problem import LAYOUTS, Operands, Problem

Run = Callable[[Operands], Tensor]


def _auto(problem: Problem) -> Run:
    """Run what ``gconv.group_conv2d`` and its gradients run."""
    g, alone = problem.geometry, {}

    def forward(operands: Operands) -> Tensor:
        x, weight, _ = operands
        return gconv.group_conv2d(x, weight, None, g.stride, g.padding[::2], g.dilation, g.groups)

    def gradient(operands: Operands) -> Tensor:
        layout = operands.x.stride()
        if layout not in alone:  # in training, the forward pass decides this
            alone[layout] = dispatch.aten_alone("auto", operands.x, problem.dtype, conv2d_call(g))
        return problem.run_pytorch(operands) if alone[layout] else problem.run(operands)

    return forward if problem.pass_ == "forward" else gradient


def _on(backend: str) -> Callable[[Problem], Run]:
    return lambda problem: lambda operands: problem.run(operands, backend)


def _compiled(problem: Problem) -> Run:
    """Use torch.compile, which can choose from its own templates and PyTorch's kernels, also for gradients.

    Its CUDA graphs are off, because calls are timed inside a CUDA graph anyway.
    """
    from torch._inductor import config, list_mode_options  # takes a second

    options = list_mode_options("max-autotune-no-cudagraphs")
    options |= {name: "ATEN,TRITON" for name in TEMPLATES if hasattr(config, name)}
    return torch.compile(problem.run_pytorch, options=options, dynamic=False)


def _native_depthwise(problem: Problem) -> Run:
    """Use PyTorch's own depthwise kernels, even where F.conv2d uses cuDNN."""

    def run(operands: Operands) -> Tensor:
        before = torch._C._get_cudnn_enabled()
        torch._C._set_cudnn_enabled(False)
        try:
            return problem.run_pytorch(operands)
        finally:
            torch._C._set_cudnn_enabled(before)

    return run


def _cudnn_depthwise(problem: Problem) -> Run:
    """Use cuDNN, even where F.conv2d uses PyTorch's own kernels, mostly in contiguous layout."""
    g, padding = problem.geometry, problem.geometry.padding[::2]
    settings = (g.stride, g.dilation, g.groups, True, False, problem.type == "tf32")
    beyond_last_tap = [
        (g.input_size[2 + i] + 2 * padding[i] - g.dilation[i] * (g.weight_size[2 + i] - 1) - 1) % g.stride[i]
        for i in (0, 1)
    ]

    def forward(operands: Operands) -> Tensor:
        return torch.cudnn_convolution(operands.x, operands.weight, padding, *settings)

    def input_grad(operands: Operands) -> Tensor:
        return torch.cudnn_convolution_transpose(
            operands.dy, operands.weight, padding, beyond_last_tap, *settings
        )

    return forward if problem.pass_ == "forward" else input_grad


# Inductor's settings of where it may use a Triton template for a convolution. By default it doesn't for
# gradients. PyTorch 2.11 lacks the settings for gradients.
TEMPLATES = (
    "max_autotune_conv_backends",
    "max_autotune_conv_bwd_input_backends",
    "max_autotune_conv_bwd_weight_backends",
)
RUNNERS: dict[str, Callable[[Problem], Run]] = {
    "auto": _auto,
    "triton": _on("triton"),
    "reference": _on("reference"),
    "F.conv2d": lambda problem: problem.run_pytorch,
    "torch.compile": _compiled,
    "native-depthwise": _native_depthwise,
    "cudnn-depthwise": _cudnn_depthwise,
}
DEPTHWISE = ("native-depthwise", "cudnn-depthwise")
PEERS = ("F.conv2d", "torch.compile", *DEPTHWISE)


@dataclass(frozen=True)
class Contender:
    """An implementation, a key of ``RUNNERS``, on tensors in a layout, a key of ``LAYOUTS``."""

    runner: str
    layout: str

    def __str__(self) -> str:
        return f"{self.runner}, {self.layout}"


def contenders(runners: list[str]) -> list[Contender]:
    """Return each runner in both layouts, except the reference, which isn't meant to be fast, in only one."""
    return [
        Contender(runner, layout)
        for runner in runners
        for layout in LAYOUTS
        if (runner, layout) != ("reference", "contiguous")
    ]


def applies(contender: Contender, problem: Problem, device: torch.device) -> bool:
    """Return whether a contender can run a problem, and may differ from F.conv2d.

    PyTorch has its own kernels only for depthwise layers. There is no function that runs cuDNN's weight
    gradient.
    """
    if contender.runner not in DEPTHWISE:
        return True
    geometry = problem.geometry
    depthwise = 1 < geometry.groups == geometry.input_size[1]
    cudnn = torch.backends.cudnn
    has_both = device.type == "cuda" and cudnn.is_available() and cudnn.enabled
    callable_ = (contender.runner, problem.pass_) != ("cudnn-depthwise", "weight_grad")
    return depthwise and has_both and callable_


def who_runs(contender: Contender, problem: Problem, operands: Operands) -> str:
    """Return the backend that ``auto`` chose, with the kernel and tile if it is "triton".

    For other runners, return the runner.
    """
    geometry = problem.geometry
    first = operands.x if problem.pass_ == "forward" else operands.dy
    backend = contender.runner
    if backend == "auto":
        x, call = operands.x, conv2d_call(geometry)
        decided = dispatch.explain_call("auto", x.device, layout_of(x), problem.dtype, call)
        backend = decided[problem.pass_].backend
    if backend != "triton":
        return backend
    from gconv.kernels import tile_of  # imports Triton

    return f"triton: {tile_of(problem.pass_, geometry, problem.dtype, first.device)}"
