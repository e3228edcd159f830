"""The parts of PyTorch that the trainer uses and that are private, untyped, or named differently by version.

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
# torch.compile prefixes the keys of a state dict with this. If PyTorch changed it, loading a file saved from
# a compiled network would fail with an error about the first key.
COMPILED = "_orig_mod."


@torch.no_grad()
def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source to its target, in a single launch if PyTorch has ``_foreach_copy_``."""
    if hasattr(torch, "_foreach_copy_"):
        torch._foreach_copy_(list(targets), list(sources))
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def keep_buffers() -> dict[str, bool]:
    """Return the argument that stops DistributedDataParallel from broadcasting buffers.

    Newer versions call it ``forward_sync_buffers``, older ones ``broadcast_buffers``.
    """
    names = inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}


def place(model: M, device: torch.device, layout: torch.memory_format) -> M:
    """Move a model to a device and a memory layout."""
    return model.to(device, memory_format=layout)  # type: ignore[call-overload]  # the stubs lack this argument
