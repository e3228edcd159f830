"""Record the convolutions that a network calls while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gconv import functional
from gconv.geometry import ConvGeometry

_NOT_IN_CONV2D = ("activation", "residual", "backend")  # arguments of group_conv2d alone


@dataclass(frozen=True)
class RecordedCall:
    """A call of a 2-d convolution.

    Attributes:
        name: qualified name of the innermost module that was running.
        geometry: the sizes.
        dtype: the type that it ran in: autocast's, if that was on.
        device: the input's device.
        layout: the input's layout, a key of ``gconv.measure.problem.LAYOUTS``.
        passes: members of ``gconv.geometry.PASSES``: forward, and the gradients that a backward pass needs.
    """

    name: str
    geometry: ConvGeometry
    dtype: torch.dtype
    device: torch.device
    layout: str
    passes: tuple[str, ...]


def record(model: nn.Module, run: Callable[[], Any]) -> list[RecordedCall]:
    """Call ``run``, and return the 2-d convolutions that it calls, in their order.

    Args:
        model: the network that names the calls by its modules.
        run: runs the network.

    Returns:
        Calls of ``F.conv2d`` and of :func:`gconv.group_conv2d`; those inside compiled graphs do not show.
    """
    running: list[str] = []
    with ExitStack() as hooks, _Recorder(running) as recorder:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # it takes no such hooks, and no mode sees what it calls
            enter = module.register_forward_pre_hook(lambda *_, name=name: running.append(name), prepend=True)
            leave = module.register_forward_hook(lambda *_: _leave(running), always_call=True)
            hooks.callback(enter.remove)
            hooks.callback(leave.remove)
        run()
    return recorder.calls


def grouped_convolutions(model: Callable[[], nn.Module], size: Sequence[int]) -> list[ConvGeometry]:
    """Return the distinct grouped convolutions that a network calls on one image, without computing any.

    Args:
        model: makes the network.
        size: (C, H, W) of the image.
    """
    with torch.device("meta"), torch.no_grad():
        network = model().eval()
        calls = record(network, lambda: network(torch.empty(1, *size)))
    return list(dict.fromkeys(call.geometry for call in calls if call.geometry.groups > 1))


def _leave(running: list[str]) -> None:
    running.pop()  # return nothing: the result of a hook would replace the module's


class _Recorder(TorchFunctionMode):
    """Record each convolution that is called; ``running`` ends with the name of the module that calls it."""

    def __init__(self, running: list[str]) -> None:
        super().__init__()
        self.running = running
        self.calls: list[RecordedCall] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.conv2d, functional.group_conv2d):
            self._note(*args, **{k: v for k, v in kwargs.items() if k not in _NOT_IN_CONV2D})
        return func(*args, **kwargs)

    def _note(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> None:
        try:
            dtype, geometry = functional.prepare(input, weight, bias, stride, padding, dilation, groups, None)
        except (RuntimeError, TypeError, ValueError):
            return  # F.conv2d raises an error itself, or takes more than dense tensors
        passes = ["forward"]
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            passes += ["input_grad"] * input.requires_grad + ["weight_grad"] * weight.requires_grad
        layout = "contiguous" if input.stride(-3) != 1 or input.is_contiguous() else "channels_last"
        name = self.running[-1] if self.running else ""
        self.calls.append(RecordedCall(name, geometry, dtype, input.device, layout, tuple(passes)))
