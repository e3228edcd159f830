"""The layout of a model's weights: into channels_last, and back, with all that depends on their strides."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

_MOVED = "_moved_by_gconv"  # a mark in a module's __dict__, so that it is copied and pickled with it


def move_to_channels_last(convolutions: Sequence[nn.Conv2d]) -> str:
    """Put the contiguous weights of ``convolutions`` into channels_last, their gradients and momenta as well.

    Parametrised, sharded and lazy weights stay, and those in memory that others hold: flat buffers, shared
    memory, the buckets of DistributedDataParallel.

    Returns:
        What was done, in words; empty if no weight changed the order of its numbers.
    """
    last = torch.channels_last
    movable = [m for m in convolutions if _is_movable(_weight(m)) and not _lies_in(_weight(m), last)]
    weights = list({id(module.weight): module.weight for module in movable}.values())
    if _in_buckets(weights):
        return (
            "weights keep the layout that DistributedDataParallel found: convert before you wrap the model, "
            "or pass channels_last images"
        )
    changes = any([not weight.is_contiguous(memory_format=last) for weight in weights])
    _lay_out(weights, last)
    for module in movable:
        module.__dict__[_MOVED] = True
    if not changes:
        return ""
    return "weights are in channels_last now, and activations follow (channels_last=False leaves them)"


def restore(modules: Iterable[nn.Module]) -> None:
    """Give the weights that were moved their contiguous layout back."""
    moved = [module for module in modules if module.__dict__.pop(_MOVED, False)]
    weights = {id(weight): weight for weight in map(_weight, moved) if isinstance(weight, nn.Parameter)}
    _lay_out(list(weights.values()), torch.contiguous_format)


def _weight(module: nn.Module) -> Any:
    return module._parameters.get("weight")


def _is_movable(weight: Any) -> bool:
    """Whether a weight is a contiguous parameter in memory of its own."""
    if type(weight) is not nn.Parameter or weight.layout != torch.strided or not weight.is_contiguous():
        return False
    alone = weight.is_meta or weight.untyped_storage().nbytes() == weight.nbytes
    return alone and not weight.is_inference() and not (weight.is_cpu and weight.is_shared())


def _lies_in(tensor: Tensor, layout: torch.memory_format) -> bool:
    """Whether ``tensor`` has the very strides of ``layout``.

    A 1x1 kernel, or one of a single input channel, is contiguous in both layouts; PyTorch goes by strides.
    """
    return torch.empty_like(tensor, device="meta", memory_format=layout).stride() == tensor.stride()


def _lay_out(weights: Sequence[nn.Parameter], layout: torch.memory_format) -> None:
    """Copy weights into ``layout``, and what goes with them: gradients, and the state of optimisers.

    Fused optimisers take it for granted that all of these have the same strides.
    """
    all_states = [o.state for o in (_alive(Optimizer) if weights else []) if hasattr(o, "state")]
    with torch.inference_mode(False), torch.no_grad():
        for weight in weights:
            before = weight.stride()
            states = [of_all[weight] for of_all in all_states if weight in of_all]
            weight.data = _copy(weight.data, layout)
            if weight.grad is not None and weight.grad.stride() == before:
                weight.grad = _copy(weight.grad, layout)
            for state in states:
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.shape == weight.shape and value.stride() == before:
                        state[name] = _copy(value, layout)


def _copy(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    return torch.empty_like(tensor, memory_format=layout).copy_(tensor)


def _in_buckets(weights: Sequence[nn.Parameter]) -> bool:
    """Whether DistributedDataParallel keeps gradients of any of ``weights`` in the layout that it found."""
    ids = set(map(id, weights))
    wrappers = [w for w in (_alive(DistributedDataParallel) if ids else []) if hasattr(w, "module")]
    return any(id(p) in ids for wrapper in wrappers for p in wrapper.module.parameters())


def _alive(kind: type) -> list[Any]:
    """All objects of a class in this process, also those whose making failed.

    Nothing else leads from a weight to its optimiser.
    """
    return [found for found in gc.get_objects() if issubclass(type(found), kind)]
