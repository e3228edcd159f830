"""Which backend runs a pass, and why.

A backend is a module with the three passes, ``forward``, ``input_grad`` and ``weight_grad``, over tensors and
a :class:`~gconv.geometry.ConvGeometry`. The choice is made here alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from gconv.geometry import PASSES, ConvGeometry

IMPLEMENTATIONS = {"triton": "gconv.kernels", "aten": "gconv.aten", "reference": "gconv.reference"}
BACKENDS = ("auto", *IMPLEMENTATIONS)

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TRITON_INSTALLED = find_spec("triton") is not None
MOST_PIXELS = 2**31 - 2**10  # kernels number pixels and weights with 32 bits, whole tiles of them

# A plain global: torch.compile guards on it and compiles anew when it changes. It cannot trace a ContextVar,
# and it does not guard on thread-local state.
_current = "auto"


def backend(name: str) -> AbstractContextManager[None]:
    """Runs the grouped convolutions inside the ``with`` block, and their backward passes, on one backend.

    The setting is the process's, like those of ``torch.backends``, not the thread's. A ``backend=`` argument
    of the call goes before it.

    Args:
        name: "auto" takes the fastest, "triton" is gconv's kernels, "aten" is PyTorch's own convolution,
            "reference" is readable PyTorch.

    Raises:
        ValueError: ``name`` is none of them.
    """
    check_backend(name)
    return _set(name)


@contextmanager
def _set(name: str) -> Iterator[None]:
    global _current
    previous, _current = _current, name
    try:
        yield
    finally:
        _current = previous


def requested(name: str | None) -> str:
    """The backend that a call asks for: its argument, else that of the ``with backend(...)`` around it.

    An export to ONNX always takes "aten": other programs know no other.
    """
    if name is not None:
        check_backend(name)
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        return "aten"
    return _current if name is None else name


def check_backend(name: str) -> None:
    """Raises ValueError where ``name`` is no backend."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")


def aten_alone(name: str, input: Tensor, dtype: torch.dtype, geometry: ConvGeometry) -> bool:
    """Whether all passes of a call run on "aten", so that ``F.conv2d`` itself can take it.

    Raises:
        RuntimeError: "triton" was asked for and cannot run.
    """
    if name == "auto":
        return input.is_cpu or not _kernels_could_pay(input, dtype, geometry)
    if name == "triton" and not torch.compiler.is_compiling():
        _require_triton(input, dtype, geometry)  # else when the compiled graph runs
    return name == "aten"


def decide(
    name: str, pass_: str, operand: Tensor, dtype: torch.dtype, geometry: ConvGeometry
) -> tuple[str, str]:
    """Who runs one pass where backend ``name`` was requested, and why in words.

    Args:
        name: of ``BACKENDS``.
        pass_: of ``PASSES``.
        operand: x or dy, whichever the pass reads first.
        dtype: what the pass runs in.

    Raises:
        RuntimeError: "triton" was asked for and cannot run.
    """
    if name == "triton":
        _require_triton(operand, dtype, geometry)
    if name != "auto":
        return name, "asked for"
    if not operand.is_cuda:
        return "aten", f"gconv has no kernel for {operand.device.type}, PyTorch's own is the fastest"
    if problem := why_not_triton(operand, dtype, geometry):
        return "aten", problem
    layout = "channels_last" if _channels_last(operand) else "contiguous"
    kernels = import_module(IMPLEMENTATIONS["triton"])
    pays, reason = kernels.verdict(pass_, geometry, dtype, layout, operand.device)
    return ("triton" if pays else "aten"), reason


def implementation(name: str, pass_: str, operand: Tensor, geometry: ConvGeometry) -> ModuleType:
    """The module that runs a pass, as :func:`decide` decides it."""
    return import_module(IMPLEMENTATIONS[decide(name, pass_, operand, operand.dtype, geometry)[0]])


def _kernels_could_pay(input: Tensor, dtype: torch.dtype, geometry: ConvGeometry) -> bool:
    """Whether :func:`decide` takes "triton" for some pass that may follow.

    While Dynamo traces, which has no numbers to look up, only whether it might.
    """
    if not (input.is_cuda and TRITON_INSTALLED and geometry.groups > 1 and dtype in TRITON_DTYPES):
        return False
    if torch.compiler.is_compiling():
        return _channels_last(input)
    passes = PASSES if torch.is_grad_enabled() else PASSES[:1]
    return any(decide("auto", pass_, input, dtype, geometry)[0] == "triton" for pass_ in passes)


def _channels_last(tensor: Tensor) -> bool:
    """Whether the channels are side by side in memory."""
    return tensor.stride(-3) == 1


def _require_triton(operand: Tensor, dtype: torch.dtype, geometry: ConvGeometry) -> None:
    if problem := why_not_triton(operand, dtype, geometry):
        raise RuntimeError(f"backend='triton' cannot run here: {problem}")


def why_not_triton(operand: Tensor, dtype: torch.dtype, geometry: ConvGeometry) -> str | None:
    """Why the kernels cannot run, None where they can."""
    if not TRITON_INSTALLED:
        return "Triton is not installed; pip install triton"
    if problem := _device_problem(operand.device):
        return problem
    if dtype not in TRITON_DTYPES:
        return f"the kernels take float16, bfloat16 and float32, got {dtype}"
    (n, _, h, w), (_, _, p, q), (k, cg, r, s) = (
        geometry.input_size,
        geometry.output_size,
        geometry.weight_size,
    )
    if max(n * h * w, n * p * q, k * cg * r * s) > MOST_PIXELS:
        return f"the kernels take at most {MOST_PIXELS} pixels and weights, got input {geometry.input_size}"
    return None


@cache
def _device_problem(device: torch.device) -> str | None:
    """Why the kernels cannot run on ``device``, None where they can. Meta tensors are never run."""
    if device.type == "cuda":
        old = torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)
        return "the kernels need compute capability 8.0 or newer" if old else None
    if device.type == "meta" or (device.type == "cpu" and _interpreted()):
        return None
    return (
        f"the kernels need a CUDA or ROCm device, got {device.type}; "
        "TRITON_INTERPRET=1 in the environment runs them on the CPU, slowly, to test them"
    )


def _interpreted() -> bool:
    """Whether Triton runs in its interpreter: decided once, when the kernels are first imported."""
    return import_module("gconv.kernels.packing").INTERPRETED.value
