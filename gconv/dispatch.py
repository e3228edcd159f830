"""Choose the backend of each pass. No other module makes this choice.

``aten_alone`` decides once per call whether PyTorch's own function runs all of it. If not, each pass
calls ``backend_for`` when it runs, because a gradient can have another layout than the input and so run
on another backend. ``explain_call`` makes the same decisions in advance, with reasons, for reports.
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
MOST_ITEMS = 2**31 - 2**10  # kernels index pixels and weights with 32 bits, in complete tiles
# "auto" runs the kernels in an eager call only if a pass is known to take at least this many microseconds on
# the device. Launching the kernels takes the host some tens of microseconds longer than F.conv2d
# (benchmarks/README.md). If a convolution is shorter, so are the layers around it: the device waits for the
# host, and a faster kernel gains nothing.
HOST = 25.0

# A plain global, because torch.compile guards on it and recompiles when it changes. It can't trace a
# ContextVar and doesn't guard on thread-local state.
_current = "auto"


def backend(name: str) -> AbstractContextManager[None]:
    """Select the backend of all grouped convolutions in a ``with`` block, and of their backward passes.

    The setting applies to the entire process, like those of ``torch.backends``. The ``backend`` argument of a
    call overrides it.

    Args:
        name: the backend.

            - "auto": the fastest for each pass (the default outside of any block)
            - "triton": gconv's Triton kernels
            - "aten": PyTorch's own convolution
            - "reference": each pass written as its equation in plain PyTorch; slow, for comparisons

    Returns:
        A context manager.

    Raises:
        ValueError: ``name`` is not a backend.

    Examples:
        >>> layer = gconv.GroupConv2d(8, 8, 3, groups=4)
        >>> with gconv.backend("reference"):
        ...     y = layer(torch.randn(1, 8, 5, 5))
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
    """Return the backend that a call requests: its argument, or that of the enclosing ``with backend(...)``.

    In an export to ONNX it is always "aten", because other programs can't run gconv's operators.
    """
    if name is not None:
        check_backend(name)
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        return "aten"
    return _current if name is None else name


def check_backend(name: str) -> None:
    """Raise ValueError unless ``name`` is a backend."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")


class Decision(NamedTuple):
    """The backend that runs a pass, and why.

    Args:
        backend: a key of ``IMPLEMENTATIONS``.
        reason: the reason for the choice, as text.
        least: lower bound of the time that the pass takes on "aten", in microseconds; 0 if unknown.
    """

    backend: str
    reason: str
    least: float = 0.0


def aten_alone(name: str, input: Tensor, dtype: torch.dtype, call: Call) -> bool:
    """Whether all passes of a call run on "aten", so that PyTorch's own function can run it.

    Raises:
        RuntimeError: "triton" was requested and can't run.
    """
    if name == "auto":
        return not (input.is_cuda and _kernels_could_pay(input, dtype, call))
    if name == "triton" and not torch.compiler.is_compiling():
        _require_triton(input.device, dtype, call.geometry)  # a compiled graph checks this when it runs
    return name == "aten"


def decide_by_auto(
    pass_: str, device: torch.device, layout: str, dtype: torch.dtype, geometry: ConvGeometry
) -> Decision:
    """Decide as "auto" does, for tensors on ``device`` in ``layout``: "channels_last" or "contiguous"."""
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
    """Decide which backend runs each pass of an eager call.

    "auto" selects the kernels only if at least one of the passes that they would run takes ``HOST`` or longer
    on the device. In a compiled graph ``backend_for`` decides each pass independently.

    Args:
        name: the requested backend, one of ``BACKENDS``.
        device: device of the tensors.
        layout: layout of the tensors, "channels_last" or "contiguous".
        dtype: dtype that the passes run in.
        call: the call.
        passes: passes of the call's geometry. Defaults to None: those that it needs with the current grad
            mode.

    Returns:
        The decision for each pass of the geometry.

    Raises:
        RuntimeError: "triton" was requested and can't run.
    """
    passes = call.passes if passes is None else passes
    geometry = call.geometry
    if name == "triton":
        _require_triton(device, dtype, geometry)
    if name != "auto":
        return dict.fromkeys(passes, Decision(name, "requested"))
    if device.type == "cuda" and (problem := _why_not_folded(call, layout)):
        return dict.fromkeys(passes, Decision("aten", problem))
    found = {pass_: decide_by_auto(pass_, device, layout, dtype, geometry) for pass_ in passes}
    taken = [decision.least for decision in found.values() if decision.backend == "triton"]
    if not taken or max(taken) >= HOST:
        return found
    reason = (
        f"too small to gain in an eager call: PyTorch may take only {max(taken):.2g} us on the GPU, "
        f"less than {HOST:g}, and the CPU takes longer to launch the kernels; use torch.compile or "
        "backend='triton'"
    )
    return {
        pass_: Decision("aten", reason if decision.backend == "triton" else decision.reason, decision.least)
        for pass_, decision in found.items()
    }


def _why_not_folded(call: Call, layout: str) -> str | None:
    """Return why "auto" runs a 3-d convolution on PyTorch, or None if it needs no copy."""
    if call.depth is None or (call.depth.folds and layout == "channels_last"):
        return None
    if call.depth.folds:
        return "a contiguous input would be copied: gconv's kernels need 3-d inputs in channels_last_3d"
    return "a kernel, stride or padding in depth would require a copy of the input, so PyTorch runs it"


def backend_for(pass_: str, name: str, operand: Tensor, geometry: ConvGeometry) -> Backend:
    """Choose the backend of one pass of a call that doesn't run on "aten" entirely.

    Args:
        pass_: one of ``PASSES``.
        name: the requested backend, one of ``BACKENDS``.
        operand: the tensor whose device, dtype and layout decide: x, or dy for the input gradient.
        geometry: the sizes.

    Raises:
        RuntimeError: "triton" was requested and can't run.
    """
    if name == "triton":
        _require_triton(operand.device, operand.dtype, geometry)
    elif name == "auto":
        layout = layout_of(operand)
        name = decide_by_auto(pass_, operand.device, layout, operand.dtype, geometry).backend
    return _load(name)


@cache
def _load(backend: str) -> Backend:
    """Import the module of a backend on first use."""
    return cast(Backend, import_module(IMPLEMENTATIONS[backend], __spec__.parent))


@cache
def _kernels() -> ModuleType:
    """Return the module of the kernels, which also predicts whether they are faster."""
    return import_module(IMPLEMENTATIONS["triton"], __spec__.parent)


def _kernels_could_pay(input: Tensor, dtype: torch.dtype, call: Call) -> bool:
    """Whether ``explain_call`` would choose "triton" for any pass of the call.

    While Dynamo traces, there are no numbers to look up, so this only rules out what can't run on the
    kernels.
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
    """Return the current GPU, or the CPU if there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _require_triton(device: torch.device, dtype: torch.dtype, geometry: ConvGeometry) -> None:
    if problem := why_not_triton(device, dtype, geometry):
        raise RuntimeError(f"backend='triton' can't run here: {problem}")


def why_not_triton(device: torch.device, dtype: torch.dtype, geometry: ConvGeometry) -> str | None:
    """Return why the kernels can't run, or None if they can."""
    if not TRITON_INSTALLED:
        return "Triton isn't installed: pip install triton"
    if problem := _device_problem(device):
        return problem
    if dtype not in TRITON_DTYPES:
        return f"the kernels support float16, bfloat16 and float32, got {dtype}"
    if geometry.most_items > MOST_ITEMS:
        return f"the kernels support at most {MOST_ITEMS} pixels or weights, got {geometry.most_items}"
    return None


@cache
def _device_problem(device: torch.device) -> str | None:
    """Return why the kernels can't run on ``device``, or None if they can; on "meta" nothing runs."""
    if device.type == "cuda":
        old = torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)
        return "the kernels need a GPU of compute capability 8.0 or newer" if old else None
    if device.type == "meta" or (device.type == "cpu" and _interpreted()):
        return None
    return (
        f"the kernels need a CUDA or ROCm device, got {device.type}; "
        "to test them on the CPU, slowly, set TRITON_INTERPRET=1 in the environment"
    )


def _interpreted() -> bool:
    """Whether Triton runs in its interpreter, which is decided when the kernels are first imported."""
    return import_module(".kernels.packing", __spec__.parent).INTERPRETED.value
