"""``gconv.profile``: time each convolution of a network, and estimate the gain from gconv."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gconv import dispatch
from gconv.measure.problem import TYPES, Problem
from gconv.measure.profiled import Profile, ProfiledConvolution
from gconv.measure.recorder import RecordedCall, record
from gconv.measure.terminal import track
from gconv.measure.timing import Times, copy_speed, sets_of_operands, time_together, wall_time
from gconv.torch_internals import own_buffers, tree_leaves, uncompiled


def profile(model: nn.Module, example_input: Tensor | tuple[Any, ...]) -> Profile:
    """Time each convolution of a network, and estimate how much faster gconv would make the network.

    In training mode a training step runs, and the gradients of the convolutions are timed too. In evaluation
    mode a forward pass runs without gradients. Autocast applies if it is on. The network may be converted.

    The network runs once to record its convolutions, and a few times on PyTorch's own convolutions to be
    timed. Then each pass of each convolution is timed separately: on PyTorch, and for grouped convolutions on
    a GPU also on gconv's kernels. Parameters and their gradients don't change, and buffers are restored, but
    random numbers are drawn.

    Args:
        model: a network; a compiled network runs eagerly.
        example_input: the input, or a tuple of the positional arguments. On meta nothing is timed.

    Returns:
        The convolutions with their times, memory floors and the backends that ``auto`` chooses. ``print`` it
        for a table; ``Profile.plot`` draws it.

    Raises:
        TypeError: ``model`` isn't a module, or is a TorchScript module, or returns no tensor with a gradient
            in training mode; or ``example_input`` contains no tensor.
        ValueError: the model has lazy layers that haven't seen an input yet.
        Exception: the model raises an error on the input.

    Examples:
        >>> model = torchvision.models.resnext50_32x4d().eval()
        >>> result = gconv.profile(model, torch.randn(32, 3, 224, 224))
        >>> print(result)
        >>> result.plot("layers.svg")
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "the convolutions of a TorchScript module can't be recorded: profile before torch.jit.script"
        )
    model = uncompiled(model)  # calls inside compiled graphs can't be recorded
    arguments = _arguments(example_input)
    if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        raise ValueError(
            "the model has lazy layers that haven't seen an input yet: run it once before profiling"
        )
    calls, network, training = _run_network(model, arguments)
    distinct = list(dict.fromkeys(replace(call, name="") for call in calls))
    measured = {call: _measure(call) for call in track(distinct, "measuring convolutions", lines=0)}
    convolutions = [replace(measured[replace(call, name="")], call=call) for call in calls]
    return Profile(tuple(convolutions), training, network)


def _arguments(example_input: Any) -> tuple[Any, ...]:
    """Return the positional arguments of the model, which must contain a tensor."""
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(arguments)):
        raise TypeError(
            "example_input must be a tensor, such as torch.randn(8, 3, 224, 224), or a tuple of the model's "
            f"arguments, got {example_input!r}"
        )
    return arguments


def _run_network(
    model: nn.Module, arguments: tuple[Any, ...]
) -> tuple[list[RecordedCall], float | None, bool]:
    """Run a network; return its convolutions, the seconds of a run, and whether that is a training step."""
    training = model.training and not torch.is_inference_mode_enabled()
    with _buffers_kept(model), torch.set_grad_enabled(training):
        calls = record(model, lambda: model(*arguments))
        if not calls or calls[0].device.type == "meta":
            return calls, None, training
        with dispatch.backend("aten"):
            network = wall_time(lambda: _step(model, arguments), calls[0].device, seconds=0).p50
    return calls, network, training


def _step(model: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Run a forward pass, and a backward pass if gradients are on, without changing any ``grad``."""
    outputs = tree_leaves(model(*arguments))
    tensors = (*model.parameters(), *(leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)))
    inputs = [tensor for tensor in tensors if tensor.requires_grad]
    if not inputs or not torch.is_grad_enabled():
        return
    roots = [output for output in outputs if isinstance(output, Tensor) and output.requires_grad]
    if not roots:
        raise TypeError(
            "in training mode the model must return a tensor with a gradient, or a tuple, list or dict that "
            "contains one: return one, or profile the model in evaluation mode"
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
    """Find the backend of each pass, and time the passes on each backend; on a GPU in both layouts."""
    if call.device.type == "meta":
        return ProfiledConvolution(call, _decide(call), {}, None)
    other = None
    if call.device.type == "cuda" and call.layout == "contiguous" and call.convolution.kind.dims == 2:
        other = _measure(replace(call, layout="channels_last"))
    times = {pass_: _time(call, pass_) for pass_ in call.passes}
    seconds = {pass_: {name: t.p50 for name, t in by_backend.items()} for pass_, by_backend in times.items()}
    spread = max((t.spread for by_backend in times.values() for t in by_backend.values()), default=0.0)
    floor = call.convolution.compulsory_bytes(call.dtype.itemsize) / copy_speed(call.device)
    return ProfiledConvolution(call, _decide(call), seconds, len(call.passes) * floor, other, spread)


def _decide(call: RecordedCall) -> dict[str, tuple[str, str]]:
    """Return the backend that "auto" chooses for each pass, and why."""
    if call.convolution.groups == 1:
        return dict.fromkeys(call.passes, ("aten", "dense"))
    turn = call.convolution.kind.pass_of_geometry
    passes = list(map(turn, call.passes))
    decided = dispatch.explain_call("auto", call.device, call.layout, call.dtype, call.convolution, passes)
    return {turn(pass_): decision[:2] for pass_, decision in decided.items()}


def _time(call: RecordedCall, pass_: str) -> dict[str, Times]:
    """Return the times of a pass on each backend that can run it.

    Returns none for types that aren't measured, and if the GPU runs out of memory.
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


def _time_problem(problem: Problem, call: RecordedCall) -> dict[str, Times]:
    """Return the times of a pass on PyTorch, and on the kernels if they run it without copies."""
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
        return time_together(contenders, call.device)


def _volume_runs(pass_: str, call: RecordedCall) -> list[Callable[[], Tensor]]:
    """Return functions that run a pass of a 3-d convolution on PyTorch, each with different operands.

    If "same" needs one more zero on one side than on the other, both sides get it here.
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
