"""All private names of PyTorch that gconv uses, and what each is for.

Checked with PyTorch 2.11 to 2.15. If a later PyTorch lacks one, gconv raises an ImportError that names it: on
import, or on first use for names that only tools need. Names that only save time are optional: without them
gconv uses the slower public API.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.fx import Graph, Node

TESTED = "2.11 to 2.15"


def _required(module: Any, path: str) -> Any:
    """Return an attribute of a module or another object.

    Args:
        module: the object, or the name of a module to import.
        path: name of the attribute; may have dots.

    Raises:
        ImportError: the attribute doesn't exist; the message names the tested versions of PyTorch.
    """
    name = module if isinstance(module, str) else getattr(module, "__name__", type(module).__name__)
    try:
        found = import_module(module) if isinstance(module, str) else module
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        raise ImportError(
            f"gconv needs {name}.{path}, which PyTorch {torch.__version__} doesn't have: "
            f"install PyTorch {TESTED}, with which gconv is tested, or a newer gconv"
        ) from None
    return found


def _optional(module: str, name: str) -> Any:
    """Return an attribute of a module, or None if either is missing."""
    try:
        return _required(module, name)
    except ImportError:
        return None


# Whether a call must go through PyTorch's dispatcher depends on these.
transforms_active: Callable[[], bool] = _required(torch._C, "_are_functorch_transforms_active")
dispatch_modes: Callable[[], int] = _required(torch._C, "_len_torch_dispatch_stack")
profiler_enabled: Callable[[], bool] = _required(torch.autograd, "_profiler_enabled")
_dispatch_keys = _required(torch._C, "_dispatch_keys")
# Context managers that skip autograd and view tracking, and that disable autocast.
below_autograd: Callable[[], AbstractContextManager[None]] = _required(
    torch._C, "_AutoDispatchBelowADInplaceOrView"
)
without_autocast: Callable[[], AbstractContextManager[None]] = _required(torch._C, "_DisableAutocast")

suggest_memory_format: Callable[[Tensor], torch.memory_format] = _required(
    "torch._prims_common", "suggest_memory_format"
)
tree_leaves: Callable[[Any], list[Any]] = _required("torch.utils._pytree", "tree_leaves")
has_global_hooks: Callable[[], bool] = _required("torch.nn.modules.module", "_has_any_global_hook")
_required(nn.modules.batchnorm, "_BatchNorm")
BatchNormBase: TypeAlias = nn.modules.batchnorm._BatchNorm  # base of BatchNorm1d to 3d and SyncBatchNorm
fx_assert: Callable[[bool, str], None] = _required(torch, "_assert")  # fx graphs may call it
_required(nn.modules.conv, "_ConvNd")
ConvolutionBase: TypeAlias = nn.modules.conv._ConvNd  # base of all convolutions
for _class in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    _required(_class, "_conv_forward")  # gconv's layers override it
_required(nn.ConvTranspose2d, "_output_padding")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_layer = nn.Conv2d(1, 1, 1, device="meta")  # draws no random numbers, needs no device
for _name in (*HOOKS, "_parameters", "_buffers", "_reversed_padding_repeated_twice"):
    _required(_layer, _name)
_required(forward_ad, "_current_level")
_required("torch._functorch.eager_transforms", "JVP_NESTING")

# 1 us faster per call than torch.cuda.current_device().
current_cuda_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_unwrap_dead_wrappers = _optional("torch._functorch.utils", "unwrap_dead_wrappers")


def dispatch_keys(tensor: Tensor) -> int:
    """Return the dispatch keys of a tensor as one number."""
    return _dispatch_keys(tensor).raw_repr()


def forward_mode_active() -> bool:
    """Return whether forward-mode differentiation is on."""
    return forward_ad._current_level >= 0


def jvp_nesting() -> int:
    """Return how many levels of ``torch.func.jvp`` are nested here."""
    return torch._functorch.eager_transforms.JVP_NESTING


def apply_function(function: type[Function], *args: Any) -> Any:
    """Call ``function.apply(*args)`` without inspecting the signature of ``forward``, which takes 25 us."""
    if transforms_active() or _unwrap_dead_wrappers is None:
        return function.apply(*args)
    return super(Function, function).apply(*_unwrap_dead_wrappers(args))  # type: ignore[misc]  # defined in C++


def zeros_around(layer: ConvolutionBase) -> list[int]:
    """Return the padding of a layer as ``F.pad`` expects it: before and after, last dimension first."""
    return layer._reversed_padding_repeated_twice


def output_padding_of(layer: Any, input: Tensor, output_size: list[int] | None) -> Any:
    """Return the output padding that a transposed layer needs to produce ``output_size`` from ``input``.

    Raises:
        ValueError: the layer can't produce that size.
    """
    if output_size is None:
        return layer.output_padding
    sizes = (layer.stride, layer.padding, layer.kernel_size, len(layer.kernel_size), layer.dilation)
    return layer._output_padding(input, output_size, *sizes)


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has forward or backward hooks."""
    return any(getattr(module, name) for name in HOOKS)


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the parameters of a module without those of its children, including those that are None."""
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the buffers of a module without those of its children, including those that are None."""
    return module._buffers


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the model that ``torch.compile`` wrapped, or ``model`` itself if it isn't compiled."""
    return getattr(model, "_orig_mod", model)


def graph_root(graph: Graph) -> Node:
    """Return the root of an fx graph, the node before its first."""
    return _required(graph, "_root")


def set_cudnn_tf32(allowed: bool) -> None:
    """Allow TF32 in cuDNN through PyTorch's older switch, which covers convolutions and recurrent layers."""
    _required(torch._C, "_set_cudnn_allow_tf32")(allowed)


def cudnn_search() -> dict[str, tuple[Callable[[], Any], Callable[[Any], None]]]:
    """Return getters and setters of cuDNN's search for the fastest plan: "benchmark", and "limit" of plans.

    ``torch.backends`` offers both, but PyTorch's test utilities freeze it. Without cuDNN there is no "limit".
    """
    found = {
        "benchmark": (
            _required(torch._C, "_get_cudnn_benchmark"),
            _required(torch._C, "_set_cudnn_benchmark"),
        )
    }
    if torch.backends.cudnn.is_available():
        found["limit"] = (
            _required(torch._C, "_cuda_get_cudnn_benchmark_limit"),
            _required(torch._C, "_cuda_set_cudnn_benchmark_limit"),
        )
    return found


def sleep_on_gpu(cycles: int) -> None:
    """Make the current GPU wait for a number of clock cycles."""
    _required(torch.cuda, "_sleep")(cycles)
