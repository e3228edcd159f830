"""``profile``: time each convolution of a network, and estimate what gconv would gain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gconv import dispatch
from gconv.measure.problem import TYPES, Problem
from gconv.measure.recorder import RecordedCall, record
from gconv.measure.terminal import track
from gconv.measure.timing import copy_speed, sets_of_operands, time_together, wall_time
from gconv.text import columns
from gconv.torch_internals import own_buffers, tree_leaves, uncompiled


@dataclass(frozen=True)
class ProfiledConvolution:
    """One convolution of a network, and its times.

    Attributes:
        call: name, sizes, type, layout and passes.
        backends: the backend that ``auto`` takes for each pass, and why; "aten" for dense convolutions, which
            ``convert`` leaves.
        seconds: times by pass and backend, for those that were measured.
        floor: seconds that the passes take at least, to move their operands once; None on meta.
        in_channels_last: the same convolution in channels_last, as after ``convert``, if it is a 2-d one that
            runs contiguous on a GPU; else None.
    """

    call: RecordedCall
    backends: Mapping[str, tuple[str, str]]
    seconds: Mapping[str, Mapping[str, float]]
    floor: float | None
    in_channels_last: ProfiledConvolution | None = None

    @property
    def converted(self) -> ProfiledConvolution:
        """The convolution as it runs after ``convert``."""
        return self.in_channels_last or self

    @property
    def grouped(self) -> bool:
        """Whether there is more than one group."""
        return self.call.convolution.groups > 1

    def total(self, backend: str) -> float | None:
        """Seconds of all passes on "auto", "aten" or "triton"; None if one was not measured."""
        chosen = {p: self.backends[p][0] if backend == "auto" else backend for p in self.call.passes}
        return _sum(self.seconds.get(p, {}).get(name) for p, name in chosen.items())


@dataclass(frozen=True)
class Profile:
    """What :func:`profile` measured; ``print`` it as a table.

    Attributes:
        convolutions: the convolutions, in the order in which they ran.
        training: whether a training step ran, or a forward pass without gradients.
        network: seconds that the whole network took with PyTorch's own convolutions; None on meta.
    """

    convolutions: tuple[ProfiledConvolution, ...]
    training: bool
    network: float | None

    def total(self, backend: str, grouped: bool = False) -> float | None:
        """Seconds of all convolutions, or of the grouped ones; None if one of them was not measured.

        ``backend`` is "auto", "aten", "triton" or "floor".
        """
        chosen = [c for c in self.convolutions if c.grouped or not grouped]
        return _sum(c.floor if backend == "floor" else c.total(backend) for c in chosen)

    def total_converted(self, grouped: bool = False) -> float | None:
        """Seconds of all convolutions, or of the grouped ones, after ``convert``.

        Grouped convolutions run as ``auto`` decides, including depthwise ones, which ``convert`` takes on
        request. On a GPU all run in channels_last. None if one of them was not measured.
        """
        chosen = [c for c in self.convolutions if c.grouped or not grouped]
        return _sum(c.converted.total("auto" if c.grouped else "aten") for c in chosen)

    @property
    def network_with_gconv(self) -> float | None:
        """Seconds that the network would take after ``convert``, if all else took as long as now."""
        before, after = self.total("aten"), self.total_converted()
        if self.network is None or before is None or after is None:
            return None
        return self.network - before + after

    def __str__(self) -> str:
        run = "training step" if self.training else "forward pass"
        if not self.convolutions:
            return (
                f"no convolution called in a {run}; "
                "calls inside an exported or otherwise compiled graph do not show"
            )
        first = self.convolutions[0].call
        lines = [
            f"{len(self.convolutions)} convolutions in a {run}, {first.dtype} on {first.device}, in us",
            *["cl: in channels_last, as after gconv.convert"] * self._has_both_layouts,
            columns(self._rows(), left=3, rule=True),
            "",
            columns(self._summary(), left=1),
        ]
        return "\n".join([*lines, *self._remarks()])

    @property
    def _has_both_layouts(self) -> bool:
        return any(c.in_channels_last for c in self.convolutions)

    def _rows(self) -> list[tuple[str, ...]]:
        """Return a row for each convolution, below a head."""
        timed = [b for b in ("aten", "triton") if any(c.total(b) is not None for c in self.convolutions)]
        both = [f"{b} cl" for b in timed] if self._has_both_layouts else []
        rows: list[tuple[str, ...]] = [("layer", "convolution", "auto", "floor", *timed, *both)]
        for c in self.convolutions:
            names = {p: c.converted.backends[p][0] for p in c.call.passes}
            auto = names["forward"] if len({*names.values()}) == 1 else "/".join(names.values())
            times = [c.floor, *map(c.total, timed), *(map(c.converted.total, timed) if both else ())]
            name = c.call.name or "(the model)"
            shown = map(_microseconds, times)
            rows.append((name, str(c.call.convolution), auto if c.grouped else "dense", *shown))
        return rows

    def _summary(self) -> list[tuple[str, ...]]:
        """Return rows with the totals: the floor, now, and after ``convert``."""
        after = self.network_with_gconv
        gain = "" if self.network is None or after is None else f"{self.network / after:.2f}x"
        rows = (
            ("floor", self.total("floor"), self.total("floor", grouped=True), None, ""),
            ("now", self.total("aten"), self.total("aten", grouped=True), self.network, ""),
            ("converted", self.total_converted(), self.total_converted(grouped=True), after, gain),
        )
        shown = [(name, *map(_microseconds, times), note) for name, *times, note in rows]
        return [("", "all", "grouped", "network", ""), *shown]

    def _remarks(self) -> Iterator[str]:
        """Yield the lines below the tables."""
        grouped = [c for c in self.convolutions if c.grouped]
        if not grouped:
            yield "none of them is grouped: there is nothing to gain"
        decided = [c.converted.backends[p] for c in grouped for p in c.call.passes]
        reasons = dict.fromkeys(reason for backend, reason in decided if backend == "aten")
        yield from (f"aten: {reason}" for reason in reasons)
        unmeasured = {str(c.call.dtype) for c in self.convolutions if c.floor and c.total("aten") is None}
        if unmeasured:
            yield f"not timed one by one: {', '.join(sorted(unmeasured))}"
        depthwise = sum(c.call.convolution.channels_per_group[0] == 1 for c in grouped)
        if depthwise:
            are = "is" if depthwise == 1 else "are"
            yield f"{depthwise} of the grouped ones {are} depthwise: convert(..., depthwise=True) swaps those"


def profile(model: nn.Module, example_input: Tensor | tuple[Any, ...]) -> Profile:
    """Run a network, time each of its convolutions, and estimate what the network would gain from gconv.

    The network may be converted or not. In training mode it runs with gradients, and those of the
    convolutions are timed as well; in evaluation mode without. Autocast applies if it is on. The network runs
    once to record its convolutions, and a few times to be timed, on PyTorch's own convolutions. Then the
    passes of each convolution are timed separately, on PyTorch's, and on a GPU also on gconv's kernels if
    there is more than one group. Buffers get their values back, and parameters and their gradients are not
    changed, but random numbers are drawn.

    Args:
        model: a network; a compiled one is run eagerly.
        example_input: its input, or a tuple of its positional arguments; on meta nothing is timed.

    Returns:
        The convolutions with their times, the memory floor and the backend that ``auto`` takes; ``print`` it.

    Raises:
        TypeError: ``model`` is not a module, or is a TorchScript module, or returns no tensor with a gradient
            in training mode.
        ValueError: the model has lazy layers that have not seen an input yet.
        Exception: whatever the model raises on the input.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("what a TorchScript module calls cannot be seen: profile before torch.jit.script")
    model = uncompiled(model)  # in compiled graphs no call is seen
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        raise ValueError("the model has lazy layers that have seen no input: run it once before")
    calls, network, training = _run_network(model, arguments)
    distinct = list(dict.fromkeys(replace(call, name="") for call in calls))
    measured = {call: _measure(call) for call in track(distinct, "measuring convolutions", lines=0)}
    convolutions = [replace(measured[replace(call, name="")], call=call) for call in calls]
    return Profile(tuple(convolutions), training, network)


def _run_network(
    model: nn.Module, arguments: tuple[Any, ...]
) -> tuple[list[RecordedCall], float | None, bool]:
    """Run a network; return its convolutions, the seconds of a run, and whether it was a training step."""
    training = model.training and not torch.is_inference_mode_enabled()
    with _buffers_kept(model), torch.set_grad_enabled(training):
        calls = record(model, lambda: model(*arguments))
        if not calls or calls[0].device.type == "meta":
            return calls, None, training
        with dispatch.backend("aten"):
            network = wall_time(lambda: _step(model, arguments), calls[0].device, seconds=0).p50
    return calls, network, training


def _step(model: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Run a forward pass, and a backward pass if gradients are on, which leaves every ``grad`` alone."""
    outputs = tree_leaves(model(*arguments))
    tensors = (*model.parameters(), *(leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)))
    inputs = [tensor for tensor in tensors if tensor.requires_grad]
    if not inputs or not torch.is_grad_enabled():
        return
    roots = [output for output in outputs if isinstance(output, Tensor) and output.requires_grad]
    if not roots:
        raise TypeError(
            "in training mode the model must return a tensor with a gradient, or a tuple, list or dict of "
            "such: profile it in evaluation mode, or return one"
        )
    torch.autograd.grad(roots, inputs, [torch.ones_like(root) for root in roots], allow_unused=True)


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restore the values of buffers, such as a batch norm's running statistics, after the block."""
    modules = [(module, dict(own_buffers(module))) for module in model.modules()]
    buffers = [buffer for _, named in modules for buffer in named.values() if buffer is not None]
    values = [buffer.detach().clone() for buffer in buffers]
    try:
        yield
    finally:
        for module, named in modules:
            own_buffers(module).update(named)
        with torch.no_grad():
            for buffer, value in zip(buffers, values, strict=True):
                if not buffer.is_meta and not torch.equal(buffer, value):
                    buffer.copy_(value)


def _measure(call: RecordedCall) -> ProfiledConvolution:
    """Decide who runs each pass, and time the passes on each backend; on a GPU in both layouts."""
    if call.device.type == "meta":
        return ProfiledConvolution(call, _decide(call), {}, None)
    other = None
    if call.device.type == "cuda" and call.layout == "contiguous" and call.convolution.kind.dims == 2:
        other = _measure(replace(call, layout="channels_last"))
    seconds = {pass_: _time(call, pass_) for pass_ in call.passes}
    floor = call.convolution.compulsory_bytes(call.dtype.itemsize) / copy_speed(call.device)
    return ProfiledConvolution(call, _decide(call), seconds, len(call.passes) * floor, other)


def _decide(call: RecordedCall) -> dict[str, tuple[str, str]]:
    """Return the backend that "auto" takes for each pass, and why."""
    if call.convolution.groups == 1:
        return dict.fromkeys(call.passes, ("aten", "dense"))
    turn = call.convolution.kind.pass_of_geometry
    passes = list(map(turn, call.passes))
    decided = dispatch.explain_call("auto", call.device, call.layout, call.dtype, call.convolution, passes)
    return {turn(pass_): decision[:2] for pass_, decision in decided.items()}


def _time(call: RecordedCall, pass_: str) -> dict[str, float]:
    """Return the seconds of a pass on each backend that can run it.

    Empty for types that are not measured, and if the GPU's memory is too small to measure.
    """
    type_ = next((name for name, (dtype, _) in TYPES.items() if dtype == call.dtype), None)
    if type_ is None:
        return {}
    try:
        return _time_problem(
            Problem(call.convolution.kind.pass_of_geometry(pass_), call.geometry, type_), call
        )
    except torch.OutOfMemoryError:
        return {}


def _time_problem(problem: Problem, call: RecordedCall) -> dict[str, float]:
    """Return the seconds of a problem on PyTorch, and on the kernels if they can run it without copies."""
    depth, geometry = call.convolution.depth, call.geometry
    sets = problem.draw_sets(call.device, call.layout)
    contenders: dict[str, list[Callable[[], Any]]] = {"aten": [partial(problem.run_pytorch, o) for o in sets]}
    if depth is not None:
        contenders["aten"] = _volume_runs(problem.pass_, call)
    kernels_run = dispatch.why_not_triton(call.device, call.dtype, geometry) is None
    copies = depth is not None and not (depth.folds and call.layout == "channels_last")
    if geometry.groups > 1 and call.device.type == "cuda" and kernels_run and not copies:
        contenders["triton"] = [partial(problem.run, operands, "triton") for operands in sets]
    with torch.no_grad(), torch.autocast(call.device.type, enabled=False):
        return {name: times.p50 for name, times in time_together(contenders, call.device).items()}


def _volume_runs(pass_: str, call: RecordedCall) -> list[Callable[[], Tensor]]:
    """Return runs of PyTorch's own pass of a 3-d convolution, each on other operands.

    If "same" needs one zero more on one side, it is timed with one more on both.
    """
    stride, padding, dilation, groups = call.convolution.settings
    sizes = call.convolution.input_size, call.convolution.weight_size
    if padding == "same":
        padding = tuple([-(-d * (k - 1) // 2) for d, k in zip(dilation, sizes[1][2:], strict=True)])
    layout = torch.channels_last_3d if call.layout == "channels_last" else torch.contiguous_format

    def draw() -> Callable[[], Tensor]:
        x, w = (torch.randn(size, dtype=call.dtype, device=call.device) for size in sizes)
        x = (x if x.ndim == 5 else x.unsqueeze(0)).contiguous(memory_format=layout)
        forward = partial(torch.conv3d, x, w, None, stride, padding, dilation, groups)
        if pass_ == "forward":
            return forward
        mask = [pass_ == "input_grad", pass_ == "weight_grad", False]
        settings = (stride, padding, dilation, False, [0, 0, 0], groups)
        dy = torch.randn_like(forward())
        return lambda: torch.ops.aten.convolution_backward(dy, x, w, None, *settings, mask)[mask.index(True)]

    bytes_of_one = call.convolution.compulsory_bytes(call.dtype.itemsize)
    return [draw() for _ in range(sets_of_operands(bytes_of_one, call.device))]


def _sum(times: Iterable[float | None]) -> float | None:
    """Add times up; None if one of them was not measured."""
    total = 0.0
    for time in times:
        if time is None:
            return None
        total += time
    return total


def _microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:,.0f}"
