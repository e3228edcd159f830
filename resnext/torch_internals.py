"""What the trainer uses of PyTorch that is private, untyped, or has another name in another version.

Checked with PyTorch 2.11 to 2.15.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

M = TypeVar("M", bound=nn.Module)
# torch.compile puts this before the keys of a state dict. If PyTorch chose another name, files saved from a
# compiled network would be refused with the first key that does not fit.
COMPILED = "_orig_mod."


@torch.no_grad()
def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source to its target; in one launch if PyTorch has ``_foreach_copy_``, else one by one."""
    if hasattr(torch, "_foreach_copy_"):
        torch._foreach_copy_(list(targets), list(sources))
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def keep_buffers() -> dict[str, bool]:
    """Return the argument that stops DistributedDataParallel from broadcasting buffers.

    It was ``broadcast_buffers`` and is ``forward_sync_buffers`` in newer versions.
    """
    names = inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}


def place(model: M, device: torch.device, layout: torch.memory_format) -> M:
    """Move a model to a device and a memory layout."""
    return model.to(device, memory_format=layout)  # type: ignore[call-overload]  # the stubs lack this argument
