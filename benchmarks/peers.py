"""Who runs a layer: gconv, and what it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import gconv
from gconv import dispatch
from gconv.problem import LAYOUTS, Operands, Problem

Run = Callable[[Operands], Tensor]


def _auto(problem: Problem) -> Run:
    """What a call of ``gconv.group_conv2d`` runs, and its gradient."""
    g, alone = problem.geometry, {}

    def forward(operands: Operands) -> Tensor:
        x, weight, _ = operands
        return gconv.group_conv2d(x, weight, None, g.stride, g.padding[::2], g.dilation, g.groups)

    def gradient(operands: Operands) -> Tensor:
        layout = operands.x.stride()
        if layout not in alone:  # decided in the forward pass
            alone[layout] = dispatch.aten_alone("auto", operands.x, problem.dtype, g)
        return problem.run_pytorch(operands) if alone[layout] else problem.run(operands)

    return forward if problem.pass_ == "forward" else gradient


def _on(backend: str) -> Callable[[Problem], Run]:
    return lambda problem: lambda operands: problem.run(operands, backend)


def _compiled(problem: Problem) -> Run:
    """By torch.compile, which may choose among its own templates and PyTorch's kernels.

    Its CUDA graphs are left out: what is timed runs in one already.
    """
    return torch.compile(problem.run_pytorch, mode="max-autotune-no-cudagraphs", dynamic=False)


RUNNERS: dict[str, Callable[[Problem], Run]] = {
    "auto": _auto,
    "triton": _on("triton"),
    "reference": _on("reference"),
    "F.conv2d": lambda problem: problem.run_pytorch,
    "torch.compile": _compiled,
}
PEERS = ("F.conv2d", "torch.compile")


@dataclass(frozen=True)
class Contender:
    """A member of ``RUNNERS`` on tensors of a layout of ``LAYOUTS``."""

    runner: str
    layout: str

    def __str__(self) -> str:
        return f"{self.runner}, {self.layout}"


def contenders(runners: list[str]) -> list[Contender]:
    """Each runner in both layouts; the reference, which is not there to be fast, in one."""
    return [
        Contender(runner, layout)
        for runner in runners
        for layout in LAYOUTS
        if (runner, layout) != ("reference", "contiguous")
    ]


def who_runs(contender: Contender, problem: Problem, operands: Operands) -> str:
    """What ``auto`` chose, or the kernel and tile that "triton" runs in; the runner itself for others."""
    geometry = problem.geometry
    first = operands.x if problem.pass_ == "forward" else operands.dy
    backend = contender.runner
    if backend == "auto":
        backend, _ = dispatch.decide("auto", problem.pass_, first, problem.dtype, geometry)
    if backend != "triton":
        return backend
    from gconv.kernels import tile_of  # imports Triton

    return f"triton: {tile_of(problem.pass_, geometry, problem.dtype, first.device)}"
