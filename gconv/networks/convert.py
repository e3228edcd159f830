"""``convert`` and ``revert``: gconv into other people's networks, and out of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from gconv import dispatch
from gconv.dispatch import this_device
from gconv.functional import pair
from gconv.geometry import PASSES, ConvGeometry, Padding, same_padding, steps_in_words
from gconv.module import GroupConv2d
from gconv.networks import subclasses
from gconv.networks.layout import move_to_channels_last, restore
from gconv.text import columns


@dataclass(frozen=True)
class Layer:
    """One convolution that :func:`convert` looked at.

    Attributes:
        name: qualified name in the model; empty for the model itself.
        geometry: such as "128 -> 256, 3x3, stride 2".
        swapped: whether it is a ``GroupConv2d`` now.
        reason: why it was swapped or left.
        call: the sizes of a large call, 256 images of 56 x 56, for which the report asks who would run it;
            None if the layer was left or has seen no input yet.
    """

    name: str
    geometry: str
    swapped: bool
    reason: str
    call: ConvGeometry | None = None


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`convert` swapped, what it left, and why; ``print`` it as a table.

    Printing says which layers this machine's kernels will run, and so may start CUDA.

    Attributes:
        layers: every 2-d convolution of the model.
        layout: what was done to the layout of the weights, in words; empty if nothing was.
    """

    layers: tuple[Layer, ...]
    layout: str = ""

    @property
    def swapped(self) -> tuple[Layer, ...]:
        """The layers that are a ``GroupConv2d`` now."""
        return tuple(layer for layer in self.layers if layer.swapped)

    @property
    def left(self) -> tuple[Layer, ...]:
        """The layers that stayed what they were."""
        return tuple(layer for layer in self.layers if not layer.swapped)

    def __str__(self) -> str:
        if not self.layers:
            return "no nn.Conv2d in the model; 1-d, 3-d, transposed and functional convolutions stay"
        here = {layer: _who_runs(layer.call) for layer in self.swapped if layer.call is not None}
        rows = [("layer", "geometry", "result", "why", "runs here on")]
        for layer in self.layers:
            runner, _ = here.get(layer, ("", ""))
            result = "swapped" if layer.swapped else "left"
            rows.append((layer.name or "(the model)", layer.geometry, result, layer.reason, runner))
        return "\n".join([columns(rows, left=5), *self._remarks(dict(here.values()))])

    def _remarks(self, runners: dict[str, str]) -> Iterator[str]:
        """Lines below the table; ``runners``: who runs layers here, and why."""
        yield f"{len(self.swapped)} of {len(self.layers)} convolutions swapped"
        if self.layout:
            yield self.layout
        yield from (f"{name}: {reason}" for name, reason in runners.items() if name == PYTORCH)
        if any(name != PYTORCH for name in runners):
            yield "small batches stay with PyTorch: gconv.profile(model, x) says which layers gain what"


PYTORCH = "PyTorch"


def _who_runs(call: ConvGeometry) -> tuple[str, str]:
    """Return who runs large calls of a layer on this machine, in channels_last, and why.

    The kernels with the types and passes that "auto" takes them for, or PyTorch.
    """
    device, found, reasons = this_device(), {}, []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        decided = dispatch.decide_call("auto", device, "channels_last", dtype, call)
        passes = [pass_ for pass_, decision in decided.items() if decision.backend == "triton"]
        if passes:
            which = "" if len(passes) == len(PASSES) else f" {', '.join(passes)}"
            found.setdefault(which, []).append(str(dtype).removeprefix("torch."))
        reasons.append(decided["forward"].reason)
    if not found:
        return PYTORCH, reasons[0]
    told = "; ".join(f"{' and '.join(types)}{passes}" for passes, types in found.items())
    return f"the kernels, in {told}", reasons[0]


def convert(
    model: nn.Module,
    *,
    depthwise: bool = False,
    filter: Callable[[nn.Module, str], bool] | None = None,
    channels_last: bool = True,
) -> ConversionReport:
    """Turn the grouped convolutions of a model into :class:`~gconv.GroupConv2d`, in place.

    A swapped module gets another class. Its parameters, their names and order, hooks, device and mode stay:
    optimisers, state dicts and references to it go on as before.

    If a layer is swapped, the weights of all 2-d convolutions in the model are put into channels_last, the
    layout of the kernels, with their gradients and the state of optimisers. Activations follow, whatever the
    layout of the input, as they do after ``model.to(memory_format=torch.channels_last)``.

    A second call changes nothing, and :func:`revert` takes everything back.

    Subclasses of ``nn.Conv2d`` become subclasses of both, where their convolution can be reached: those that
    leave it to ``nn.Conv2d``, and timm's ``Conv2dSame``, ``ScaledStdConv2d`` and ``ScaledStdConv2dSame``. A
    ``nn.LazyConv2d`` becomes a ``GroupConv2d`` with its first input. Parametrisations stay.

    Args:
        model: any module, a single convolution included.
        depthwise: swap convolutions whose groups have one input channel as well.
        filter: called as ``filter(module, qualified_name)`` for each convolution that could be swapped; False
            leaves it.
        channels_last: False leaves all weights where they are. Contiguous layers then run on PyTorch's own
            convolution unless the kernels were measured to gain more than copies of input and output cost.
            Needed for what takes contiguous weights only: FSDP2, ``safetensors.torch.save_file``, ``LBFGS``,
            ``parameters_to_vector``, pruning; pass channels_last images instead. Also for a model that
            flattens images by ``x.view(N, -1)``, which PyTorch refuses in channels_last (``x.flatten(1)``
            works).

    Returns:
        A report of every 2-d convolution, swapped or left, with the reason; ``print`` it.

    Raises:
        TypeError: ``model`` is no module, or a TorchScript module, whose code is fixed; ``filter`` is not
            callable.
    """
    check_model(model)
    if filter is not None and not callable(filter):
        raise TypeError(f"filter must be callable as filter(module, name), got {type(filter).__name__}")
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    reasons = [_reason_to_leave(module, name, depthwise, filter) for name, module in found]
    layers = []
    for (name, module), reason in zip(found, reasons, strict=True):
        words, call = geometry_in_words(module), None
        if reason is None:
            call = _large_call(module)
            _swap(module)
        layers.append(Layer(name, words, reason is None, reason or f"groups={module.groups}", call))
    moves = channels_last and None in reasons
    layout = move_to_channels_last([module for _, module in found]) if moves else ""
    return ConversionReport(tuple(layers), layout)


def revert(model: nn.Module) -> tuple[str, ...]:
    """Undo :func:`convert` in place: swapped modules get their own class back, weights their layout.

    Layers that were made as ``GroupConv2d`` stay what they are.

    Returns:
        The qualified names of the modules that were brought back.

    Raises:
        TypeError: as :func:`convert`.
        RuntimeError: a swapped layer was given an ``activation``, which its own class would not apply, or
            another class, by FSDP2 say; nothing is reverted.
    """
    check_model(model)
    swapped = {name: module for name, module in model.named_modules() if _is_swapped(module)}
    for name, module in swapped.items():
        if isinstance(module, nn.LazyConv2d):
            continue
        name, own = f"layer {name!r}" if name else "the model", _own_class(module)
        original = getattr(own, "_gconv_original", None)
        if original is None or own is not subclasses.grouped(original):
            raise RuntimeError(f"{name} became a {own.__name__} after it was swapped: revert before that")
        if module.activation is not None:
            raise RuntimeError(f"{name} has activation={module.activation!r}: {original.__name__} has none")
    for module in swapped.values():
        if not isinstance(module, nn.LazyConv2d):
            _set_class(module, _own_class(module)._gconv_original)
        for mark in (_SWAPPED, "cls_to_become"):
            module.__dict__.pop(mark, None)
    restore(model.modules())
    return tuple(swapped)


_SWAPPED = "_swapped_by_gconv"  # a mark in a module's __dict__, so that it is copied and pickled with it


def _is_swapped(module: nn.Module) -> bool:
    """Whether ``convert`` made it what it is; by its class too, where a copy has lost the mark."""
    made = isinstance(module, GroupConv2d) and type(module)._gconv_original is not nn.Conv2d
    return made or _SWAPPED in module.__dict__


def _large_call(module: nn.Conv2d) -> ConvGeometry | None:
    """The sizes of a call with 256 images of 56 x 56; None of a lazy layer, whose channels are not known."""
    if isinstance(module, nn.LazyConv2d):
        return None
    stride, dilation = (pair(name, getattr(module, name), least=1) for name in ("stride", "dilation"))
    r, s = module.weight.shape[2:]
    padding = Padding(*same_padding(r, dilation[0]), *same_padding(s, dilation[1]))
    size = (256, module.in_channels, 56, 56)
    return ConvGeometry(size, tuple(module.weight.shape), stride, padding, dilation, module.groups)


def _swap(module: nn.Conv2d) -> None:
    if isinstance(module, nn.LazyConv2d):
        module.__dict__["cls_to_become"] = GroupConv2d
    else:
        _set_class(module, subclasses.grouped(_own_class(module)))
    module.__dict__[_SWAPPED] = True


def _own_class(module: nn.Module) -> type[Any]:
    """The class of a module, beneath the one that a parametrisation made for it alone."""
    return type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Makes ``cls`` the class of a module; beneath its parametrisation's, which has the properties."""
    if parametrize.is_parametrized(module):
        made = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")}
        cls = type(f"Parametrized{cls.__name__}", (cls,), made)
    object.__setattr__(module, "__class__", cls)  # whatever the class does where an attribute is set


def check_model(model: Any) -> None:
    """Raises TypeError where ``model`` is no module whose parts can be exchanged."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("the code of a TorchScript module is fixed: convert before torch.jit.script")


def _reason_to_leave(
    module: nn.Conv2d, name: str, depthwise: bool, filter: Callable[[nn.Module, str], bool] | None
) -> str | None:
    lazy = isinstance(module, nn.LazyConv2d)
    if isinstance(module, GroupConv2d) or (lazy and _is_swapped(module)):
        return "is a GroupConv2d already"
    if module.groups == 1:
        return "dense: groups=1"
    if not depthwise and module.groups == (module.out_channels if lazy else module.in_channels):
        return f"{'may be depthwise' if lazy else 'depthwise'}: convert(..., depthwise=True) swaps it"
    own = module.cls_to_become if lazy else _own_class(module)
    if (lazy and own is not nn.Conv2d) or not issubclass(own, nn.Conv2d):
        return f"its class {type(module).__name__} hides the one that it is made of"
    if {"forward", "_conv_forward"} & module.__dict__.keys():
        return "its forward was replaced"
    if hasattr(module, "activation"):
        return "has an activation of its own"
    if getattr(module, "qconfig", None) is not None:
        return "is prepared for torch.ao.quantization, which looks for its very class"
    if reason := subclasses.why_not(own):
        return reason
    if filter is not None and not filter(module, name):
        return "the filter left it"
    return None


def geometry_in_words(module: nn.Conv2d) -> str:
    """Of a layer, such as "128 -> 256, 3x3, stride 2"; what a convolution has by default is not said."""
    kernel, *steps = (
        pair(name, getattr(module, name), least=1) for name in ("kernel_size", "stride", "dilation")
    )
    # A lazy one has 0 channels until it has seen an input.
    parts = [f"{module.in_channels or '?'} -> {module.out_channels}", "x".join(map(str, kernel))]
    return ", ".join([*parts, *steps_in_words(*steps)])
