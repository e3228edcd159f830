"""``convert`` and ``revert``: gconv into other people's networks, and out of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from gconv import dispatch, subclasses
from gconv.functional import pair
from gconv.geometry import PASSES, ConvGeometry, Padding, same_padding, steps_in_words
from gconv.module import GroupConv2d
from gconv.terminal import columns


@dataclass(frozen=True)
class Layer:
    """One convolution that :func:`convert` looked at.

    Attributes:
        name: qualified name in the model; empty for the model itself.
        geometry: such as "128 -> 256, 3x3, stride 2".
        swapped: whether it is a ``GroupConv2d`` now.
        reason: why it was swapped or left.
        call: a large call of it, 256 images of 56 x 56, of which ``auto`` can be asked who would run it; None
            where it was left, or has seen no input yet.
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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, list[str]] = {}
    reason = ""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        decided = {p: dispatch.decide_by_auto(p, device, "channels_last", dtype, call) for p in PASSES}
        passes = [pass_ for pass_, decision in decided.items() if decision.backend == "triton"]
        if passes:
            found.setdefault(", ".join(passes) if len(passes) < len(PASSES) else "", []).append(
                str(dtype).removeprefix("torch.")
            )
        reason = reason or decided["forward"].reason
    if not found:
        return PYTORCH, reason
    told = [" ".join(filter(None, (" and ".join(types), passes))) for passes, types in found.items()]
    return f"the kernels, in {'; '.join(told)}", reason


def convert(
    model: nn.Module,
    *,
    depthwise: bool = False,
    filter: Callable[[nn.Module, str], bool] | None = None,
    channels_last: bool = True,
) -> ConversionReport:
    """Turn the grouped convolutions of a model into :class:`~gconv.GroupConv2d`, in place.

    Only the class of a swapped module changes. Its parameters, their names and order, hooks, device and mode
    stay, so optimisers, state dicts and references to it go on as before.

    If a layer is swapped, the weights of all 2-d convolutions in the model are put into channels_last, the
    layout of the kernels. Activations follow them, whatever the layout of the input, as they do after
    ``model.to(memory_format=torch.channels_last)``.

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
            Needed if the model flattens images by ``x.view(N, -1)``, which PyTorch refuses for channels_last
            tensors (``x.flatten(1)`` works); if a fused optimiser has taken steps already; or if FSDP2 is to
            shard the model, which takes no channels_last parameters (give it channels_last images instead).

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
    layout = _move_all(model, [module for _, module in found]) if channels_last and None in reasons else ""
    return ConversionReport(tuple(layers), layout)


def revert(model: nn.Module) -> tuple[str, ...]:
    """Give what :func:`convert` swapped its own class back, in place, and weights the layout that they had.

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
    for module in model.modules():
        if module.__dict__.pop(_MOVED, False):
            _lay_out(module.weight, torch.contiguous_format)
    return tuple(swapped)


# Marks in a module's __dict__, so that they are copied and pickled with it.
_SWAPPED = "_swapped_by_gconv"
_MOVED = "_moved_by_gconv"  # to channels_last


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


def _move_all(model: nn.Module, convolutions: Sequence[nn.Conv2d]) -> str:
    """Put the weights of ``convolutions`` into channels_last, and say so."""
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        return (
            "weights keep the layout that DistributedDataParallel found: convert before you wrap the model, "
            "or give it channels_last images"
        )
    moved = [_move_to_channels_last(module) for module in convolutions]
    if not any(moved):
        return ""
    return "weights are in channels_last now, and activations follow (channels_last=False leaves them)"


def _move_to_channels_last(module: nn.Conv2d) -> bool:
    """Put a contiguous weight into channels_last; return whether that changed the order of its numbers.

    Parametrised, sharded and lazy weights stay, and those in memory that others hold: flat buffers, shared
    memory.
    """
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.layout != torch.strided or not weight.is_contiguous():
        return False
    alone = weight.is_meta or weight.untyped_storage().nbytes() == weight.nbytes
    if not alone or weight.is_inference() or (weight.is_cpu and weight.is_shared()):
        return False
    changes = not weight.is_contiguous(memory_format=torch.channels_last)
    before = weight.stride()
    _lay_out(weight, torch.channels_last)
    if weight.stride() != before:
        module.__dict__[_MOVED] = True
    return changes


def _lay_out(weight: nn.Parameter, layout: torch.memory_format) -> None:
    """Copy a weight into ``layout``, with its strides also where an axis of length 1 leaves a choice."""
    weight.data = torch.empty_like(weight.data, memory_format=layout).copy_(weight.data)


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
