"""Start a kernel from tensors and a plan."""

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

NEWEST_TRITON = "3.9"  # the newest that `make compat` has run, as in pyproject.toml
PLANS_KEPT = 4096  # for each pass; bounds the memory if every image has a new size
ALIGNMENT = 16  # bytes; Triton compiles another kernel for tensors that aren't aligned to this


class OperandLayout(NamedTuple):
    """What a plan needs to know about the two tensors that a pass multiplies.

    Args:
        first, second: strides of the two tensors.
        dtype: of both.
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
        """Return the layout of two tensors, under PyTorch's current settings."""
        dtype, device = first.dtype, device_of(first.device)
        return cls(first.stride(), second.stride(), dtype, precision_of(dtype), device)

    def upright(self) -> OperandLayout:
        """Return the layout with rows and columns exchanged."""
        first, second = ((*strides[:2], strides[3], strides[2]) for strides in (self.first, self.second))
        return self._replace(first=first, second=second)

    @property
    def kind(self) -> tuple[torch.dtype, str, Device]:
        """What the choice of a tile depends on."""
        return self.dtype, self.precision, self.device


class Fusion(NamedTuple):
    """What a kernel computes besides the convolution: its prologue (``prologue.py``) and epilogue.

    Args:
        bias: whether a bias is added to the sums.
        activation: None, "relu", "relu6", "silu" or "hardswish", applied after bias and residual.
        prologue: whether batch norm and ReLU are applied to x.
        epilogue: "plain", "residual", "moments" or "gradient" (``epilogue.py``).
    """

    bias: bool = False
    activation: str | None = None
    prologue: bool = False
    epilogue: str = "plain"

    @classmethod
    def of(cls, bias: Tensor | None, activation: str | None, residual: Tensor | None) -> Fusion:
        """Return the fusion for a convolution without batch norm, from its tensors or None."""
        return cls(bias is not None, activation, epilogue="plain" if residual is None else "residual")

    @property
    def has_norm(self) -> bool:
        """Whether the kernel reads a batch norm."""
        return self.prologue or self.epilogue == "gradient"

    @property
    def has_side(self) -> bool:
        """Whether the kernel reads another tensor of the size of y: a residual, or x for a gradient."""
        return self.epilogue in ("residual", "gradient")

    @property
    def absent(self) -> frozenset[str]:
        """Names of the tensors that kernels of forward passes and input gradients get None for."""
        present = {
            "p_bias": self.bias,
            "p_norm": self.has_norm,
            "p_side": self.has_side,
            "p_sums": self.epilogue in PARTIALS,
        }
        return frozenset(name for name, there in present.items() if not there)


PLAIN = Fusion()
PARTIALS = {"moments": 3, "gradient": 2}  # numbers that a program stores for each channel


@dataclass(frozen=True, slots=True, eq=False)
class Launch:
    """A kernel and everything needed to start it except the tensors. Made once for each geometry.

    Triton's launcher looks at every argument to find the compiled binary that fits, which takes the host
    longer than all the rest of a call. So we keep that binary and start it directly.

    Args:
        kernel: the ``triton.jit`` function.
        programs: size of the grid, which has one axis.
        arguments: the arguments that follow the tensors, by name, in the kernel's order.
        tile: the tile that the kernel works in.
        absent: names of the tensors that the kernel gets None for.
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
        """Check that ``arguments`` are exactly those of the kernel, and sort them.

        Args:
            kernel, programs, arguments, tile: as in the class.
            absent: names of the tensors that are None. Names that the kernel doesn't have are ignored.

        Raises:
            TypeError: if an argument is missing, or the kernel doesn't have it.
        """
        names = [name for name in kernel.arg_names if not name.startswith("p_")]
        if wrong := arguments.keys() ^ set(names):
            raise TypeError(f"{kernel.__name__} expects {names}; missing or unknown: {sorted(wrong)}")
        none = frozenset(absent) & set(kernel.arg_names)
        return cls(kernel, programs, {name: arguments[name] for name in names}, tile, none)

    def __call__(self, first: Tensor, *others: Tensor | None) -> None:
        """Start the kernel on its tensors, in the kernel's order, with None for those that are absent."""
        device, tensors = first.device, (first, *others)
        if device.type != "cuda" or device.index == current_cuda_device():
            return self._start(device, tensors)
        with torch.cuda.device(device):
            self._start(device, tensors)

    def _start(self, device: torch.device, tensors: tuple[Tensor | None, ...]) -> None:
        addresses = 0
        kinds: list[Any] = [device.index]  # what Triton compiles for, in addition to the plan's arguments
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
        if compiled is not None:  # the interpreter returns None
            self._started[key] = starter(compiled, self.programs, device, (*self.arguments.values(),))

    def _start_through_triton(self, tensors: tuple[Tensor | None, ...]) -> Any:
        note_untested_triton()
        return self.kernel[(self.programs,)](*tensors, **self.arguments, **self.tile.options)


def starter(
    compiled: Any, programs: int, device: torch.device, arguments: tuple[Any, ...]
) -> Callable[[tuple[Tensor | None, ...]], None]:
    """Return a function that starts a compiled kernel on tensors, on the current stream of ``device``.

    It does what ``compiled[grid](...)`` does in Triton 3.6 to 3.9. That takes twice as long, because it
    gathers what a hook around launches might ask for. If there is a hook, such as Proton's, we call
    ``compiled[grid]``.
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
    """Return whether a chain of Triton's hooks, which may be None or empty, calls anything."""
    return bool(getattr(chain, "calls", chain))


@cache
def note_untested_triton() -> None:
    """Log one line, once, if Triton is newer than the newest that gconv was tested with.

    This is a log record and not a warning: users can't fix it in their code, and ``python -W error`` must not
    turn a kernel that may well work into an exception.
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
    """Return ``tensor``, copied only if its channels aren't adjacent in memory."""
    if tensor.stride(1) == 1 or tensor.shape[1] == 1:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last)


def empty_channels_last(size: tuple[int, ...], like: Tensor) -> Tensor:
    """Return an uninitialized tensor (N, C, H, W) in channels_last."""
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
