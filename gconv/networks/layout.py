"""Move a model's weights to channels_last and back, together with the tensors that need the same strides."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from gconv.torch_internals import own_parameters

_MOVED = "_moved_by_gconv"  # a mark in a module's __dict__, which is copied and pickled with the module


def move_to_channels_last(convolutions: Sequence[nn.Module]) -> str:
    """Move the contiguous weights of ``convolutions`` to channels_last, with their gradients and momenta.

    Skips parametrized, sharded and lazy weights, and weights whose memory is used by something else: flat
    buffers, shared memory, the buckets of DistributedDataParallel.

    Args:
        convolutions: 2-d layers; several can share a weight.

    Returns:
        What was done, as text; empty if no weight changed the order of its numbers in memory.
    """
    last = torch.channels_last
    movable = {module: weight for module in convolutions if (weight := _movable_weight(module)) is not None}
    weights = list({id(weight): weight for weight in movable.values()}.values())
    if _in_buckets(weights):
        return (
            "weights keep their layout, which DistributedDataParallel relies on: convert before wrapping the "
            "model, or pass channels_last images"
        )
    changes = any([not weight.is_contiguous(memory_format=last) for weight in weights])
    _lay_out(weights, last)
    for module in movable:
        module.__dict__[_MOVED] = True
    if not changes:
        return ""
    return "weights moved to channels_last, and activations follow (channels_last=False keeps their layout)"


def restore(modules: Iterable[nn.Module]) -> None:
    """Move the weights that were moved to channels_last back to the contiguous layout."""
    moved = [module for module in modules if module.__dict__.pop(_MOVED, False)]
    weights = {id(weight): weight for weight in map(_weight, moved) if weight is not None}
    _lay_out(list(weights.values()), torch.contiguous_format)


def _weight(module: nn.Module) -> nn.Parameter | None:
    """Return the weight of a module, or None if it isn't a parameter of the module itself."""
    return own_parameters(module).get("weight")


def _movable_weight(module: nn.Module) -> nn.Parameter | None:
    """Return the weight of a module if it is contiguous, not channels_last yet, and has its own memory."""
    weight = _weight(module)
    if type(weight) is not nn.Parameter or weight.layout != torch.strided or not weight.is_contiguous():
        return None
    own_memory = weight.is_meta or weight.untyped_storage().nbytes() == weight.nbytes
    if not own_memory or weight.is_inference() or (weight.is_cpu and weight.is_shared()):
        return None
    return None if _has_strides_of(torch.channels_last, weight) else weight


def _has_strides_of(layout: torch.memory_format, tensor: Tensor) -> bool:
    """Whether ``tensor`` has exactly the strides of ``layout``.

    The weight of a 1x1 kernel, or of a single input channel, is contiguous in both layouts, but PyTorch goes
    by strides.
    """
    return torch.empty_like(tensor, device="meta", memory_format=layout).stride() == tensor.stride()


def _lay_out(weights: Sequence[nn.Parameter], layout: torch.memory_format) -> None:
    """Copy weights to ``layout``, with their gradients and optimizer states.

    Fused optimizers require the same strides for all of them.
    """
    optimisers = _alive(Optimizer) if weights else []
    all_states = [optimiser.state for optimiser in optimisers if hasattr(optimiser, "state")]
    with torch.inference_mode(False), torch.no_grad():
        for weight in weights:
            before = weight.stride()
            weight.data = _copy(weight.data, layout)
            if weight.grad is not None and weight.grad.stride() == before:
                weight.grad = _copy(weight.grad, layout)
            for state in [of_all[weight] for of_all in all_states if weight in of_all]:
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.shape == weight.shape and value.stride() == before:
                        state[name] = _copy(value, layout)


def _copy(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    return torch.empty_like(tensor, memory_format=layout).copy_(tensor)


def _in_buckets(weights: Sequence[nn.Parameter]) -> bool:
    """Whether DistributedDataParallel has buckets for gradients of ``weights``, which fix their layout."""
    ids = set(map(id, weights))
    wrappers = [w for w in (_alive(DistributedDataParallel) if ids else []) if hasattr(w, "module")]
    return any(id(p) in ids for wrapper in wrappers for p in wrapper.module.parameters())


def _alive(kind: type) -> list[Any]:
    """Return all objects of a class in this process, even those whose ``__init__`` failed.

    There is no other way to find the optimizer of a weight.
    """
    return [found for found in gc.get_objects() if issubclass(type(found), kind)]
