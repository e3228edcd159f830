"""The private names of PyTorch that gconv uses: all of them, with what each is for.

Checked with PyTorch 2.11 to 2.15. If a later PyTorch lacks one, an ImportError says so: when gconv is
imported or, for what only tools need, when it is first used. Where there is a public way that is only slower,
that is taken instead.
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
    """Look up ``path`` in a module or another object, or say which PyTorch is needed.

    Args:
        module: the object, or the name of a module to import.
        path: a name, or several with dots between.
    """
    name = module if isinstance(module, str) else getattr(module, "__name__", type(module).__name__)
    try:
        found = import_module(module) if isinstance(module, str) else module
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        raise ImportError(
            f"gconv needs {name}.{path}, which PyTorch {torch.__version__} lacks: "
            f"install a PyTorch that gconv is tested with, {TESTED}, or a newer gconv"
        ) from None
    return found


def _optional(module: str, name: str) -> Any:
    """Look up ``name`` in a module; None if either is missing."""
    try:
        return _required(module, name)
    except ImportError:
        return None


# State that decides whether a call must go through PyTorch's dispatcher.
transforms_active: Callable[[], bool] = _required(torch._C, "_are_functorch_transforms_active")
dispatch_modes: Callable[[], int] = _required(torch._C, "_len_torch_dispatch_stack")
profiler_enabled: Callable[[], bool] = _required(torch.autograd, "_profiler_enabled")
_dispatch_keys = _required(torch._C, "_dispatch_keys")
# Guards: below autograd and the tracking of views; without autocast.
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
BatchNormBase: TypeAlias = nn.modules.batchnorm._BatchNorm  # of BatchNorm1d to 3d and SyncBatchNorm
fx_assert: Callable[[bool, str], None] = _required(torch, "_assert")  # a node that fx graphs may call
_required(nn.modules.conv, "_ConvNd")
ConvolutionBase: TypeAlias = nn.modules.conv._ConvNd  # of all convolutions
for _class in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    _required(_class, "_conv_forward")  # gconv's layers override it
_required(nn.ConvTranspose2d, "_output_padding")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_layer = nn.Conv2d(1, 1, 1, device="meta")  # draws no random numbers, needs no device
for _name in (*HOOKS, "_parameters", "_buffers", "_reversed_padding_repeated_twice"):
    _required(_layer, _name)
_required(forward_ad, "_current_level")
_required("torch._functorch.eager_transforms", "JVP_NESTING")

# Faster than torch.cuda.current_device(), by 1 us a call.
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
    """Call ``function.apply(*args)`` without its look at the signature of ``forward``, which takes 25 us."""
    if transforms_active() or _unwrap_dead_wrappers is None:
        return function.apply(*args)
    return super(Function, function).apply(*_unwrap_dead_wrappers(args))  # type: ignore[misc]  # defined in C++


def zeros_around(layer: ConvolutionBase) -> list[int]:
    """Return the padding of a layer as ``F.pad`` takes it: before and after, the last dimension first."""
    return layer._reversed_padding_repeated_twice


def output_padding_of(layer: Any, input: Tensor, output_size: list[int] | None) -> Any:
    """Return the output padding with which a transposed layer turns ``input`` into ``output_size``.

    Raises:
        ValueError: the layer cannot make an output of that size.
    """
    if output_size is None:
        return layer.output_padding
    sizes = (layer.stride, layer.padding, layer.kernel_size, len(layer.kernel_size), layer.dilation)
    return layer._output_padding(input, output_size, *sizes)


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has forward or backward hooks."""
    return any(getattr(module, name) for name in HOOKS)


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the parameters of a module itself, also those that are None."""
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the buffers of a module itself, also those that are None."""
    return module._buffers


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the model that ``torch.compile`` wrapped, or ``model`` if it did not."""
    return getattr(model, "_orig_mod", model)


def graph_root(graph: Graph) -> Node:
    """Return the node before the first one of an fx graph."""
    return _required(graph, "_root")


def set_cudnn_tf32(allowed: bool) -> None:
    """Set PyTorch's older switch of TF32 in cuDNN, for convolutions and recurrent layers alike."""
    _required(torch._C, "_set_cudnn_allow_tf32")(allowed)


def cudnn_search() -> dict[str, tuple[Callable[[], Any], Callable[[Any], None]]]:
    """Return how to read and write cuDNN's search for the fastest plan: "benchmark", and "limit" of plans.

    ``torch.backends`` has both, but is closed to changes where PyTorch tests itself. Without cuDNN there is
    no limit.
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
    """Keep the current GPU waiting for a number of clock cycles."""
    _required(torch.cuda, "_sleep")(cycles)
