"""Record the convolutions that a network calls as it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from gconv.arguments import prepare
from gconv.geometry import PASSES, ConvGeometry
from gconv.kinds import KINDS, Call, Kind, layout_of
from gconv.module import LAYERS

# gconv's functions have the arguments of PyTorch's functions, followed by some more.
_OWN = {layer._gconv_function: layer._gconv_kind for layer in LAYERS}
_KINDS = _OWN | {kind.pytorch: kind for kind in KINDS}
_SIGNATURES = {kind: inspect.signature(function) for function, kind in _OWN.items()}


@dataclass(frozen=True)
class RecordedCall:
    """A call of a convolution.

    Attributes:
        name: qualified name of the innermost module that was running.
        convolution: kind, sizes and settings of the convolution.
        dtype: the type that it ran in. With autocast on, this is autocast's type.
        device: the input's device.
        layout: the input's layout, a key of ``gconv.measure.problem.LAYOUTS``.
        passes: members of ``gconv.geometry.PASSES``: "forward", and the gradients that a backward pass needs.
            For a transposed convolution these are passes of the call itself, not of its ``geometry``, where
            forward and input gradient are exchanged.
    """

    name: str
    convolution: Call
    dtype: torch.dtype
    device: torch.device
    layout: str
    passes: tuple[str, ...]

    @property
    def geometry(self) -> ConvGeometry:
        """Sizes and settings of the 2-d convolution whose passes compute this call."""
        return self.convolution.geometry


def record(model: nn.Module, run: Callable[[], Any]) -> list[RecordedCall]:
    """Call ``run`` and return the convolutions that it calls, in order.

    Args:
        model: the network. Its modules' names identify the calls.
        run: runs the network.

    Returns:
        Calls of ``F.conv2d``, ``gconv.group_conv2d`` and their 1-d, 3-d and transposed counterparts,
        except calls inside compiled graphs, which can't be seen.
    """
    running: list[str] = []
    with ExitStack() as hooks, _Recorder(running) as recorder:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # it doesn't accept these hooks, and a mode doesn't see its calls
            enter = module.register_forward_pre_hook(lambda *_, name=name: running.append(name), prepend=True)
            leave = module.register_forward_hook(lambda *_: _leave(running), always_call=True)
            hooks.callback(enter.remove)
            hooks.callback(leave.remove)
        run()
    return recorder.calls


def grouped_convolutions(model: Callable[[], nn.Module], size: Sequence[int]) -> list[ConvGeometry]:
    """Return the distinct grouped convolutions of a network, without computing any of them.

    Args:
        model: a function that returns the network.
        size: size of its input without the batch, such as (C, H, W).

    Returns:
        The sizes of the 2-d convolutions that compute them.
    """
    with torch.device("meta"), torch.no_grad():
        network = model().eval()
        calls = record(network, lambda: network(torch.empty(1, *size)))
    found = [call.convolution for call in calls if call.convolution.groups > 1]
    return list(dict.fromkeys(conv.geometry for conv in found if conv.depth is None or conv.depth.folds))


def _leave(running: list[str]) -> None:
    running.pop()  # return nothing: the result of a hook would replace the module's result


class _Recorder(TorchFunctionMode):
    """Record each convolution that is called. The last name in ``running`` is that of the calling module."""

    def __init__(self, running: list[str]) -> None:
        super().__init__()
        self.running = running
        self.calls: list[RecordedCall] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _KINDS:
            self._note(_KINDS[func], args, kwargs)
        return func(*args, **kwargs)

    def _note(self, kind: Kind, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            bound = _SIGNATURES[kind].bind(*args, **kwargs)
            bound.apply_defaults()
            input, weight, bias, *settings = bound.args  # without gconv's own arguments, which are keywords
            dtype, call = prepare(kind, input, weight, bias, tuple(settings))
        except (RuntimeError, TypeError, ValueError):
            return  # PyTorch's function raises the error itself, or accepts more than dense tensors
        passes = list(PASSES[:1])
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            passes += ["input_grad"] * input.requires_grad + ["weight_grad"] * weight.requires_grad
        layout = "contiguous" if input.is_contiguous() else layout_of(input, kind.dims)
        name = self.running[-1] if self.running else ""
        self.calls.append(RecordedCall(name, call, dtype, input.device, layout, tuple(passes)))
