"""Which backend runs a pass, and why. The choice is made here alone.

:func:`aten_alone` decides once for a call whether PyTorch's own function can take it. If not, each
pass asks :func:`backend_for` when it runs: a gradient may have another layout than the input, and run
elsewhere.
:func:`explain_call` says the same in advance, with reasons, for reports.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple, cast

import torch
from torch import Tensor

from gconv.backends import Backend
from gconv.geometry import ConvGeometry
from gconv.kinds import Call, layout_of

# Relative to this package, which has another name in a kernel for the Hugging Face hub.
IMPLEMENTATIONS = {"triton": ".kernels", "aten": ".aten", "reference": ".reference"}
BACKENDS = ("auto", *IMPLEMENTATIONS)

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TRITON_INSTALLED = find_spec("triton") is not None
MOST_ITEMS = 2**31 - 2**10  # kernels number pixels and weights with 32 bits, whole tiles of them
# Microseconds that a pass must be known to take on the device before an eager call takes the kernels, which
# keep the host some tens of them longer than F.conv2d (benchmarks/README.md). Where a convolution is shorter,
# so is what is around it in a network: the device waits for the host, and no kernel makes it faster.
HOST = 25.0

# A plain global: torch.compile guards on it and compiles anew when it changes. It cannot trace a ContextVar,
# and it does not guard on thread-local state.
_current = "auto"


def backend(name: str) -> AbstractContextManager[None]:
    """Run the grouped convolutions inside the ``with`` block, and their backward passes, on one backend.

    The setting holds for the whole process, like those of ``torch.backends``. ``backend=`` in a call
    overrides it.

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


class Decision(NamedTuple):
    """Who runs a pass.

    Args:
        backend: a key of ``IMPLEMENTATIONS``.
        reason: why, in words.
        least: microseconds that the pass takes on "aten", at the least; 0 if that is not known.
    """

    backend: str
    reason: str
    least: float = 0.0


def aten_alone(name: str, input: Tensor, dtype: torch.dtype, call: Call) -> bool:
    """Whether all passes of a call run on "aten", so that PyTorch's own function can take it.

    Raises:
        RuntimeError: "triton" was asked for and cannot run.
    """
    if name == "auto":
        return not (input.is_cuda and _kernels_could_pay(input, dtype, call))
    if name == "triton" and not torch.compiler.is_compiling():
        _require_triton(input.device, dtype, call.geometry)  # else when the compiled graph runs
    return name == "aten"


def decide_by_auto(
    pass_: str, device: torch.device, layout: str, dtype: torch.dtype, geometry: ConvGeometry
) -> Decision:
    """Decide as "auto" does for tensors on ``device``, "channels_last" or "contiguous"."""
    if device.type != "cuda":
        return Decision("aten", f"gconv has no kernels for {device.type}, so PyTorch's own convolution runs")
    if problem := why_not_triton(device, dtype, geometry):
        return Decision("aten", problem)
    pays, reason, least = _kernels().verdict(pass_, geometry, dtype, layout, device)
    return Decision("triton" if pays else "aten", reason, least)


def explain_call(
    name: str,
    device: torch.device,
    layout: str,
    dtype: torch.dtype,
    call: Call,
    passes: Sequence[str] | None = None,
) -> dict[str, Decision]:
    """Decide who runs each pass that an eager call will need.

    By "auto" the kernels run none of them unless one of those that they would run takes the device at least
    ``HOST``. In a compiled graph, which holds the call already, each pass goes by :func:`backend_for` alone.

    Args:
        name: the backend that was requested, of ``BACKENDS``.
        device: where the tensors are.
        layout: theirs, "channels_last" or "contiguous".
        dtype: what the passes run in.
        call: the call.
        passes: passes of its geometry. Defaults to None, those that it may need now.

    Returns:
        The decision for each pass of the geometry.

    Raises:
        RuntimeError: "triton" was asked for and cannot run.
    """
    passes = call.passes if passes is None else passes
    geometry = call.geometry
    if name == "triton":
        _require_triton(device, dtype, geometry)
    if name != "auto":
        return dict.fromkeys(passes, Decision(name, "asked for"))
    if device.type == "cuda" and (problem := _why_not_folded(call, layout)):
        return dict.fromkeys(passes, Decision("aten", problem))
    found = {pass_: decide_by_auto(pass_, device, layout, dtype, geometry) for pass_ in passes}
    taken = [decision.least for decision in found.values() if decision.backend == "triton"]
    if not taken or max(taken) >= HOST:
        return found
    reason = (
        f"too small to gain in an eager call: PyTorch may need only {max(taken):.2g} us on the GPU, under "
        f"{HOST:g}, and launching the kernels takes the CPU longer; use torch.compile or backend='triton'"
    )
    return {
        pass_: Decision("aten", reason if decision.backend == "triton" else decision.reason, decision.least)
        for pass_, decision in found.items()
    }


def _why_not_folded(call: Call, layout: str) -> str | None:
    """Why "auto" leaves a 3-d convolution to PyTorch; None if its slices are images without a copy."""
    if call.depth is None or (call.depth.folds and layout == "channels_last"):
        return None
    if call.depth.folds:
        return "a contiguous input would be copied: gconv's kernels take 3-d ones in channels_last_3d"
    return "a kernel, stride or padding in depth would copy the input: PyTorch's own 3-d convolution runs"


def backend_for(pass_: str, name: str, operand: Tensor, geometry: ConvGeometry) -> Backend:
    """Choose the backend of one pass of a call that is not left to "aten" as a whole.

    Args:
        pass_: of ``PASSES``.
        name: the backend that was requested, of ``BACKENDS``.
        operand: x or dy, whichever the pass reads first.
        geometry: the sizes.

    Raises:
        RuntimeError: "triton" was asked for and cannot run.
    """
    if name == "triton":
        _require_triton(operand.device, operand.dtype, geometry)
    elif name == "auto":
        layout = layout_of(operand)
        name = decide_by_auto(pass_, operand.device, layout, operand.dtype, geometry).backend
    return _load(name)


@cache
def _load(backend: str) -> Backend:
    """The module of a backend, imported when it is first needed."""
    return cast(Backend, import_module(IMPLEMENTATIONS[backend], __spec__.parent))


@cache
def _kernels() -> ModuleType:
    """The module of the kernels, which also says whether they pay."""
    return import_module(IMPLEMENTATIONS["triton"], __spec__.parent)


def _kernels_could_pay(input: Tensor, dtype: torch.dtype, call: Call) -> bool:
    """Whether :func:`explain_call` takes "triton" for some pass that may follow, without its words.

    While Dynamo traces, which has no numbers to look up, only whether it might.
    """
    geometry = call.geometry
    layout = layout_of(input, call.kind.dims)
    if geometry.groups == 1 or _why_not_folded(call, layout):
        return False
    if torch.compiler.is_compiling():
        return TRITON_INSTALLED and dtype in TRITON_DTYPES and layout == "channels_last"
    device = input.device
    if why_not_triton(device, dtype, geometry):
        return False
    return _kernels().pays_for_a_call(call.passes, geometry, dtype, layout, device, HOST)


def this_device() -> torch.device:
    """The GPU that is current, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _require_triton(device: torch.device, dtype: torch.dtype, geometry: ConvGeometry) -> None:
    if problem := why_not_triton(device, dtype, geometry):
        raise RuntimeError(f"backend='triton' cannot run here: {problem}")


def why_not_triton(device: torch.device, dtype: torch.dtype, geometry: ConvGeometry) -> str | None:
    """Why the kernels cannot run, None where they can."""
    if not TRITON_INSTALLED:
        return "Triton is not installed; pip install triton"
    if problem := _device_problem(device):
        return problem
    if dtype not in TRITON_DTYPES:
        return f"the kernels take float16, bfloat16 and float32, got {dtype}"
    if geometry.most_items > MOST_ITEMS:
        return f"the kernels take at most {MOST_ITEMS} pixels or weights, got {geometry.most_items}"
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
    return import_module(".kernels.packing", __spec__.parent).INTERPRETED.value
