"""From tensors and a plan to a running kernel."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from gconv.kernels.device import Device, device_of, precision_of
from gconv.kernels.tiles import Tile
from gconv.torch_internals import current_cuda_device

NEWEST_TRITON = "3.9"  # that `make compat` has run; the newest pair of pyproject.toml
PLANS_KEPT = 4096  # of each pass; images of ever new sizes must not fill the memory
ALIGNMENT = 16  # bytes; Triton compiles another kernel for tensors that start elsewhere


class OperandLayout(NamedTuple):
    """What a plan needs to know of the two tensors that a pass multiplies.

    Args:
        first, second: their strides.
        dtype: that of both.
        precision: how float32 is multiplied, "tf32" or "ieee".
        device: where they are.
    """

    first: tuple[int, ...]
    second: tuple[int, ...]
    dtype: torch.dtype
    precision: str
    device: Device

    @classmethod
    def of(cls, first: Tensor, second: Tensor) -> OperandLayout:
        """Describe two tensors, under PyTorch's present settings."""
        dtype, device = first.dtype, device_of(first.device)
        return cls(first.stride(), second.stride(), dtype, precision_of(dtype), device)

    def upright(self) -> OperandLayout:
        """The same with rows for columns."""
        first, second = ((*strides[:2], strides[3], strides[2]) for strides in (self.first, self.second))
        return self._replace(first=first, second=second)

    @property
    def kind(self) -> tuple[torch.dtype, str, Device]:
        """What the choice of a tile needs to know."""
        return self.dtype, self.precision, self.device


class Fusion(NamedTuple):
    """What runs inside a kernel beside the convolution: its prologue (:mod:`.prologue`) and its epilogue.

    Args:
        bias: added to the sums.
        activation: None, "relu", "relu6", "silu" or "hardswish", after bias and residual.
        prologue: whether batch norm and ReLU are applied to x.
        epilogue: "plain", "residual", "moments" or "gradient" (:mod:`.epilogue`).
    """

    bias: bool = False
    activation: str | None = None
    prologue: bool = False
    epilogue: str = "plain"

    @classmethod
    def of(cls, bias: Tensor | None, activation: str | None, residual: Tensor | None) -> Fusion:
        """What follows a convolution without batch norm; tensors or None."""
        return cls(bias is not None, activation, epilogue="plain" if residual is None else "residual")

    @property
    def has_norm(self) -> bool:
        """Whether the kernel reads a batch norm."""
        return self.prologue or self.epilogue == "gradient"

    @property
    def has_side(self) -> bool:
        """Whether the kernel reads another tensor of y's size: a residual, or x of a gradient."""
        return self.epilogue in ("residual", "gradient")

    @property
    def absent(self) -> frozenset[str]:
        """The tensors that the kernels of forward pass and input gradient get None for, by name."""
        present = {
            "p_bias": self.bias,
            "p_norm": self.has_norm,
            "p_side": self.has_side,
            "p_sums": self.epilogue in PARTIALS,
        }
        return frozenset(name for name, there in present.items() if not there)


PLAIN = Fusion()
PARTIALS = {"moments": 3, "gradient": 2}  # numbers that a program leaves of each channel


@dataclass(frozen=True, slots=True, eq=False)
class Launch:
    """A kernel and everything it is started with except the tensors; made once for each geometry.

    Triton's own launcher looks at every argument to find the binary that fits, which takes the host longer
    than all the rest of a call. So the binary it found is kept, and started directly.

    Args:
        kernel: the ``triton.jit`` function.
        programs: size of the grid, which has one axis.
        arguments: those that follow the tensors, by name, in the kernel's order.
        tile: what the kernel works in.
        absent: names of the tensors that it is called with None for.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    tile: Tile
    absent: frozenset[str]
    _started: dict[tuple[Any, ...], Callable[..., None]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        kernel: Any,
        programs: int,
        arguments: dict[str, Any],
        tile: Tile,
        absent: Collection[str] = (),
    ) -> Launch:
        """Check that ``arguments`` are those of the kernel, all of them and no others, and sort them.

        Args:
            absent: names of the tensors that are None; of these, only those that the kernel takes count.

        Raises:
            TypeError: an argument is missing, or unknown to the kernel.
        """
        names = [name for name in kernel.arg_names if not name.startswith("p_")]
        if wrong := arguments.keys() ^ set(names):
            raise TypeError(f"{kernel.__name__} takes {names}; missing or unknown: {sorted(wrong)}")
        none = frozenset(absent) & set(kernel.arg_names)
        return cls(kernel, programs, {name: arguments[name] for name in names}, tile, none)

    def __call__(self, first: Tensor, *others: Tensor | None) -> None:
        """Start the kernel on its tensors, in its order, None for those that are absent."""
        device, tensors = first.device, (first, *others)
        if device.type != "cuda" or device.index == current_cuda_device():
            return self._start(device, tensors)
        with torch.cuda.device(device):
            self._start(device, tensors)

    def _start(self, device: torch.device, tensors: tuple[Tensor | None, ...]) -> None:
        addresses = 0
        kinds: list[Any] = [device.index]  # what Triton compiles for, beside the plan's own arguments
        for tensor in tensors:
            if tensor is None:
                kinds.append(None)
            else:
                addresses |= tensor.data_ptr()
                kinds.append(tensor.dtype)
        if addresses % ALIGNMENT:
            self._start_through_triton(tensors)
            return
        start = self._started.get(key := tuple(kinds))
        if start is not None:
            return start(tensors)
        compiled = self._start_through_triton(tensors)
        if compiled is not None:  # None: the interpreter's
            self._started[key] = starter(compiled, self.programs, device, (*self.arguments.values(),))

    def _start_through_triton(self, tensors: tuple[Tensor | None, ...]) -> Any:
        note_untested_triton()
        return self.kernel[(self.programs,)](*tensors, **self.arguments, **self.tile.options)


def starter(
    compiled: Any, programs: int, device: torch.device, arguments: tuple[Any, ...]
) -> Callable[[tuple[Tensor | None, ...]], None]:
    """Return a function that starts a compiled kernel on tensors, on the current stream of ``device``.

    Does what ``compiled[grid](...)`` does in Triton 3.6 to 3.9, which takes twice as long because it gathers
    what a hook around launches might ask for. Where there is one, such as Proton's, it is called itself.
    """
    through_hooks = compiled[(programs, 1, 1)]
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    stream_of, index = driver.active.get_current_stream, device.index or 0
    runtime = triton.knobs.runtime

    def start(tensors: tuple[Tensor | None, ...]) -> None:
        if has_hook(runtime.launch_enter_hook) or has_hook(runtime.launch_exit_hook):
            return through_hooks(*tensors, *arguments)
        run(programs, 1, 1, stream_of(index), function, metadata, None, None, None, *tensors, *arguments)

    return start


def has_hook(chain: Any) -> bool:
    """Whether a chain of Triton's hooks, which may be None or empty, calls anything."""
    return bool(getattr(chain, "calls", chain))


@cache
def note_untested_triton() -> None:
    """Log one line, once, if Triton is newer than any that gconv was tested with.

    A log record and not a warning: the caller's code cannot change it, and ``python -W error`` must not turn
    a kernel that may well work into an exception.
    """
    installed, tested = (
        tuple(map(int, re.findall(r"\d+", version)[:2])) for version in (triton.__version__, NEWEST_TRITON)
    )
    if installed > tested:
        logging.getLogger("gconv").warning(
            "gconv has not been tested with Triton %s, only up to %s; if a kernel fails, use backend='aten' "
            "or an older Triton",
            triton.__version__,
            NEWEST_TRITON,
        )


def channels_last(tensor: Tensor) -> Tensor:
    """``tensor``, copied only if its channels are not side by side in memory."""
    if tensor.stride(1) == 1 or tensor.shape[1] == 1:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last)


def empty_channels_last(size: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised tensor (N, C, H, W) with the channels side by side."""
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
